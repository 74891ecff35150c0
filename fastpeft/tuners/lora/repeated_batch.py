"""The same mixed batch once more, as in decoding: token after token, the same rows take the same adapters.

A few rows are bound by what a layer looks at before it computes. 64 adapters are 192 modules, and after the base
product their tables are no longer near the processor. So a layer that meets a batch for the second time, or its rows
with a token each after their prompts, remembers what it found: whose factors, and the batched products that add them;
on kernels the tables of where they lie, those of layers that share their input as one. From then on it asks what may
have become different since, of all adapters at once: the modules, what replaces their forward, their Parameters and the
memory of these. Hooks are looked for again when torch has registered one, on whatever it may be. In a call of
`generate` that runs nobody's code but the libraries' it asks once (unattended.py).
"""

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fastpeft.routing import Routing, RoutingTables
from fastpeft.routing_scope import unattended_call
from fastpeft.tuners.eligibility import any_watched, hooks_registered, is_ordinary, watched_everywhere
from fastpeft.tuners.lora.routed_sharing import RoutedGroup
from fastpeft.utils.saved_tensors import is_dispatch_watched
from fastpeft_kernels.dispatch import use_triton
from fastpeft_kernels.routed_few import Products, products_of_few
from fastpeft_kernels.routed_group import RepeatedGroup

_CONTAINERS = ("lora_A", "lora_B", "lora_dropout")
_PARAMETERS = {nn.Parameter, type(None)}
_shape, _dtype = attrgetter("shape"), attrgetter("dtype")
_training, _parameters = itemgetter("training"), itemgetter("_parameters")


class RepeatedBatch:
    """What one layer remembers of the last batch. Copied or pickled it has seen nothing."""

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return RepeatedBatch, ()

    def forget(self) -> None:
        self._seen: tuple[Any, ...] | None = None  # the last batch
        self._found: _Found | None = None
        self._looked = False

    def forward(self, layer: Any, routing: Routing, x: Tensor, group: RoutedGroup | None = None) -> Tensor | None:
        """The layer's output, (..., N); None where the batch is another one, or anything is not as it was.

        Layers of its group that remember the same batch are computed along with it.
        """
        found = self._found_for(layer, routing, x)
        if found is None:
            return None
        if group is not None and len(layers := group.layers(x)) > 1:
            together = {}
            for name, other in layers.items():
                theirs = found if other is layer else other.repeated_batch._found_for(other, routing, x)
                if theirs is not None and found.goes_with(theirs):
                    together[name] = theirs
            if len(together) > 1:
                bases = [layers[name].base_layer(x) for name in together]
                outs = found.add_together(list(together.values()), bases, routing, x)
                return group.keep(routing, x, dict(zip(together, outs, strict=True)), bases)
        return found.add_to(layer.base_layer(x), routing, x)

    def _found_for(self, layer: Any, routing: Routing, x: Tensor) -> "_Found | None":
        """What it remembers of this batch, if that holds."""
        found = self._found
        if found is None or not found.is_for(routing, x):
            return None
        if layer.merged or layer.disable_adapters or not found.holds(layer):
            self.forget()
            return None
        return found

    def remember(
        self, layer: Any, routing: Routing, names: tuple[str, ...], tables: RoutingTables, x: Tensor
    ) -> "_Found | None":
        """What adds the adapters to the base layer's output, in place, if this batch was here before.

        Args:
            layer: one whose base is a plain nn.Linear; its adapters `names` are plain ones, without dropout in force.
            tables: of the routing, for these.

        Returns:
            None where it was not, or where batched products are not all that these adapters need.
        """
        seen, before = (routing, routing.fills, x.shape, x.dtype), self._seen
        if seen != before:
            self.forget()
            self._seen = seen
            is_first_token = x.ndim == 3 and x.shape[1] == 1 and before is not None and before[:2] == seen[:2]
            if not is_first_token:  # after a prompt of the same rows, which will come again
                return None
        if self._looked:  # a sibling may ask before the layer itself is called
            return self._found_for(layer, routing, x)
        if use_triton(x) or (tables.weights is None and x.device.type == "cpu"):
            self._looked, new = True, _Found(layer, seen, names, use_triton(x))
            self._found = new if new.find_products(tables) else None
        found = self._found
        return None if found is None or not found.is_for(routing, x) else found


class _Found:
    """The products of a batch, and all that they rest upon."""

    def __init__(self, layer: Any, seen: tuple[Any, ...], names: tuple[str, ...], on_kernels: bool) -> None:
        own, self._pick = layer._modules, _picker(names)
        self._names, self._on_kernels = names, on_kernels
        self._seen, self._adapters_here, self._scaling = seen, len(layer.r), self._pick(layer.scaling)
        self._variants = self._pick(layer.variants)
        self._held: tuple[object | None, int] = (None, 0)  # in which unattended call, with torch's count of hooks
        self._hooks = self._hooks_then = -1  # torch's count when hooks were looked for in vain: twice, and last time
        self._base, self._modules = own["base_layer"], [self._pick(own[name]._modules) for name in _CONTAINERS]
        self._base_parameters = list(self._base._parameters.values())
        As, Bs, dropouts = self._modules
        self._everyone = [self._base, *As, *Bs, *dropouts]
        self._types, self._tables = list(map(type, self._everyone)), list(map(vars, self._everyone))
        self._dropouts = [vars(module) for module in dropouts if type(module) is nn.Dropout]
        self._weights: list[Tensor] = [module.weight for module in (*As, *Bs)]
        self._addresses, self._shapes = list(map(Tensor.data_ptr, self._weights)), list(map(_shape, self._weights))
        self._dtypes = list(map(_dtype, self._weights))
        self._products: list[Products] = []
        self._together: tuple[list[ref[_Found]], RepeatedGroup] | None = None  # who ran as one last time, on kernels

    def find_products(self, tables: RoutingTables) -> bool:
        """Whether batched products are all that these adapters need."""
        factors_dtype, is_fixed = self._dtypes[0], {float, int}.issuperset(map(type, self._scaling))
        if not is_fixed or torch.promote_types(self._seen[-1], factors_dtype) != factors_dtype:
            return False
        if self._on_kernels:
            return True
        products = products_of_few(*self._factors(), self._scaling, tables.rows, tables.starts)
        self._products = products or []
        return products is not None

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        count = len(self._weights) // 2
        return self._weights[:count], self._weights[count:]

    def add_to(self, base: Tensor, routing: Routing, x: Tensor) -> Tensor:
        if self._on_kernels:
            return self.add_together([self], [base], routing, x)[0].view(base.shape)
        flat, rows = base.reshape(-1, base.shape[-1]), x.reshape(-1, x.shape[-1])
        for products in self._products:
            products.add_to_(flat, rows)
        return flat.view(base.shape)

    def goes_with(self, other: "_Found") -> bool:
        """Whether one op computes both, on kernels."""
        return (other._names, other._dtypes[0]) == (self._names, self._dtypes[0])

    def add_together(
        self, everyone: "list[_Found]", bases: Sequence[Tensor], routing: Routing, x: Tensor
    ) -> list[Tensor]:
        """The outputs of layers, this one among them, that go with it: (M, N_i) each, in the memory of their bases."""
        who = list(map(ref, everyone))  # none of whom is to be kept alive by it
        together = self._together
        if together is None or together[0] != who:
            As, Bs = zip(*(found._factors() for found in everyone), strict=True)
            self._together = together = who, RepeatedGroup(As, Bs, [found._scaling for found in everyone])
        tables = routing.tables(x.shape[:-1], self._names, x.device)
        flat = [base.reshape(-1, base.shape[-1]) for base in bases]
        return together[1].add_to_(flat, x.reshape(-1, x.shape[-1]), *tables)

    def is_for(self, routing: Routing, x: Tensor) -> bool:
        before, fills, shape, dtype = self._seen
        return (
            routing is before
            and routing.fills == fills
            and x.shape == shape
            and x.dtype == dtype
            and is_ordinary(x)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and use_triton(x) is self._on_kernels
            and not is_dispatch_watched()
        )

    def holds(self, layer: Any) -> bool:
        now = unattended_call(), hooks_registered()
        if now[0] is not None and now == self._held:
            return not watched_everywhere()
        held = self._holds(layer)
        self._held = now if held else (None, 0)
        return held

    def _holds(self, layer: Any) -> bool:
        return (
            layer.cast_input_dtype_enabled
            and len(layer.r) == self._adapters_here
            and self._are_the_same_modules(layer)
            and not watched_everywhere()
            and not self._are_watched()
            and not any(map(_training, self._dropouts))
            and self._have_the_same_weights()
            and self._pick(layer.scaling) == self._scaling
            and self._pick(layer.variants) == self._variants
        )

    def _are_the_same_modules(self, layer: Any) -> bool:
        own, pick = layer._modules, self._pick
        try:
            modules = [pick(own[name]._modules) for name in _CONTAINERS]
        except KeyError:  # an adapter is gone
            return False
        same = own["base_layer"] is self._base and modules == self._modules
        return same and list(map(type, self._everyone)) == self._types

    def _are_watched(self) -> bool:
        hooks = hooks_registered()
        if hooks != self._hooks:
            if any_watched(self._everyone):
                return True
            if hooks == self._hooks_then:  # torch counts a hook before it is there: another thread may be about to
                self._hooks = hooks
            self._hooks_then = hooks
        return any(map(contains, self._tables, repeat("forward")))

    def _have_the_same_weights(self) -> bool:
        base = self._base_parameters
        if not all(map(is_, self._base._parameters.values(), base)) or not _PARAMETERS.issuperset(map(type, base)):
            return False
        weights = self._weights
        parameters = list(map(_parameters, self._tables[1 : 1 + len(weights)]))
        return (
            all(map(is_, map(dict.get, parameters, repeat("weight")), weights))
            and all(map(is_, map(dict.get, parameters, repeat("bias")), repeat(None)))
            and set(map(type, weights)) == {nn.Parameter}
            and list(map(Tensor.data_ptr, weights)) == self._addresses
            and list(map(_shape, weights)) == self._shapes
            and list(map(_dtype, weights)) == self._dtypes
            and all(map(Tensor.is_contiguous, weights))
        )


def _picker(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """What takes these entries out of a dict, at once."""
    if len(names) == 1:
        name = names[0]
        return lambda entries: (entries[name],)
    return itemgetter(*names)
