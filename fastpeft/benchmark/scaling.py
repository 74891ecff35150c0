"""Suite "scaling": one LoRA linear over M, over r and over N, the other two held: what the scaling plot shows."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fastpeft.benchmark.cases import Effort, Libraries
from fastpeft.benchmark.layer import LayerCase


@dataclass(frozen=True)
class ScalingCase(LayerCase):
    """The layer's forward and backward at one point of one axis."""

    suite: ClassVar[str] = "scaling"
    effort: ClassVar[Effort | None] = Effort(budget_s=1.5, warmup=1, min_rounds=5, max_rounds=100)

    axis: str = field(default="M", kw_only=True)  # the size that varies: "M", "r" or "N"

    @property
    def name(self) -> str:
        return f"{self.axis}={getattr(self, self.axis)}-{self.dtype}-p{self.dropout}"

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        return {}


def scaling_cases(quick: bool, device: str) -> Iterator[ScalingCase]:
    """bf16, no dropout: around (M, K, N, r) = (1024, 1024, 1024, 16), on a GPU around (4096, 4096, 4096, 16)."""
    on_gpu = torch.device(device).type == "cuda"
    size = 4096 if on_gpu else 1024
    centre = ScalingCase(M=size, K=size, N=size, r=16, dtype="bf16", dropout=0.0, device=device)
    axes = {
        "M": (16, 64, 256, 1024, 4096, 16384) if on_gpu else (1, 16, 64, 256, 1024, 4096),
        "r": (4, 8, 16, 32, 64, 128),
        "N": (256, 1024, 4096, 16384) if on_gpu else (64, 256, 1024, 4096),
    }
    for axis, values in axes.items():
        for value in values[1::2] if quick else values:
            sizes: dict[str, Any] = {axis: value}
            yield dataclasses.replace(centre, axis=axis, **sizes)
