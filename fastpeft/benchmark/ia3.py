"""Suite "ia3": one linear layer with an IA3 vector on its input or its output, forward and backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.benchmark.cases import DTYPES, Case, Libraries
from fastpeft.benchmark.libraries import FROZEN, frozen_linear
from fastpeft.benchmark.memory import saved_bytes
from fastpeft.benchmark.timing import Step


@dataclass(frozen=True)
class IA3Case(Case):
    """Forward and backward of one IA3 linear: frozen (N, K) base in `dtype`, fp32 vector, x wants its gradient."""

    suite: ClassVar[str] = "ia3"

    M: int
    dtype: str
    feedforward: bool
    K: int
    N: int = 1024

    @property
    def name(self) -> str:
        return f"{'input' if self.feedforward else 'output'}-{self.dtype}-M{self.M}"

    def layers(self, found: Libraries) -> dict[str, Any]:
        """One layer for each library, all with the same weights, and the base alone."""
        return {FROZEN: self.base()} | {name: self.layer(library) for name, library in found.items()}

    def base(self) -> nn.Linear:
        return frozen_linear(self.K, self.N, DTYPES[self.dtype], self.device)

    def layer(self, library: ModuleType) -> Any:
        """The base in the library's IA3 layer, made by `get_peft_model`. Its vector is normal around one."""
        model = nn.Sequential()
        model.add_module("linear", self.base())
        config = library.IA3Config(
            target_modules=["linear"], feedforward_modules=["linear"] if self.feedforward else []
        )
        layer: Any = library.get_peft_model(model, config).train().base_model.model.linear
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for vector in layer.ia3_l.values():
                vector.add_(0.1 * torch.randn(vector.shape, generator=generator).to(vector.device))
        return layer

    def batch(self) -> tuple[Tensor, Tensor]:
        """x: (M, K) with gradient, dout: (M, N), both in the base's dtype."""
        generator = torch.Generator().manual_seed(1)
        dtype = DTYPES[self.dtype]
        x, dout = (torch.randn(self.M, size, generator=generator) for size in (self.K, self.N))
        return x.to(self.device, dtype).requires_grad_(), dout.to(self.device, dtype)

    def steps(self, found: Libraries) -> dict[str, Step]:
        return {name: self._step(layer) for name, layer in self.layers(found).items()}

    def _step(self, layer: nn.Module) -> Step:
        x, dout = self.batch()
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def step() -> None:
            for tensor in wanted:
                tensor.grad = None
            layer(x).backward(dout)

        return step

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        layers = self.layers(found)
        facts: dict[str, dict[str, Any]] = {name: {"saved": self._saved(layer)} for name, layer in layers.items()}
        for name in found:
            facts[name]["gradient_error"] = {"ia3_l": self._error(layers[name])}
        return facts

    def _saved(self, layer: nn.Module) -> dict[str, int]:
        x, _ = self.batch()
        return saved_bytes(lambda: layer(x), inputs=[x], parameters=layer.parameters()).to_dict()

    def _error(self, layer: Any) -> float:
        """Relative error, in the Frobenius norm, of the vector's gradient against float64."""
        x, dout = self.batch()
        layer(x).backward(dout)
        (vector,) = layer.ia3_l.values()
        W, x64, dout64 = layer.get_base_layer().weight.double(), x.detach().double(), dout.double()
        exact = ((dout64 @ W) * x64 if self.feedforward else dout64 * (x64 @ W.T)).sum(0).view(vector.shape)
        assert vector.grad is not None, "no gradient reached ia3_l"
        return float((vector.grad.double() - exact).norm() / exact.norm())


def ia3_cases(quick: bool, device: str) -> Iterator[IA3Case]:
    """The input of a feed-forward block's last layer, K = 4 N as in T5 and BERT; the output of a square one."""
    for feedforward in (True, False):
        for dtype in ("bf16",) if quick else ("fp32", "bf16"):
            for M in (512,) if quick else (512, 4096):
                yield IA3Case(M=M, dtype=dtype, feedforward=feedforward, K=4096 if feedforward else 1024, device=device)
