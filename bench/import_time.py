"""What `import fastpeft` adds to `import torch, transformers`: medians of alternating fresh processes, as a ratio.

    python bench/import_time.py [--rounds 9] [--limit 1.1]

Exits with 1 when the ratio is above the limit.
"""

import argparse
import statistics
import subprocess
import sys
import time

BASE = "import torch, transformers"
OURS = "import torch, transformers, fastpeft"


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="processes of each kind")
    parser.add_argument("--limit", type=float, default=1.1, help="highest ratio that passes")
    options = parser.parse_args()

    seconds(OURS)  # byte code written, files in the page cache
    times: dict[str, list[float]] = {BASE: [], OURS: []}
    for _ in range(options.rounds):
        for code, found in times.items():
            found.append(seconds(code))
    base, ours = (statistics.median(found) for found in times.values())
    print(f"{base:.2f} s  {BASE}\n{ours:.2f} s  {OURS}\n{ours / base:.3f}  ratio, limit {options.limit}")
    return int(ours / base > options.limit)


if __name__ == "__main__":
    sys.exit(main())
