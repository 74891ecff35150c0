"""Suite "peers": the published kernels of Liger and of Unsloth, where they are installed and a GPU is there.

Liger replaces RMSNorm, SwiGLU and the loss of a model, not its LoRA layers: it is measured under reference PEFT and
under us. Unsloth's LoRA functions are measured on q/k/v, without dropout, which they do not know. Importing Unsloth
changes transformers for the whole process: it is imported when its case runs, and its case is the last one.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.benchmark.cases import Case, Libraries
from fastpeft.benchmark.groups import GroupCase
from fastpeft.benchmark.libraries import FROZEN, REFERENCE
from fastpeft.benchmark.model import LlamaSize, ModelCase
from fastpeft.benchmark.timing import Step


@dataclass(frozen=True)
class LigerCase(ModelCase):
    """The training step with and without Liger's kernels in the base, under either library."""

    suite: ClassVar[str] = "peers"
    baselines: ClassVar[tuple[str, ...]] = (REFERENCE, f"{REFERENCE}+liger")

    @property
    def name(self) -> str:
        return f"liger-{super().name}"

    def steps(self, found: Libraries) -> dict[str, Step]:
        steps = {FROZEN: self._step(self.frozen())}
        for name, library in found.items():
            steps[name] = self._step(self.model(library))
            steps[f"{name}+liger"] = self._step(_with_liger(self.model(library)))
        return steps

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        return {}


def _with_liger(wrapped: Any) -> nn.Module:
    """Liger's kernels in this model alone, so without its rotary embedding, which it replaces for every model."""
    liger = importlib.import_module("liger_kernel.transformers")
    liger.apply_liger_kernel_to_llama(rope=False, model=wrapped.base_model.model)
    model: nn.Module = wrapped
    return model


@dataclass(frozen=True)
class UnslothCase(GroupCase):
    """q/k/v: Unsloth's `apply_lora_qkv` on reference PEFT's layers, which is how its models call it."""

    suite: ClassVar[str] = "peers"
    baselines: ClassVar[tuple[str, ...]] = (REFERENCE, "unsloth")

    @property
    def name(self) -> str:
        return f"unsloth-{super().name}"

    def modules(self, found: Libraries) -> dict[str, nn.Module]:
        modules = super().modules(found)
        if REFERENCE in found:
            layers = super().modules({REFERENCE: found[REFERENCE]})[REFERENCE]
            modules["unsloth"] = _UnslothQkv(layers.get_submodule("0"))
        return modules


class _UnslothQkv(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.function = importlib.import_module("unsloth.kernels").apply_lora_qkv

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: (M, K). Not in place: Unsloth would write dx over x, which the next step reads again."""
        return [out[0] for out in self.function(self.layers, x[None], inplace=False)]


def lacking(device: str) -> str:
    """Why `peer_cases` has nothing, in one line."""
    here = "neither is installed" if torch.device(device).type == "cuda" else f"the device is {device}"
    return f"peers needs a CUDA device, and liger_kernel or unsloth: {here}"


def peer_cases(quick: bool, device: str) -> Iterator[Case]:
    """Nothing on a CPU, and nothing for a package that is not there."""
    if torch.device(device).type != "cuda":
        return
    if importlib.util.find_spec("liger_kernel"):
        size = LlamaSize(layers=2) if quick else LlamaSize()
        yield LigerCase(dtype="bf16", dropout=0.0, size=size, device=device)
    if importlib.util.find_spec("unsloth"):
        M = 2048 if quick else 8192
        yield UnslothCase("qkv", M, "bf16", 0.0, hidden=4096, kv=1024, intermediate=14336, device=device)
