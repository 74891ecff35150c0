"""Layers that their parent calls on one tensor in a batch of mixed adapters: one launch shrinks for all of them.

Where kernels compute few rows and nothing is differentiated, as in decoding, launches are what a layer costs: q, k and
v take four instead of six, at one adapter a row. On a CPU there is nothing to share, and of many rows the outputs that
wait for their layers would take memory. Which layers belong together: fastpeft.tuners.shared_inputs.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpeft.routing import Routing, RoutingTables
from fastpeft.tuners.eligibility import base_parts, is_ordinary
from fastpeft.tuners.lora.fused import PlainFactors, plain_factors
from fastpeft.tuners.shared_inputs import InputGroup
from fastpeft.utils.saved_tensors import is_dispatch_watched
from fastpeft_kernels import RoutedOperands, lora_routed_group
from fastpeft_kernels.dispatch import current_backend, interpreting, use_triton
from fastpeft_kernels.tiles import FEW_ROUTED_ROWS


class RoutedGroup:
    """A layer's group, for one call of the layer."""

    def __init__(self, group: InputGroup, name: str, layer: Any) -> None:
        self._group, self._name, self._layer = group, name, layer

    def take(self, routing: Routing, x: Tensor) -> Tensor | None:
        """The layer's output, if a sibling's call has computed it."""
        return self._group.take(self._name, x, (routing, routing.fills))

    def keep(self, routing: Routing, x: Tensor, outs: Mapping[str, Tensor], bases: Iterable[Tensor]) -> Tensor:
        """The layer's output, out of those of several layers by name, each shaped as its base's; keeps the others."""
        shaped = {name: out.view(base.shape) for (name, out), base in zip(outs.items(), bases, strict=True)}
        return self._group.keep(self._name, x, shaped, (routing, routing.fills))

    def layers(self, x: Tensor) -> dict[str, Any]:
        """The layer and the siblings that are called on x next, by name."""
        return {self._name: self._layer, **dict(self._group.siblings(self._name, x))}

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
            base: the base layer's output, which nobody else holds.
            own: the factors of these adapters.
        """
        layers, bases, factors = self.layers(x), {self._name: base}, {self._name: own}
        for name, layer in layers.items():
            theirs = None if layer is self._layer else _factors(layer, routing, names, x)
            if theirs is not None and theirs.As[0].dtype == own.As[0].dtype:
                bases[name], factors[name] = layer.base_layer(x), theirs
        if len(factors) == 1:
            return None
        found = [layers[name].repeated_batch.remember(layers[name], routing, names, tables, x) for name in factors]
        if None not in found:
            outs = found[0].add_together(found, list(bases.values()), routing, x)
        else:
            members = [
                RoutedOperands(_rows(bases[name]), As, Bs, [layers[name].scaling[adapter] for adapter in names])
                for name, (As, Bs, _) in factors.items()
            ]
            outs = lora_routed_group(_rows(x), members, *tables)
        return self.keep(routing, x, dict(zip(factors, outs, strict=True)), bases.values())


def group_for_kernels(layer: Any, x: Tensor) -> RoutedGroup | None:
    """The group of a layer that is called on x, where kernels infer; None where each layer computes for itself."""
    group: InputGroup | None = layer.input_group
    if group is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    on_kernels = x.is_cuda or (current_backend() == "triton" and interpreting())
    if not on_kernels or x.dtype == torch.float64:
        return None  # or, where a backend is demanded by name, an error of the op, if there is anything to compute
    few = x.numel() < FEW_ROUTED_ROWS * x.shape[-1] if x.ndim else False
    if not (few and is_ordinary(x) and use_triton(x) and group.is_on()) or is_dispatch_watched():
        return None
    name = group.name_of(layer)
    return None if name is None else RoutedGroup(group, name, layer)


def _factors(layer: Any, routing: Routing, names: tuple[str, ...], x: Tensor) -> PlainFactors | None:
    """Of the same adapters in another layer, if it takes this x, has no adapters but those, and nobody watches it."""
    base = base_parts(layer)
    if isinstance(base, str) or layer.merged or layer.disable_adapters:
        return None
    W = base[0]
    if W.shape[1] != x.shape[-1] or W.device != x.device or W.dtype != x.dtype:
        return None
    if tuple(name for name in routing.names if name in layer.r) != names:
        return None
    found = plain_factors(layer, names)
    return None if found is None or any(found.ps) or found.As[0].device != x.device else found


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
