"""The benches of bench/gpu.sh: the tables that the speed targets are stated in, the most important first.

python bench/gpu.py --out FOLDER [--deadline SECONDS] [--suites ...] [--quick]
"""

import argparse
import sys
from pathlib import Path

from fastpeft.benchmark import GPU_SUITES, QUICK, SUITES, Effort, run, without_cases
from fastpeft.benchmark.plots import draw

EFFORT = Effort(budget_s=2.0, warmup=3)  # a GPU that is ours alone is steady, and all of it has to fit into 9 minutes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for <stem>.json, <stem>.md and the pictures")
    parser.add_argument("--stem", default="bench", help="name of the files")
    parser.add_argument("--suites", nargs="+", choices=SUITES, help="all of a GPU's that have a case here by default")
    parser.add_argument("--quick", action="store_true", help="fewer cases, measured more briefly")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deadline", type=float, help="begin no case after so many seconds")
    args = parser.parse_args()
    if args.suites and (why := without_cases(args.suites, quick=args.quick, device=args.device)):
        print(f"nothing was measured: {'; '.join(why)}", file=sys.stderr)
        return 1
    report = run(
        args.suites or GPU_SUITES,
        quick=args.quick,
        out_dir=args.out,
        stem=args.stem,
        device=args.device,
        effort=QUICK if args.quick else EFFORT,
        deadline_s=args.deadline,
        progress=lambda line: print(line, flush=True),
    )
    print(report.to_markdown())
    try:
        draw(report.to_dict(), args.out, args.stem)
    except ImportError as error:
        print(f"no pictures: {error}; then fastpeft bench --draw {args.out / args.stem}.json")
    for result in report.errors:
        print(f"{result.suite} {result.case}: {result.error}", file=sys.stderr)
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
