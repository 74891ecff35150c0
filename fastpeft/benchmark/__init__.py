"""Measure fastpeft on this machine, side by side with reference PEFT where it is installed.

`fastpeft bench`, `make bench` and `bench/gpu.sh` all end up here.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastpeft.benchmark import dora, environment, gpu, layer, model
from fastpeft.benchmark.cases import QUICK, Case, Effort, Libraries, Result, measure
from fastpeft.benchmark.libraries import available
from fastpeft.benchmark.memory import SavedBytes, saved_bytes
from fastpeft.benchmark.report import Report
from fastpeft.benchmark.timing import Spread, Timing, interleave, torch_threads, wall_clock

# Name -> cases(quick, device). The first five run anywhere, the others are tables of a large GPU.
SUITES: dict[str, Callable[[bool, str], Iterator[Case]]] = {
    "layer": layer.layer_cases,
    "saved": layer.saved_cases,
    "dora": dora.dora_cases,
    "model": model.model_cases,
    "saved-model": model.saved_model_cases,
    "fused-linear": gpu.fused_linear_cases,
    "fused-linear-full": gpu.fused_linear_table,
    "llama-layer": gpu.llama_layer_cases,
    "llama-saved": gpu.llama_saved_cases,
}
DEFAULT_SUITES = ("layer", "saved", "dora", "model", "saved-model")
GPU_SUITES = ("llama-layer", "llama-saved", "fused-linear")


def run(
    suites: Sequence[str] = DEFAULT_SUITES,
    *,
    quick: bool = False,
    out_dir: Path | None = None,
    stem: str = "bench",
    device: str = "cpu",
    threads: int = 1,
    libraries: Libraries | None = None,
    effort: Effort | None = None,
    deadline_s: float | None = None,
    progress: Callable[[str], Any] | None = None,
) -> Report:
    """Run suites and report.

    Args:
        suites: names from `SUITES`.
        quick: fewer cases, measured more briefly: a look, not a figure to quote.
        out_dir: where `<stem>.json` and `<stem>.md` go; None: nothing is written.
        device: "cpu" or "cuda".
        threads: torch threads on the CPU while measuring.
        libraries: contender name -> module with PEFT's names; None: those that are installed.
        deadline_s: cases that have not begun by then are reported as not run.
        progress: called with one line before each case.

    Raises:
        ValueError: a suite that is not there.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    found = available() if libraries is None else libraries
    effort = effort or (QUICK if quick else Effort())
    cases = [case for name in suites for case in SUITES[name](quick, device)]
    started, results = time.monotonic(), []
    with torch_threads(threads):
        for number, case in enumerate(cases, start=1):
            if deadline_s is not None and time.monotonic() - started > deadline_s:
                late = f"not run: past the limit of {deadline_s:.0f} s"
                results.append(Result(case.suite, case.name, case.params, error=late))
                continue
            if progress:
                progress(f"[{number}/{len(cases)}] {case.suite} {case.name}")
            results.append(measure(case, found, effort))
    report = Report(environment.describe(threads), results)
    if out_dir is not None:
        report.write(out_dir, stem)
    return report


__all__ = [
    "DEFAULT_SUITES",
    "GPU_SUITES",
    "SUITES",
    "Effort",
    "Report",
    "Result",
    "SavedBytes",
    "Spread",
    "Timing",
    "available",
    "interleave",
    "run",
    "saved_bytes",
    "torch_threads",
    "wall_clock",
]
