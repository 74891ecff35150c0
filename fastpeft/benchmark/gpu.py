"""Suites for a large GPU: the tables that our speed targets are stated in. In tiny shapes they run on a CPU too.

"fused-linear" follows the protocol of LoRAFusion: square bf16 linears, r = alpha = 16, dropout 0.1, CUDA graphs
replayed 200 times to warm up and 200 times for the median. "llama-layer" times the linears of one Llama-3-8B decoder
layer at 8192 tokens; "llama-saved" counts what they keep for backward.
"""

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.benchmark.cases import Case, Effort, Libraries
from fastpeft.benchmark.libraries import FROZEN, OURS, REFERENCE, frozen_linear, lora_layer, lora_model
from fastpeft.benchmark.memory import cuda_kept_bytes, saved_bytes
from fastpeft.benchmark.roofline import Work, lora_work
from fastpeft.benchmark.timing import Step, graph_replay

BF16 = torch.bfloat16
PLAIN = "torch"  # LoRA as five lines of torch
LLAMA_LAYERS = 32


class PlainLora(nn.Module):
    """LoRA on a frozen linear as one writes it in plain torch, everything in the base's dtype."""

    def __init__(self, base: nn.Linear, r: int, scaling: float, dropout: float) -> None:
        super().__init__()
        N, K = base.weight.shape
        self.base, self.scaling, self.dropout = base, scaling, dropout
        A, B = torch.randn(r, K) * K**-0.5, torch.randn(N, r) * r**-0.5
        self.A, self.B = nn.Parameter(A.to(base.weight)), nn.Parameter(B.to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A)
        out: Tensor = self.base(x)
        return out + F.linear(low, self.B) * self.scaling


@dataclass(frozen=True)
class FusedLinearCase(Case):
    """One square linear, forward or forward and backward, replayed as a CUDA graph."""

    suite: ClassVar[str] = "fused-linear"
    baselines: ClassVar[tuple[str, ...]] = (PLAIN, REFERENCE)
    effort: ClassVar[Effort | None] = Effort(warmup=200, min_rounds=200, max_rounds=200)

    size: int
    M: int
    backward: bool
    r: int = 16
    dropout: float = 0.1

    @property
    def name(self) -> str:
        return f"{'fwd+bwd' if self.backward else 'fwd'}-{self.size}-M{self.M}"

    def base(self) -> nn.Linear:
        return frozen_linear(self.size, self.size, BF16, self.device)

    def work(self) -> Work | None:
        return lora_work(
            self.M, self.size, [self.size], self.r, dtype="bf16", dropout=self.dropout, backward=self.backward
        )

    def contenders(self, found: Libraries) -> dict[str, Any]:
        scaling = 1.0  # alpha = r
        contenders = {FROZEN: self.base(), PLAIN: PlainLora(self.base(), self.r, scaling, self.dropout)}
        for name, library in found.items():
            contenders[name] = self._layer(library, fp32_adapters=False)
        if OURS in found:
            contenders[f"{OURS}-fp32-adapters"] = self._layer(found[OURS], fp32_adapters=True)
        return contenders

    def _layer(self, library: ModuleType, fp32_adapters: bool) -> Any:
        return lora_layer(
            library, self.base(), r=self.r, alpha=self.r, dropout=self.dropout, fp32_adapters=fp32_adapters
        )

    def steps(self, found: Libraries) -> dict[str, Step]:
        """A contender that cannot be captured is timed without a graph, and says so in its name."""
        steps: dict[str, Step] = {}
        for name, contender in self.contenders(found).items():
            step = self._step(contender)
            try:
                steps[name] = graph_replay(step, self.device)
            except RuntimeError:
                steps[f"{name}-no-graph"] = step
        return steps

    def _step(self, module: nn.Module) -> Step:
        x = torch.randn(self.M, self.size, device=self.device, dtype=BF16, requires_grad=True)
        dout = torch.randn(self.M, self.size, device=self.device, dtype=BF16)
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

        def step() -> None:
            out = module(x)
            if self.backward:
                torch.autograd.grad(out, wanted, dout)

        return step


class _Attention(nn.Module):
    def __init__(self, hidden: int, kv: int, device: str) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (frozen_linear(hidden, hidden, BF16, device, seed) for seed in (0, 1))
        self.k_proj, self.v_proj = (frozen_linear(hidden, kv, BF16, device, seed) for seed in (2, 3))

    def forward(self, x: Tensor, mixed: Tensor | None) -> list[Tensor]:
        out = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        return out if mixed is None else [*out, self.o_proj(mixed)]


class _Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int, device: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (frozen_linear(hidden, intermediate, BF16, device, seed) for seed in (4, 5))
        self.down_proj = frozen_linear(intermediate, hidden, BF16, device, 6)

    def forward(self, x: Tensor, gated: Tensor | None) -> list[Tensor]:
        out = [self.gate_proj(x), self.up_proj(x)]
        return out if gated is None else [*out, self.down_proj(gated)]


class DecoderLinears(nn.Module):
    """The seven linears of a Llama decoder layer, under their usual names and parents, without what lies between."""

    def __init__(self, hidden: int, kv: int, intermediate: int, device: str) -> None:
        super().__init__()
        self.self_attn = _Attention(hidden, kv, device)
        self.mlp = _Mlp(hidden, intermediate, device)

    def forward(
        self, x: Tensor | None, mixed: Tensor | None, normed: Tensor | None, gated: Tensor | None
    ) -> list[Tensor]:
        """q, k, v of x, o of mixed, gate and up of normed, down of gated; None leaves its part out."""
        attention = [] if x is None else self.self_attn(x, mixed)
        return attention if normed is None else [*attention, *self.mlp(normed, gated)]


@dataclass(frozen=True)
class LlamaLayerCase(Case):
    """Forward and backward of q/k/v, of gate/up, or of all linears of a layer.

    The base is bf16, the adapters fp32, and every input wants its gradient.
    """

    suite: ClassVar[str] = "llama-layer"
    baselines: ClassVar[tuple[str, ...]] = (REFERENCE, f"{REFERENCE}-autocast")

    group: str  # "qkv", "gate-up" or "all"
    M: int = 8192
    hidden: int = 4096
    kv: int = 1024
    intermediate: int = 14336
    r: int = 16
    dropout: float = 0.1

    @property
    def name(self) -> str:
        return f"{self.group}-p{self.dropout}-M{self.M}"

    def work(self) -> Work | None:
        """q, k, v share one input and gate, up another."""
        qkv = (self.hidden, (self.hidden, self.kv, self.kv))
        gate_up = (self.hidden, (self.intermediate, self.intermediate))
        rest = ((self.hidden, (self.hidden,)), (self.intermediate, (self.hidden,)))
        inputs = {"qkv": (qkv,), "gate-up": (gate_up,), "all": (qkv, gate_up, *rest)}[self.group]
        works = [lora_work(self.M, K, widths, self.r, dtype="bf16", dropout=self.dropout) for K, widths in inputs]
        return reduce(operator.add, works)

    def linears(self) -> DecoderLinears:
        return DecoderLinears(self.hidden, self.kv, self.intermediate, self.device)

    def inputs(self) -> list[Tensor | None]:
        widths = (self.hidden, self.hidden, self.hidden, self.intermediate)
        used = {"qkv": (0,), "gate-up": (2,), "all": (0, 1, 2, 3)}[self.group]
        return [self._batch(width) if place in used else None for place, width in enumerate(widths)]

    def _batch(self, width: int) -> Tensor:
        return torch.randn(self.M, width, device=self.device, dtype=BF16, requires_grad=True)

    def contenders(self, found: Libraries) -> dict[str, tuple[nn.Module, bool]]:
        """Name -> (module, whether it runs under autocast)."""
        contenders: dict[str, tuple[nn.Module, bool]] = {FROZEN: (self.linears(), False)}
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        for name, library in found.items():
            wrapped: Any = lora_model(library, self.linears(), r=self.r, dropout=self.dropout, targets=targets)
            contenders[name] = (wrapped.base_model.model, False)
            contenders[f"{name}-autocast"] = (wrapped.base_model.model, True)
        return contenders

    def steps(self, found: Libraries) -> dict[str, Step]:
        inputs = self.inputs()
        return {
            name: self._step(module, inputs, autocast) for name, (module, autocast) in self.contenders(found).items()
        }

    def _forward(self, module: nn.Module, inputs: list[Tensor | None], autocast: bool) -> list[Tensor]:
        context = torch.autocast(torch.device(self.device).type, BF16) if autocast else contextlib.nullcontext()
        with context:
            out: list[Tensor] = module(*inputs)
        return out

    def _step(self, module: nn.Module, inputs: list[Tensor | None], autocast: bool) -> Step:
        douts = [torch.randn_like(out) for out in self._forward(module, inputs, autocast)]
        given = [x for x in inputs if x is not None]

        def step() -> None:
            for tensor in (*given, *module.parameters()):
                tensor.grad = None
            torch.autograd.backward(self._forward(module, inputs, autocast), douts)

        return step


@dataclass(frozen=True)
class LlamaSavedCase(LlamaLayerCase):
    """What those linears keep for backward: bytes of one layer, and of the 32 that the model has."""

    suite: ClassVar[str] = "llama-saved"

    def work(self) -> None:
        return None

    def steps(self, found: Libraries) -> dict[str, Step]:
        return {}

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        inputs = self.inputs()
        given = [x for x in inputs if x is not None]
        facts: dict[str, dict[str, Any]] = {}
        for name, (module, autocast) in self.contenders(found).items():
            forward = partial(self._forward, module, inputs, autocast)
            saved = saved_bytes(forward, inputs=given, parameters=module.parameters())
            total = saved.own + saved.by_reference
            facts[name] = {"saved": {**saved.to_dict(), "gb_of_the_model": total * LLAMA_LAYERS / 1e9}}
            if torch.device(self.device).type == "cuda":
                facts[name]["allocator"] = {"own": cuda_kept_bytes(forward)}
        return facts


def fused_linear_cases(quick: bool, device: str) -> Iterator[FusedLinearCase]:
    """The protocol's widths, with M in steps of 2048 (of 4096 when quick); `fused_linear_table` has steps of 256."""
    for size in (4096,) if quick else (4096, 5120, 8192):
        yield from _square(size, range(4096, 8193, 4096) if quick else range(2048, 8193, 2048), device)


def fused_linear_table(quick: bool, device: str) -> Iterator[FusedLinearCase]:
    """The whole table of the protocol."""
    del quick
    for size in (4096, 5120, 8192):
        yield from _square(size, range(2048, 8193, 256), device)


def _square(size: int, rows: range, device: str) -> Iterator[FusedLinearCase]:
    for backward in (False, True):
        for M in rows:
            yield FusedLinearCase(size=size, M=M, backward=backward, device=device)


def llama_layer_cases(quick: bool, device: str) -> Iterator[LlamaLayerCase]:
    for dropout in (0.1,) if quick else (0.1, 0.0):
        for group in ("qkv", "gate-up", "all"):
            yield LlamaLayerCase(group, dropout=dropout, device=device)


def llama_saved_cases(quick: bool, device: str) -> Iterator[LlamaSavedCase]:
    for dropout in (0.1,) if quick else (0.1, 0.0):
        yield LlamaSavedCase("all", dropout=dropout, device=device)
