"""Suite "compiled-model": the small Llama's training step, eager and under torch.compile, ours and reference PEFT's.

`first_step` is what each waits for before its first step is done: compilation, with no cache on disk to help.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastpeft.benchmark.cases import Effort, Libraries
from fastpeft.benchmark.libraries import FROZEN, REFERENCE
from fastpeft.benchmark.model import LlamaSize, ModelCase
from fastpeft.benchmark.timing import Step


@dataclass(frozen=True)
class CompiledModelCase(ModelCase):
    """Four contenders in one run: either library, eager and compiled as a whole."""

    suite: ClassVar[str] = "compiled-model"
    baselines: ClassVar[tuple[str, ...]] = (REFERENCE, f"{REFERENCE}-compiled")
    effort: ClassVar[Effort | None] = Effort(budget_s=12.0, warmup=2, min_rounds=7, max_rounds=100)
    reserve_s: ClassVar[float] = 150.0  # two compilations
    keeps_first_step: ClassVar[bool] = True

    backend: str = "inductor"

    @property
    def name(self) -> str:
        return f"{super().name}-{self.size.layers}-layers"

    def steps(self, found: Libraries) -> dict[str, Step]:
        steps = {FROZEN: self._step(self.frozen())}
        for name, library in found.items():
            steps[name] = self._step(self.model(library))
            compiled: Any = torch.compile(self.model(library), backend=self.backend, dynamic=False)
            steps[f"{name}-compiled"] = self._step(compiled)
        return steps

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        return {}

    def surroundings(self) -> AbstractContextManager[object]:
        return _cold_compiler(self.backend)


@contextmanager
def _cold_compiler(backend: str) -> Iterator[None]:
    """No graph and no file of earlier compilations; what the compiler itself does once is done, at nobody's cost."""
    with ExitStack() as stack:
        if backend == "inductor":
            from torch._inductor.utils import fresh_cache

            stack.enter_context(fresh_cache())
        torch.compiler.reset()
        stack.callback(torch.compiler.reset)
        loss = torch.compile(_two_ops, backend=backend)(torch.ones(8, 8, requires_grad=True))
        loss.backward()  # type: ignore[no-untyped-call]
        yield


def _two_ops(x: torch.Tensor) -> torch.Tensor:
    return (x @ x).sin().sum()


def compiled_model_cases(quick: bool, device: str) -> Iterator[CompiledModelCase]:
    size = LlamaSize(layers=2) if quick else LlamaSize()
    for dtype in ("bf16",) if quick or torch.device(device).type == "cuda" else ("bf16", "fp32"):
        yield CompiledModelCase(dtype=dtype, dropout=0.0, size=size, device=device)
