"""What one adapter of a LoRA layer computes. A variant has no state: everything it needs is on the layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.tuners.eligibility import watched
from fastpeft.tuners.lora.dora import DoraLinearLayer, initial_magnitude
from fastpeft.tuners.lora.fused import add_low_rank, may_read_weights
from fastpeft_kernels import LoraOperands, dora_linear, dora_norm


class LoraVariant:
    """Plain LoRA: the weight becomes W + scaling · B A. arXiv:2106.09685 section 4.1."""

    is_a_sum = True  # whether it only adds to the output, so that lora_linear, lora_add and lora_group compute it

    def create_parameters(self, layer: Any, adapter: str) -> None:
        """Make what the variant trains beside the factors, which are there already."""

    def obstacle(self, layer: Any, adapter: str) -> str | None:
        """Why the weights of the variant itself must not go to an op, or None."""
        return None

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

    def merge_state(self, layer: Any, adapter: str, base_weight: Tensor) -> Tensor | None:
        """What `merge` and `unmerge` must both know, from the weight without any adapter in it."""
        return None

    def merge(self, layer: Any, adapter: str, weight: Tensor, state: Tensor | None) -> Tensor:
        """The base weight with the adapter in it: a new tensor, rounded once."""
        return (weight + self.delta_weight(layer, adapter)).to(weight.dtype)

    def unmerge(self, layer: Any, adapter: str, weight: Tensor, state: Tensor | None) -> Tensor:
        """`merge` undone, up to the rounding of both."""
        return (weight - self.delta_weight(layer, adapter)).to(weight.dtype)


class DoraVariant(LoraVariant):
    """DoRA: the rows of W + scaling · B A are brought to a trained length. arXiv:2402.09353 section 4.1.

    The length that they have gets no gradient (section 4.3). `delta_weight` is that of plain LoRA, as in PEFT.
    """

    is_a_sum = False

    def create_parameters(self, layer: Any, adapter: str) -> None:
        W = layer.base.store(layer.get_base_layer().weight)
        A, B = layer.base.factors(layer, adapter)
        magnitude = initial_magnitude(W, A, B, layer.scaling[adapter])
        layer.lora_magnitude_vector[adapter] = DoraLinearLayer(magnitude)

    def obstacle(self, layer: Any, adapter: str) -> str | None:
        module = layer.lora_magnitude_vector[adapter]
        weight = module._parameters.get("weight")
        if type(module) is not DoraLinearLayer or type(weight) is not nn.Parameter:
            return "lora_magnitude_vector is no plain Parameter"
        if weight.dtype not in (torch.float32, layer.lora_A[adapter].weight.dtype):
            return "lora_magnitude_vector is neither fp32 nor of the dtype of lora_A"
        return watched("lora_magnitude_vector", module)

    def fused(self, layer: Any, adapter: str, x: Tensor, operands: LoraOperands) -> Tensor:
        """The layer's output by one op: (..., N) in x's dtype."""
        W, bias, A, B, scaling, p = operands
        return dora_linear(x, W, bias, A, B, self._magnitude(layer, adapter), scaling, p if layer.training else 0.0)

    def add(self, layer: Any, adapter: str, out: Tensor, x: Tensor) -> Tensor:
        """PEFT's formula, module by module: without dropout, the output so far is taken for the base product."""
        A, B, dropout = (container[adapter] for container in (layer.lora_A, layer.lora_B, layer.lora_dropout))
        module, scaling = layer.get_base_layer(), layer.scaling[adapter]
        x = layer._cast_input_dtype(x, A.weight.dtype)
        W = layer.base.store(module.weight)
        g = layer.lora_magnitude_vector[adapter](self._norm(layer, adapter, W, x))
        if isinstance(dropout, nn.Identity) or not layer.training:
            base = out if module.bias is None else out - module.bias
        else:
            x = dropout(x)
            base = F.linear(x, W.to(x.dtype))
        return out + ((g - 1) * base + g * B(A(x)) * scaling)

    @staticmethod
    def _norm(layer: Any, adapter: str, W: Tensor, x: Tensor) -> Tensor:
        """The norm of each row of W + scaling · B A: (N,). Without gradient."""
        A, B, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
        if may_read_weights(layer, adapter, x):
            return dora_norm(W, A.weight, B.weight, scaling)
        with torch.no_grad():  # whatever hangs on the modules acts on the product as well
            delta = B(A(torch.eye(W.shape[1], dtype=A.weight.dtype, device=A.weight.device))).T
            return torch.linalg.norm(W.to(x.dtype) + scaling * delta.to(x.dtype), dim=1)

    def merge_state(self, layer: Any, adapter: str, base_weight: Tensor) -> Tensor:
        """The norm of each row of the base weight with this adapter alone: (N,) in fp32 at least."""
        return torch.linalg.norm(layer.base.store(base_weight + self.delta_weight(layer, adapter)), dim=1)

    def merge(self, layer: Any, adapter: str, weight: Tensor, state: Tensor | None) -> Tensor:
        merged = self._factor(layer, adapter, state) * (weight + self.delta_weight(layer, adapter))
        return merged.to(weight.dtype)

    def unmerge(self, layer: Any, adapter: str, weight: Tensor, state: Tensor | None) -> Tensor:
        base = weight / self._factor(layer, adapter, state) - self.delta_weight(layer, adapter)
        return base.to(weight.dtype)

    def _factor(self, layer: Any, adapter: str, norm: Tensor | None) -> Tensor:
        """What each row is multiplied by, in the layout of the weight: (N, 1), or (1, N)."""
        assert norm is not None, "merge_state gives it"
        return layer.base.store((self._magnitude(layer, adapter) / norm).unsqueeze(1))

    @staticmethod
    def _magnitude(layer: Any, adapter: str) -> Tensor:
        return layer.lora_magnitude_vector[adapter].weight


PLAIN = LoraVariant()
DORA = DoraVariant()


def variant_for(config: Any) -> LoraVariant:
    """The variant that a config asks for. LoraConfig itself refuses those that are not built yet."""
    return DORA if config.use_dora else PLAIN
