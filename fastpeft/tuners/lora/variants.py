"""What one adapter of a LoRA layer computes. A variant has no state: everything it needs is on the layer."""

from typing import Any

import torch
from torch import Tensor

from fastpeft.tuners.lora.fused import add_low_rank


class LoraVariant:
    """Plain LoRA: the weight becomes W + scaling · B A. arXiv:2106.09685 section 4.1."""

    fusable = True  # whether lora_linear computes it, base product included

    def add(self, layer: Any, adapter: str, out: Tensor, x: Tensor) -> Tensor:
        """The layer's output with this adapter.

        Args:
            out: (..., N), the base layer's output, other adapters added.
            x: (..., K), the layer's input.

        Returns:
            (..., N) in the wider of out's and the adapter's dtype; the layer casts back at the end.
        """
        return add_low_rank(layer, adapter, out, x)

    def delta_weight(self, layer: Any, adapter: str) -> Tensor:
        """scaling · B A in the layout of the base weight; computed in fp32 at least, and returned so."""
        A, B = (
            factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in layer.base.factors(layer, adapter)
        )
        return layer.base.store(B @ A) * layer.scaling[adapter]

    def merge(self, layer: Any, adapter: str, weight: Tensor) -> Tensor:
        """The base weight with the adapter in it: a new tensor, rounded once."""
        return (weight + self.delta_weight(layer, adapter)).to(weight.dtype)

    def unmerge(self, layer: Any, adapter: str, weight: Tensor) -> Tensor:
        """`merge` undone, up to the rounding of both."""
        return (weight - self.delta_weight(layer, adapter)).to(weight.dtype)


PLAIN = LoraVariant()


def variant_for(config: Any) -> LoraVariant:
    """The variant that a config asks for. LoraConfig itself refuses those that are not built yet."""
    return PLAIN
