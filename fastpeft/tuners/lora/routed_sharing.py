"""Layers that their parent calls on one tensor in a batch of mixed adapters: one pass over it shrinks for all of them.

Where kernels compute and nothing is differentiated, as in decoding, launches are what a layer costs: q, k and v take
four instead of six. On a CPU there is nothing to share. Which layers belong together: fastpeft.tuners.shared_inputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.routing import Routing, RoutingTables
from fastpeft.tuners.eligibility import base_parts, is_ordinary
from fastpeft.tuners.lora.fused import PlainFactors, plain_factors
from fastpeft.tuners.shared_inputs import InputGroup
from fastpeft.utils.saved_tensors import is_dispatch_watched
from fastpeft_kernels import RoutedOperands, lora_routed_group
from fastpeft_kernels.dispatch import use_triton


class RoutedGroup:
    """A layer's group, for one call of the layer."""

    def __init__(self, group: InputGroup, name: str, layer: Any) -> None:
        self._group, self._name, self._layer = group, name, layer

    def take(self, routing: Routing, x: Tensor) -> Tensor | None:
        """The layer's output, if a sibling's call has computed it."""
        return self._group.take(self._name, x, (routing, routing.fills))

    def compute(
        self,
        routing: Routing,
        names: tuple[str, ...],
        tables: RoutingTables,
        x: Tensor,
        base: Tensor,
        own: PlainFactors,
    ) -> Tensor | None:
        """The layer's output, with those of the siblings kept for their calls; None where it has none to share with.

        Args:
            names: of the layer's adapters that occur in the batch; none has dropout in force.
            base: the base layer's output.
            own: the factors of these adapters.
        """
        members = {self._name: _operands(self._layer, names, base, own)}
        for other, sibling in self._group.siblings(self._name, x):
            theirs = _factors(sibling, routing, names)
            if theirs is not None and theirs.As[0].dtype == own.As[0].dtype:
                members[other] = _operands(sibling, names, sibling.base_layer(x), theirs)
        if len(members) == 1:
            return None
        outs = lora_routed_group(x.reshape(-1, x.shape[-1]), list(members.values()), *tables)
        shaped = [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]
        return self._group.keep(self._name, x, dict(zip(members, shaped, strict=True)), (routing, routing.fills))


def group_for_kernels(layer: Any, x: Tensor) -> RoutedGroup | None:
    """The group of a layer that is called on x, where kernels infer; None where each layer computes for itself."""
    group: InputGroup | None = layer.input_group
    if group is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not (is_ordinary(x) and use_triton(x) and group.is_on()) or is_dispatch_watched():
        return None
    name = group.name_of(layer)
    return None if name is None else RoutedGroup(group, name, layer)


def _operands(layer: Any, names: Sequence[str], base: Tensor, factors: PlainFactors) -> RoutedOperands:
    scales = [layer.scaling[name] for name in names]
    return RoutedOperands(base.reshape(-1, base.shape[-1]), factors.As, factors.Bs, scales)


def _factors(layer: Any, routing: Routing, names: tuple[str, ...]) -> PlainFactors | None:
    """Of the same adapters in another layer, where it has all of them and no others, and nobody watches it compute."""
    if layer.merged or layer.disable_adapters or isinstance(base_parts(layer), str):
        return None
    if tuple(name for name in routing.names if name in layer.r) != names:
        return None
    found = plain_factors(layer, names)
    return None if found is None or any(found.ps) else found
