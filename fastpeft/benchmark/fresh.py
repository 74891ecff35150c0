"""Suites "first-step" and "peak": a training step of the small Llama in a process of its own for each contender.

The child is this module: `python -m fastpeft.benchmark.fresh '{"job": ..., "contender": ..., "case": {...}}'` prints
one line of JSON.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.benchmark.cases import Libraries
from fastpeft.benchmark.libraries import FROZEN
from fastpeft.benchmark.model import LlamaSize, ModelCase
from fastpeft.benchmark.timing import Step, clock_for, torch_threads

CHILD_SECONDS = 240
LATER_STEPS = 5


@dataclass(frozen=True)
class FirstStepCase(ModelCase):
    """Seconds of the first training step of a process, and how much longer it takes than those that follow.

    No compiled kernel is on disk; what is imported and built before the step does not count.
    """

    suite: ClassVar[str] = "first-step"
    reserve_s: ClassVar[float] = 60.0

    def steps(self, found: Libraries) -> dict[str, Step]:
        return {}

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        return {name: run_child("first_step", name, self) for name in (FROZEN, *found)}


@dataclass(frozen=True)
class PeakCase(FirstStepCase):
    """The most bytes that a training step holds at once beyond what it found.

    On a CPU every allocation of torch's allocator during the step is followed; scratch memory that a library takes from
    the system by itself is not seen. On a GPU it is the caching allocator's own maximum.
    """

    suite: ClassVar[str] = "peak"

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        if torch.device(self.device).type != "cuda":  # torch's profiler writes to a terminal that it does not own
            return {name: run_child("peak", name, self) for name in (FROZEN, *found)}
        return {name: _peak(self, self._step(_model(self, name))) for name in (FROZEN, *found)}


def run_child(job: str, contender: str, case: ModelCase) -> dict[str, Any]:
    """The facts that a fresh process prints. RuntimeError with its last line where it fails."""
    order = {"job": job, "contender": contender, "case": asdict(case), "threads": torch.get_num_threads()}
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", "fastpeft.benchmark.fresh", json.dumps(order)]
    with tempfile.TemporaryDirectory() as empty:  # kernels are compiled as on the day of installation
        environment = {**os.environ, "PYTHONPATH": paths, "KINETO_LOG_LEVEL": "99", "TRITON_CACHE_DIR": empty}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{contender} in a process of its own: {lines[-1]}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _child(order: dict[str, Any]) -> dict[str, Any]:
    fields = {**order["case"], "size": LlamaSize(**order["case"]["size"])}
    case = FirstStepCase(**fields)
    with torch_threads(order["threads"]):
        model = _model(case, order["contender"])
        return {"first_step": _first_step, "peak": _peak}[order["job"]](case, case._step(model))


def _model(case: ModelCase, contender: str) -> nn.Module:
    return case.frozen() if contender == FROZEN else case.model(importlib.import_module(contender))


def _first_step(case: ModelCase, step: Step) -> dict[str, Any]:
    clock = clock_for(case.device)
    first = clock(step)
    later = sorted(clock(step) for _ in range(LATER_STEPS))[LATER_STEPS // 2]
    return {"first_step": {"seconds": first, "later_seconds": later, "warm_up_seconds": first - later}}


def _peak(case: ModelCase, step: Step) -> dict[str, Any]:
    step()  # the optimizer's state and every cache are there before the step that is followed
    gc.collect()
    if torch.device(case.device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return {"peak": {"bytes": torch.cuda.max_memory_allocated() - before}}
    return {"peak": {"bytes": cpu_peak_bytes(step)}}


def cpu_peak_bytes(step: Step) -> int:
    """The highest sum of live allocations that torch's CPU allocator reports to its profiler while `step` runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event["args"]["Ev Idx"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def first_step_cases(quick: bool, device: str) -> Iterator[FirstStepCase]:
    """On a GPU in bf16 alone: each case is three processes, and the time there is short."""
    for dtype in ("bf16",) if quick or torch.device(device).type == "cuda" else ("bf16", "fp32"):
        yield FirstStepCase(dtype=dtype, dropout=0.0, size=_size(quick), device=device)


def peak_cases(quick: bool, device: str) -> Iterator[PeakCase]:
    for dtype in ("bf16",) if quick else ("bf16", "fp32"):
        for dropout in (0.0,) if quick else (0.0, 0.1):
            yield PeakCase(dtype=dtype, dropout=dropout, size=_size(quick), device=device)


def _size(quick: bool) -> LlamaSize:
    return LlamaSize(layers=2) if quick else LlamaSize()


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
