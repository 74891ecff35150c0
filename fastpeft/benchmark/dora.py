"""Suite "dora": one DoRA linear, forward and backward, beside reference PEFT's and beside our LoRA linear."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from fastpeft.benchmark.cases import DTYPES, Libraries
from fastpeft.benchmark.layer import LayerCase
from fastpeft.benchmark.libraries import OURS, REFERENCE, frozen_linear, lora_layer
from fastpeft.benchmark.memory import saved_bytes

LORA = f"{OURS}-lora"  # the same layer without DoRA: what the row norms and their gradient cost


@dataclass(frozen=True)
class DoraCase(LayerCase):
    """The layer suite's case with DoRA on it, and what it keeps for its backward.

    With dropout DoRA has two base products each way where LoRA has one, here as in PEFT.
    """

    suite: ClassVar[str] = "dora"
    baselines: ClassVar[tuple[str, ...]] = (REFERENCE, LORA)

    def layers(self, found: Libraries) -> dict[str, Any]:
        layers = {name: self._layer(library, use_dora=True) for name, library in found.items()}
        if OURS in found:
            layers[LORA] = self._layer(found[OURS], use_dora=False)
        return layers

    def _layer(self, library: Any, use_dora: bool) -> Any:
        base = frozen_linear(self.K, self.N, DTYPES[self.dtype], self.device)
        return lora_layer(library, base, r=self.r, dropout=self.dropout, use_dora=use_dora)

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        return {name: {"saved": self._saved(layer)} for name, layer in self.layers(found).items()}

    def _saved(self, layer: Any) -> dict[str, int]:
        x, _ = self.batch()
        return saved_bytes(lambda: layer(x), inputs=[x], parameters=layer.parameters()).to_dict()


def dora_cases(quick: bool, device: str) -> Iterator[DoraCase]:
    for dtype in ("bf16",) if quick else ("fp32", "bf16"):
        for dropout in (0.0, 0.1):
            for M in (512,) if quick else (512, 4096):
                yield DoraCase(M=M, dtype=dtype, dropout=dropout, device=device)
