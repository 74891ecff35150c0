"""Suite "groups": linears that are called on the same x under one parent, q/k/v and gate/up, forward and backward."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.benchmark.cases import DTYPES, Case, Libraries
from fastpeft.benchmark.libraries import FROZEN, frozen_linear, lora_model
from fastpeft.benchmark.roofline import Work, lora_work
from fastpeft.benchmark.timing import Step


class Siblings(nn.Module):
    """Frozen linears over one input, as the attention or the MLP of a decoder layer holds them."""

    def __init__(self, K: int, widths: Mapping[str, int], dtype: torch.dtype, device: str) -> None:
        super().__init__()
        for seed, (name, N) in enumerate(widths.items()):
            self.add_module(name, frozen_linear(K, N, dtype, device, seed))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.children()]


@dataclass(frozen=True)
class GroupCase(Case):
    """Base in `dtype`, adapters in fp32 on every member, x wants its gradient: the sum over the members."""

    suite: ClassVar[str] = "groups"

    group: str  # "qkv" or "gate-up"
    M: int
    dtype: str
    dropout: float
    hidden: int = 1024
    kv: int = 256
    intermediate: int = 2816
    r: int = 16

    @property
    def name(self) -> str:
        return f"{self.group}-{self.dtype}-p{self.dropout}-M{self.M}"

    @property
    def widths(self) -> dict[str, int]:
        if self.group == "qkv":
            return {"q_proj": self.hidden, "k_proj": self.kv, "v_proj": self.kv}
        return {"gate_proj": self.intermediate, "up_proj": self.intermediate}

    def work(self) -> Work | None:
        widths = list(self.widths.values())
        return lora_work(self.M, self.hidden, widths, self.r, dtype=self.dtype, dropout=self.dropout)

    def siblings(self) -> nn.Sequential:
        return nn.Sequential(Siblings(self.hidden, self.widths, DTYPES[self.dtype], self.device))

    def modules(self, found: Libraries) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {FROZEN: self.siblings()}
        for name, library in found.items():
            wrapped: Any = lora_model(
                library, self.siblings(), r=self.r, dropout=self.dropout, targets=list(self.widths)
            )
            modules[name] = wrapped.base_model.model
        return modules

    def batch(self) -> tuple[Tensor, list[Tensor]]:
        """x: (M, K) with gradient, and a gradient (M, N) for each output, in the base's dtype."""
        generator = torch.Generator().manual_seed(1)
        sizes = [self.hidden, *self.widths.values()]
        x, *douts = (torch.randn(self.M, size, generator=generator) for size in sizes)
        placed = [tensor.to(self.device, DTYPES[self.dtype]) for tensor in douts]
        return x.to(self.device, DTYPES[self.dtype]).requires_grad_(), placed

    def steps(self, found: Libraries) -> dict[str, Step]:
        return {name: self._step(module) for name, module in self.modules(found).items()}

    def _step(self, module: nn.Module) -> Step:
        x, douts = self.batch()
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

        def step() -> None:
            for tensor in wanted:
                tensor.grad = None
            torch.autograd.backward(module(x), douts)

        return step


def group_cases(quick: bool, device: str) -> Iterator[GroupCase]:
    """On a GPU in the shapes of Llama-3-8B, with few rows: "llama-layer" has the many."""
    on_gpu = torch.device(device).type == "cuda"
    sizes = {"hidden": 4096, "kv": 1024, "intermediate": 14336} if on_gpu else {}
    for group in ("qkv", "gate-up"):
        for dtype in ("bf16",) if quick or on_gpu else ("fp32", "bf16"):
            for dropout in (0.0,) if quick else (0.0, 0.1):
                yield GroupCase(group, 512 if quick else 2048, dtype, dropout, device=device, **sizes)
