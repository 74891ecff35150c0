"""Made-up reports of `fastpeft bench`, as a run would write them."""

import copy
from typing import Any


def spread(median: float, width: float = 0.02) -> dict[str, float]:
    """A spread whose quartiles lie `width` (as a share) below and above the median."""
    return {"median": median, "q1": median * (1 - width), "q3": median * (1 + width), "min": median * (1 - 2 * width)}


def timed(
    suite: str, case: str, *, ours: float, peft: float, frozen: float, width: float = 0.02, **params: Any
) -> dict:
    """A case with three contenders and their times in seconds; its limit is 0.8 of the frozen base's time."""
    seconds = {"frozen": frozen, "fastpeft": ours, "peft": peft}
    return {
        "suite": suite, "case": case, "params": {"device": "cpu", **params}, "error": None,
        "contenders": {name: {"seconds": spread(value, width), "rounds": 9} for name, value in seconds.items()},
        "speedup": {"peft": {"fastpeft": spread(peft / ours, width)}},
        "floor": {name: spread(seconds[name] / frozen, width) for name in ("fastpeft", "peft")},
        "roofline": {"bytes": 1e9, "flops": 1e11, "base_seconds": 0.8 * frozen, "seconds": 0.9 * frozen},
    }  # fmt: skip


def counted(suite: str, case: str, *, ours: int, peft: int, key: str = "saved", part: str = "own") -> dict[str, Any]:
    contenders = {"fastpeft": {key: {part: ours}}, "peft": {key: {part: peft}}}
    return {
        "suite": suite, "case": case, "params": {"device": "cpu"}, "error": None,
        "contenders": contenders, "speedup": {}, "floor": {}, "roofline": None,
    }  # fmt: skip


def report(*results: dict[str, Any], cpu: str = "Some CPU", gpu: str | None = None) -> dict[str, Any]:
    """A record of schema 2. Changing what it returns changes nothing else."""
    return {
        "schema": 2,
        "environment": {
            "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab", "python": "3.12.1", "system": "Linux x86_64",
            "versions": {"fastpeft": "0.1.0", "torch": "2.13.0", "peft": "0.21.0", "triton": None},
            "cpu": {"model": cpu, "cores": 2, "flags": ["avx2"], "bf16_matrix": False}, "threads": 1,
            "gpu": {"model": gpu} if gpu else None, "device": "cuda" if gpu else "cpu",
            "ceilings": {"device": gpu or cpu, "bytes_per_s": 3e10, "flops_per_s": {"bf16": 2e11, "fp32": 1e11},
                         "source": "measured at the start"},
        },
        "results": copy.deepcopy(list(results)),
    }  # fmt: skip


def full_report(**options: Any) -> dict[str, Any]:
    """Something of everything that is drawn."""
    layers = [timed("layer", f"bf16-p0.0-M{M}", ours=1e-5 * M, peft=1.3e-5 * M, frozen=0.8e-5 * M) for M in (512, 4096)]
    sizes = {"M": 1024, "K": 1024, "N": 1024, "r": 16, "dtype": "bf16", "dropout": 0.0}
    scaling = []
    for axis, values in {"M": (64, 1024, 4096), "r": (4, 16, 64), "N": (256, 1024)}.items():
        for value in values:
            params = {**sizes, "axis": axis, axis: value}
            work = params["M"] * params["N"] * 1e-9
            scaling.append(timed("scaling", f"{axis}={value}", ours=1.2 * work, peft=1.6 * work, frozen=work, **params))
    saved = counted("saved", "bf16-p0.0-M512", ours=32768, peft=2129920)
    peak = counted("peak", "bf16-p0.0", ours=800, peft=1000, key="peak", part="bytes")
    return report(*layers, *scaling, saved, peak, **options)
