"""Suite "host": one token without gradients, where Python and dispatch cost as much as the products do."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastpeft.benchmark.cases import Case, Effort, Libraries
from fastpeft.benchmark.layer import LayerCase
from fastpeft.benchmark.libraries import FROZEN
from fastpeft.benchmark.model import ModelCase
from fastpeft.benchmark.timing import Clock, Step, wall_clock


class _HostClock(Case):
    """Seconds of the host: on a GPU until everything that was queued is done."""

    def clock(self) -> Clock:
        return _until_done if torch.device(self.device).type == "cuda" else wall_clock


def _until_done(step: Step) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class HostLayerCase(_HostClock, LayerCase):
    """One adapted linear, one row, as wide as the small Llama; the time is that of one call out of many."""

    suite: ClassVar[str] = "host"
    repeats: ClassVar[int] = 100
    effort: ClassVar[Effort | None] = Effort(budget_s=1.0, warmup=2, min_rounds=20, max_rounds=200)

    @property
    def name(self) -> str:
        return f"linear-{self.dtype}"

    def work(self) -> None:
        return None

    def steps(self, found: Libraries) -> dict[str, Step]:
        x = self.batch()[0].detach()
        layers = {FROZEN: self.base(), **self.layers(found)}

        def step_of(layer: torch.nn.Module) -> Step:
            @torch.no_grad()
            def step() -> None:
                for _ in range(self.repeats):
                    layer(x)

            return step

        return {name: step_of(layer.eval()) for name, layer in layers.items()}

    def facts(self, found: Libraries) -> dict[str, dict[str, float]]:
        return {}


@dataclass(frozen=True)
class HostModelCase(_HostClock, ModelCase):
    """The small Llama with every linear adapted, one token in, logits out."""

    suite: ClassVar[str] = "host"

    @property
    def name(self) -> str:
        return f"model-{self.dtype}"

    def steps(self, found: Libraries) -> dict[str, Step]:
        ids = self.tokens_of_batch()
        models = {FROZEN: self.base(), **{name: self.model(library) for name, library in found.items()}}

        def step_of(model: torch.nn.Module) -> Step:
            return torch.no_grad()(lambda: model(input_ids=ids))

        return {name: step_of(model.eval()) for name, model in models.items()}

    def facts(self, found: Libraries) -> dict[str, dict[str, float]]:
        return {}


def host_cases(quick: bool, device: str) -> Iterator[Case]:
    for dtype in ("bf16",) if quick else ("fp32", "bf16"):
        yield HostLayerCase(M=1, K=512, N=512, dtype=dtype, dropout=0.0, device=device)
        yield HostModelCase(dtype=dtype, dropout=0.0, batch=1, tokens=1, device=device)
