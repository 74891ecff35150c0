"""Measure fastpeft on this machine, side by side with reference PEFT where it is installed.

`fastpeft bench`, `make bench` and `bench/gpu.sh` all end up here.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastpeft.benchmark import (
    compiled,
    dora,
    environment,
    fresh,
    gpu,
    groups,
    host,
    ia3,
    joint,
    layer,
    model,
    own_gemm,
    peers,
    roofline,
    routed,
    scaling,
    serving_ops,
)
from fastpeft.benchmark.cases import QUICK, Case, Effort, Libraries, Result, measure, predicted
from fastpeft.benchmark.libraries import available
from fastpeft.benchmark.memory import SavedBytes, saved_bytes
from fastpeft.benchmark.report import Report
from fastpeft.benchmark.timing import Spread, Timing, interleave, torch_threads, wall_clock

# Name -> cases(quick, device). The first fifteen run anywhere, the others are tables of a large GPU.
SUITES: dict[str, Callable[[bool, str], Iterator[Case]]] = {
    "layer": layer.layer_cases,
    "groups": groups.group_cases,
    "host": host.host_cases,
    "ia3": ia3.ia3_cases,
    "saved": layer.saved_cases,
    "dora": dora.dora_cases,
    "model": model.model_cases,
    "saved-model": model.saved_model_cases,
    "peak": fresh.peak_cases,
    "first-step": fresh.first_step_cases,
    "scaling": scaling.scaling_cases,
    "compiled-model": compiled.compiled_model_cases,
    "routed": routed.routed_cases,
    "routed-generate": routed.routed_generate_cases,
    "joint": joint.joint_cases,
    "fused-linear": gpu.fused_linear_cases,
    "fused-linear-full": gpu.fused_linear_table,
    "llama-layer": gpu.llama_layer_cases,
    "llama-saved": gpu.llama_saved_cases,
    "own-gemm": own_gemm.own_gemm_cases,
    "punica": serving_ops.punica_cases,
    "vllm-lora": serving_ops.vllm_lora_cases,
    "routed-groups": serving_ops.routed_group_cases,
    "peers": peers.peer_cases,
}
DEFAULT_SUITES = (
    "layer", "groups", "ia3", "dora", "host", "saved", "model", "saved-model", "peak", "first-step", "scaling",
    "compiled-model", "routed", "routed-generate", "joint",
)  # fmt: skip
# The tables with targets first; the ones that take long, or that touch other libraries, last.
GPU_SUITES = (
    "llama-layer", "llama-saved", "fused-linear", "own-gemm", "punica", "vllm-lora", "routed-groups", "groups", "host",
    "model", "peak", "layer", "scaling", "first-step", "compiled-model", "routed", "peers",
)  # fmt: skip


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
        deadline_s: cases that have not begun by then, or that would not be done, are reported as not run.
        progress: called with one line before each case.

    Raises:
        ValueError: a suite that is not there.
    """
    cases = _cases(suites, quick, device)
    found = available() if libraries is None else libraries
    effort = effort or (QUICK if quick else Effort())
    started = time.monotonic()
    with torch_threads(threads):
        ceilings = roofline.ceilings_of(device) if any(case.work() for case in cases) else None
        report = Report({**environment.describe(threads), **_described(device, ceilings)}, [])
        for number, case in enumerate(cases, start=1):
            if deadline_s is not None and time.monotonic() - started + case.reserve_s > deadline_s:
                late = f"not run: it would pass the limit of {deadline_s:.0f} s"
                report.results.append(Result(case.suite, case.name, case.params, error=late))
                continue
            if progress:
                progress(f"[{number}/{len(cases)}] {case.suite} {case.name}")
            report.results.append(measure(case, found, effort, ceilings))
            if out_dir is not None:  # whoever stops it keeps what was measured
                report.write(out_dir, stem)
    if out_dir is not None:
        report.write(out_dir, stem)
    return report


def without_cases(suites: Sequence[str], *, quick: bool = False, device: str = "cpu") -> list[str]:
    """For each suite that has no case here, why, in one line. `run` passes over such a suite without a word."""
    why = {"peers": peers.lacking}
    empty = [name for name in suites if not _cases([name], quick, device)]
    return [why[name](device) if name in why else f"{name} has no case on {device}" for name in empty]


def predict(suites: Sequence[str], ceilings: roofline.Ceilings, *, quick: bool = False) -> Report:
    """The predicted seconds of suites on a GPU that is not here: nothing is run. Cases without a roofline are left out.

    Raises:
        ValueError: a suite that is not there.
    """
    results = [predicted(case, ceilings) for case in _cases(suites, quick, "cuda")]
    described = {**environment.describe(), **_described("cuda", ceilings), "predicted": ceilings.device}
    return Report(described, [result for result in results if result.roofline])


def _cases(suites: Sequence[str], quick: bool, device: str) -> list[Case]:
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    return [case for name in suites for case in SUITES[name](quick, device)]


def _described(device: str, ceilings: roofline.Ceilings | None) -> dict[str, Any]:
    return {"device": device, "ceilings": ceilings.to_dict() if ceilings else None}


__all__ = [
    "DEFAULT_SUITES",
    "GPU_SUITES",
    "QUICK",
    "SUITES",
    "Effort",
    "Report",
    "Result",
    "SavedBytes",
    "Spread",
    "Timing",
    "available",
    "interleave",
    "predict",
    "run",
    "saved_bytes",
    "torch_threads",
    "wall_clock",
    "without_cases",
]
