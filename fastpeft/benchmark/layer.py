"""Suites "layer" and "saved": one LoRA linear, forward and backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.benchmark.cases import DTYPES, Case, Libraries
from fastpeft.benchmark.libraries import FROZEN, adapter_weights, frozen_linear, lora_layer
from fastpeft.benchmark.memory import saved_bytes
from fastpeft.benchmark.roofline import Work, lora_work
from fastpeft.benchmark.timing import Step


@dataclass(frozen=True)
class LayerCase(Case):
    """Forward and backward of one LoRA linear: frozen (N, K) base in `dtype`, fp32 adapters, x wants its gradient."""

    suite: ClassVar[str] = "layer"

    M: int
    dtype: str
    dropout: float
    K: int = 1024
    N: int = 1024
    r: int = 16

    @property
    def name(self) -> str:
        return f"{self.dtype}-p{self.dropout}-M{self.M}"

    def layers(self, found: Libraries) -> dict[str, Any]:
        """One layer for each library, all with the same weights."""
        return {
            name: lora_layer(library, self.base(), r=self.r, dropout=self.dropout) for name, library in found.items()
        }

    def base(self) -> nn.Linear:
        return frozen_linear(self.K, self.N, DTYPES[self.dtype], self.device)

    def work(self) -> Work | None:
        return lora_work(self.M, self.K, [self.N], self.r, dtype=self.dtype, dropout=self.dropout)

    def batch(self) -> tuple[Tensor, Tensor]:
        """x: (M, K) with gradient, dout: (M, N), both in the base's dtype."""
        generator = torch.Generator().manual_seed(1)
        dtype = DTYPES[self.dtype]
        x, dout = (torch.randn(self.M, size, generator=generator) for size in (self.K, self.N))
        return x.to(self.device, dtype).requires_grad_(), dout.to(self.device, dtype)

    def steps(self, found: Libraries) -> dict[str, Step]:
        layers = {FROZEN: self.base(), **self.layers(found)}
        return {name: self._step(layer) for name, layer in layers.items()}

    def _step(self, layer: Any) -> Step:
        x, dout = self.batch()
        wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

        def step() -> None:
            for tensor in wanted:
                tensor.grad = None
            layer(x).backward(dout)

        return step

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        if self.dropout:
            return {}  # the exact gradient would need each contender's mask
        return {name: {"gradient_error": self._errors(layer)} for name, layer in self.layers(found).items()}

    def _errors(self, layer: Any) -> dict[str, float]:
        """Relative error, in the Frobenius norm, of the adapter's gradients against float64."""
        x, dout = self.batch()
        layer(x).backward(dout)
        weights = adapter_weights(layer)
        A, B = (weights[kind].detach().double() for kind in ("lora_A", "lora_B"))
        scaling = next(iter(layer.scaling.values()))
        x64, dout64 = x.detach().double(), dout.double()
        exact = {"lora_A": scaling * (dout64 @ B).T @ x64, "lora_B": scaling * dout64.T @ (x64 @ A.T)}
        error = {}
        for kind, gradient in exact.items():
            found = weights[kind].grad
            assert found is not None, f"no gradient reached {kind}"
            error[kind] = float((found.double() - gradient).norm() / gradient.norm())
        return error


@dataclass(frozen=True)
class SavedCase(LayerCase):
    """What the same layer keeps for its backward."""

    suite: ClassVar[str] = "saved"

    def work(self) -> None:
        return None

    def steps(self, found: Libraries) -> dict[str, Step]:
        return {}

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        return {name: {"saved": self._saved(layer)} for name, layer in self.layers(found).items()}

    def _saved(self, layer: Any) -> dict[str, Any]:
        x, _ = self.batch()
        saved = saved_bytes(lambda: layer(x), inputs=[x], parameters=layer.parameters())
        return {**saved.to_dict(), "own_per_input_element": saved.own / x.numel()}


def layer_cases(quick: bool, device: str) -> Iterator[LayerCase]:
    for dtype in ("bf16",) if quick else ("fp32", "bf16"):
        for dropout in (0.0, 0.1):
            for M in (512,) if quick else (512, 4096):
                yield LayerCase(M=M, dtype=dtype, dropout=dropout, device=device)


def saved_cases(quick: bool, device: str) -> Iterator[SavedCase]:
    for dtype in ("bf16",) if quick else ("fp32", "bf16"):
        for dropout in (0.0, 0.1):
            yield SavedCase(M=512, dtype=dtype, dropout=dropout, device=device)
