"""What one adapter of a LoRA layer computes. A variant has no state: everything it needs is on the layer."""

from dataclasses import dataclass
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

    def merge(self, layer: Any, adapter: str, weight: Tensor, base_weight: Tensor) -> tuple[Tensor, Any]:
        """The weight with the adapter in it: a new tensor, rounded once; and what `unmerge` must know of it.

        Args:
            weight: with the adapters in it that were merged before.
            base_weight: without any.
        """
        return (weight + self.delta_weight(layer, adapter)).to(weight.dtype), None

    def unmerge(self, layer: Any, adapter: str, weight: Tensor, state: Any) -> Tensor:
        """`merge` undone, up to the rounding of both."""
        return (weight - self.delta_weight(layer, adapter)).to(weight.dtype)


@dataclass(frozen=True)
class MergedDora:
    """What a merge multiplied each row by, in the layout of the weight, and the rows that it wiped out with a zero."""

    factor: Tensor
    wiped: Tensor  # (n,) row numbers
    rows: Tensor  # (n, K), as they were


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

    def row_scale(self, layer: Any, adapter: str) -> Tensor:
        """magnitude / norm, what the rows of W + scaling · B A are multiplied by: (N,); the norm gets no gradient."""
        A, B = layer.base.factors(layer, adapter)
        W = layer.base.store(layer.get_base_layer().weight)
        return self._magnitude(layer, adapter) / dora_norm(W, A, B, layer.scaling[adapter])

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

    def merge(self, layer: Any, adapter: str, weight: Tensor, base_weight: Tensor) -> tuple[Tensor, MergedDora]:
        delta, store = self.delta_weight(layer, adapter), layer.base.store
        norm = torch.linalg.norm(store(base_weight + delta), dim=1)
        norm = norm.clamp_min(
            torch.finfo(norm.dtype).tiny
        )  # as dora_norm: the magnitude of a row of zeros is 0 as well
        g = self._magnitude(layer, adapter) / norm
        wiped = (g == 0).nonzero().flatten()
        state = MergedDora(store(g.unsqueeze(1)), wiped, store(weight)[wiped].clone())
        return (state.factor * (weight + delta)).to(weight.dtype), state

    def unmerge(self, layer: Any, adapter: str, weight: Tensor, state: MergedDora) -> Tensor:
        factor = torch.where(state.factor == 0, 1.0, state.factor)
        base = (weight / factor - self.delta_weight(layer, adapter)).to(weight.dtype)
        layer.base.store(base)[state.wiped] = state.rows
        return base

    @staticmethod
    def _magnitude(layer: Any, adapter: str) -> Tensor:
        return layer.lora_magnitude_vector[adapter].weight


PLAIN = LoraVariant()
DORA = DoraVariant()


def variant_for(config: Any) -> LoraVariant:
    """The variant that a config asks for. LoraConfig itself refuses those that are not built yet."""
    return DORA if config.use_dora else PLAIN
