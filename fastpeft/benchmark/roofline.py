"""What a device could do at best: seconds = max(bytes / bandwidth, FLOP / rate).

The bytes are budgets, not measurements: what the step must move when nothing is read or written twice. A LoRA linear's
adapters add two passes over x and one over dout to its frozen base, for 16-bit tensors 4MK + 2MN bytes, and 3MK/8 for
the packed dropout mask: drawn once, read in forward, dA and dx. A group that shares x reads it once each way.

Beside this limit stands what our kernels would take at the device's bandwidth: by the bytes that were counted in them
(prediction.py), more than the limit where low-rank parts are C operands of the library's products.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from fastpeft.benchmark import prediction
from fastpeft.benchmark.environment import cpu

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches with nothing else to do.

    Attributes:
        device: its name; a GPU's ceilings are found by it.
        bytes_per_s: read + written, by a copy of large tensors.
        flops_per_s: dense matrix products, by dtype.
        source: how the figures were found.
    """

    device: str
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    source: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Devices with known ceilings; others are measured when a run starts.
KNOWN = (
    Ceilings("H200", 4.3e12, {"bf16": 790e12}, "measured once: copy, dense bf16 product"),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """The least that one step moves and computes: the frozen base, and what the adapters add in passes of their own."""

    dtype: str  # of the base
    base_bytes: float
    base_flops: float
    adapter_bytes: float
    adapter_flops: float
    kernel_bytes: float | None = None  # what our GPU kernels move for the adapters, as counted; None: not counted

    def __add__(self, other: "Work") -> "Work":
        assert self.dtype == other.dtype
        counted = None not in (self.kernel_bytes, other.kernel_bytes)
        return Work(
            self.dtype,
            self.base_bytes + other.base_bytes, self.base_flops + other.base_flops,
            self.adapter_bytes + other.adapter_bytes, self.adapter_flops + other.adapter_flops,
            (self.kernel_bytes or 0.0) + (other.kernel_bytes or 0.0) if counted else None,
        )  # fmt: skip


def lora_work(
    M: int, K: int, widths: Sequence[int], r: int, *, dtype: str, dropout: float, backward: bool = True
) -> Work:
    """LoRA linears that share an input.

    Args:
        M: rows of x.
        K: columns of x.
        widths: out_features N of each linear.
        r: rank of every adapter.
        dtype: of x, the weights and the outputs: a key of ITEMSIZE.
        dropout: above 0, each linear has a packed mask of its own.
        backward: forward and dx, dA, dB; else forward alone.
    """
    size, directions, N, members = ITEMSIZE[dtype], 2 if backward else 1, sum(widths), len(widths)
    mask_bytes = M * K / 8 * (3 if backward else 1) * members if dropout else 0.0
    # Forward reads x; backward reads x for dA and dout for dS and dB.
    adapter_elements = 2 * M * K + M * N if backward else M * K
    return Work(
        dtype,
        base_bytes=size * directions * (members * M * K + M * N + K * N),
        base_flops=directions * 2.0 * M * K * N,
        adapter_bytes=size * adapter_elements + mask_bytes,
        adapter_flops=(6.0 if backward else 2.0) * M * r * (members * K + N),
        kernel_bytes=_kernel_bytes(M, K, widths, r, dropout, backward) if dtype == "bf16" else None,
    )


def _kernel_bytes(M: int, K: int, widths: Sequence[int], r: int, dropout: float, backward: bool) -> float | None:
    try:
        moved = prediction.predict(M, K, widths, r, dropout)
    except ValueError:
        return None  # not among the ranks and groups that were counted
    return float(moved[0].total + (moved[1].total if backward else 0))


def roofline_seconds(bytes: float, flops: float, device: Ceilings, dtype: str = "bf16") -> float:
    """The least time for moving `bytes` and computing `flops` at once. KeyError: no rate is known for the dtype."""
    return max(bytes / device.bytes_per_s, flops / device.flops_per_s[dtype])


def predict(work: Work, device: Ceilings, on_gpu: bool = True) -> dict[str, float] | None:
    """The least seconds of the frozen base, and with adapters; None where the device has no rate for the dtype.

    Where our kernels run and were counted, also their bytes and the seconds that these predict.
    """
    if work.dtype not in device.flops_per_s:
        return None
    base = roofline_seconds(work.base_bytes, work.base_flops, device, work.dtype)
    adapters = roofline_seconds(work.adapter_bytes, work.adapter_flops, device, work.dtype)
    figures = {
        "bytes": work.base_bytes + work.adapter_bytes, "flops": work.base_flops + work.adapter_flops,
        "base_seconds": base, "seconds": base + adapters,
    }  # fmt: skip
    if on_gpu and work.kernel_bytes is not None:
        ours = roofline_seconds(work.kernel_bytes, work.adapter_flops, device, work.dtype)
        figures |= {"kernel_bytes": work.kernel_bytes, "predicted_seconds": base + ours}
    return figures


def known(name: str) -> Ceilings | None:
    """The ceilings of a device whose name contains one that is known, in either case of letters."""
    return next((ceilings for ceilings in KNOWN if ceilings.device.lower() in name.lower()), None)


def ceilings_of(device: str) -> Ceilings:
    """The ceilings of "cpu" or "cuda": known ones, or measured now, in well under a second on most machines."""
    if torch.device(device).type != "cuda":
        return _measured(device, cpu()["model"], copied=2**26, size=768, dtypes=("fp32", "bf16"))
    name = torch.cuda.get_device_name(device)
    return known(name) or _measured(device, name, copied=2**30, size=8192, dtypes=("bf16", "fp16"))


def _measured(device: str, name: str, *, copied: int, size: int, dtypes: Sequence[str]) -> Ceilings:
    """Best of a few runs of a copy of `copied` bytes and of size x size products."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    seconds = _best(partial(torch.empty_like(source).copy_, source), device)
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(_TORCH_DTYPES[dtype]) for _ in range(2))
        rates[dtype] = 2.0 * size**3 / _best(partial(torch.mm, a, b), device)
    what = f"measured at the start: copy of {copied >> 20} MiB, product of {size} x {size}"
    return Ceilings(name, 2.0 * copied / seconds, rates, what)


def _best(step: Callable[[], object], device: str, runs: int = 5) -> float:
    def finish() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(runs + 1):  # the first run warms up; a minimum forgets it
        finish()
        start = time.perf_counter()
        step()
        finish()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
