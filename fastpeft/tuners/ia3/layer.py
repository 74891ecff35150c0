"""The IA³ layer: one linear layer, and by adapter name a vector that scales its input or its output."""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.routing import Routing, RoutingTables, as_routing
from fastpeft.routing_scope import routing_for
from fastpeft.tuners.bases import Base, EmbeddingBase, base_for
from fastpeft.tuners.eligibility import base_parts, is_ordinary
from fastpeft.tuners.tuner_layer import BaseTunerLayer, check_adapters_to_merge
from fastpeft_kernels import scale_columns, scale_linear, scale_routed
from fastpeft_kernels.dispatch import are_few, inferring_few


@dataclass
class _Merge:
    """What undoing a merge needs: the vector that was merged, and what its zeros wiped out of weight and bias."""

    vector: Tensor
    wiped: dict[str, Tensor]


class IA3Layer(nn.Module, BaseTunerLayer):
    """y = base(x · l) where the layer is feed-forward, else y = base(x) · l; base frozen. arXiv:2205.05638 section 3.3.

    l is a vector of one entry a column, the product of those of all active adapters. Nothing on the layer changes
    during a forward.
    """

    adapter_layer_names = ("ia3_l",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        is_feedforward: bool = False,
        target_name: str = "",
    ) -> None:
        """Wrap a base layer and give it a first adapter, which is active.

        Args:
            config: an IA3Config.
            is_feedforward: scale the input; otherwise the output.
            target_name: the layer's path in the model, for errors.

        Raises:
            ValueError, NotImplementedError: no such base layer.
        """
        super().__init__()
        self.base_layer = base_layer
        self.base: Base = linear_base_for(self.get_base_layer(), target_name)
        self.in_features, self.out_features = self.base.features(self.get_base_layer())
        self.fan_in_fan_out = self.base.fan_in_fan_out
        self.is_feedforward = is_feedforward
        self.ia3_l = nn.ParameterDict({})
        self.merged_adapters: list[str] = []
        self._merges: dict[str, _Merge] = {}
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config, is_feedforward)

    def update_layer(self, adapter_name: str, config: Any, is_feedforward: bool | None = None) -> None:
        """Add an adapter, or make one of that name anew. It is trainable if it is active.

        Args:
            config: an IA3Config.
            is_feedforward: what it scales; as the layer's other adapters, or as before, unless given.

        Raises:
            ValueError: the layer's other adapters scale the other side, or this one is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged; unmerge it before it is replaced")
        if is_feedforward is not None:
            self.check_side(is_feedforward, [name for name in self.ia3_l if name != adapter_name])
            self.is_feedforward = is_feedforward
        shape = (1, self.in_features) if self.is_feedforward else (self.out_features, 1)
        self.ia3_l[adapter_name] = nn.Parameter(torch.randn(shape))  # drawn in any case, as PEFT does: same generator
        if config.init_ia3_weights:
            self.reset_ia3_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def check_side(self, is_feedforward: bool, others: Sequence[str], where: str = "this layer") -> None:
        """Raises ValueError if an adapter scales the input here and `others` the output, or the other way round."""
        if others and is_feedforward != self.is_feedforward:
            sides = ("input", "output") if is_feedforward else ("output", "input")
            raise ValueError(
                f"the new adapter would scale the {sides[0]} of {where}, whose adapters {', '.join(sorted(others))} "
                f"scale the {sides[1]}: give both the same feedforward_modules, or delete the others first"
            )

    def reset_ia3_parameters(self, adapter_name: str) -> None:
        """Set an adapter's vector to one, so that it changes nothing; pass over one that is not here."""
        if adapter_name in self.ia3_l:
            nn.init.ones_(self.ia3_l[adapter_name])

    # Merging.

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base weight, W · l - W: in its layout, in fp32 at least.

        Raises:
            ValueError: adapters are merged, so that W is not there.
        """
        if self.merged:
            raise ValueError(f"{self.merged_adapters} are merged into the base weight; unmerge them first")
        weight = self.get_base_layer().weight
        vector = self._along_weight(self.ia3_l[adapter])
        wide = torch.promote_types(torch.promote_types(weight.dtype, vector.dtype), torch.float32)
        return weight.to(wide) * (vector.to(wide) - 1)

    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raise what `merge` would raise, and change nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.ia3_l and name not in self.merged_adapters]
        self._check_loaded(names)
        if safe_merge:
            self._merged_tensors(names, safe=True)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply adapters into the base weight, and into its bias where they scale the output. All or none of them.

        Args:
            safe_merge: look for NaN and infinity in the result before it is stored.
            adapter_names: those to merge; by default the active ones. Adapters not on this layer are passed over.

        Raises:
            ValueError: with safe_merge, the result is not finite; or an adapter's weights were never loaded.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ia3_l]
        if names:
            self._check_loaded(names)
            tensors, merges = self._merged_tensors(names, safe_merge)
            self._store(tensors)
            self.merged_adapters += names
            self._merges |= merges

    @torch.no_grad()
    def unmerge(self) -> None:
        """Divide all merged adapters out of the base weight again, the last one first: exact up to rounding.

        Where a vector is zero, the entries that it wiped out come back as they were.
        """
        if not self.merged:
            warnings.warn("no adapter is merged, nothing to do", stacklevel=2)
            return
        tensors = self._base_tensors()
        for name in reversed(self.merged_adapters):
            merge = self._merges[name]
            for key, tensor in tensors.items():
                vector = self._along(key, merge.vector).to(tensor.device)
                zero = vector == 0
                tensors[key] = (tensor / torch.where(zero, 1, vector)).to(tensor.dtype)
                if key in merge.wiped:
                    tensors[key][zero.expand_as(tensor)] = merge.wiped[key].to(tensor.device)
        self._store(tensors)
        self.merged_adapters = []
        self._merges = {}

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if self.ia3_l[name].is_meta:
                raise ValueError(f"adapter {name!r} has no weights yet (it is on the meta device); load them first")

    @torch.no_grad()
    def _merged_tensors(self, names: Sequence[str], safe: bool) -> tuple[dict[str, Tensor], dict[str, _Merge]]:
        """Base weight, and bias if it changes, with these adapters in them: new tensors; and how to undo it."""
        tensors, merges = self._base_tensors(), {}
        for name in names:
            merges[name] = _Merge(self.ia3_l[name].detach().clone(), {})
            for key, tensor in tensors.items():
                vector = self._along(key, merges[name].vector)
                zero = vector == 0
                if zero.any():
                    merges[name].wiped[key] = tensor[zero.expand_as(tensor)]
                tensors[key] = (tensor * vector).to(tensor.dtype)
            if safe and not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise ValueError(
                    f"merging adapter {name!r} would put NaN or infinity into the base weight; nothing was merged. "
                    "Look at the adapter's vectors."
                )
        return tensors, merges

    def _base_tensors(self) -> dict[str, Tensor]:
        """What merging changes: the weight, and the bias where the output is scaled."""
        module = self.get_base_layer()
        bias = None if self.is_feedforward else getattr(module, "bias", None)
        return {"weight": module.weight.data} | ({} if bias is None else {"bias": bias.data})

    @torch.no_grad()
    def _store(self, tensors: dict[str, Tensor]) -> None:
        """Write into the base layer's own storage, which other tensors may share (tied weights)."""
        for key, tensor in tensors.items():
            getattr(self.get_base_layer(), key).data.copy_(tensor)

    def _along(self, key: str, vector: Tensor) -> Tensor:
        return vector.flatten() if key == "bias" else self._along_weight(vector)

    def _along_weight(self, vector: Tensor) -> Tensor:
        """A vector, (1, K) or (N, 1), in the layout of the weight."""
        return vector.T if self.fan_in_fan_out else vector

    # Forward.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters, in the base layer's output dtype.

        Args:
            x: the base layer's input, (..., K).
            adapter_names: with this keyword, row i of the batch takes the adapter of that name and no other; else
                the routing in force decides (fastpeft.routing), or the active adapters where there is none.
        """
        adapter_names = kwargs.pop("adapter_names", None) if kwargs else None
        routing = routing_for(self) if adapter_names is None else as_routing(adapter_names)
        if routing is not None and not self._disable_adapters:
            return self._routed_forward(routing, x, *args, **kwargs)
        if self._disable_adapters and self.merged:
            self.unmerge()
        base_layer: Any = self._modules["base_layer"]
        vector = None if self._disable_adapters or self.merged_adapters else self._vector()
        if vector is None:
            return base_layer(x, *args, **kwargs)
        if not self.is_feedforward:
            return _scale(base_layer(x, *args, **kwargs), vector)
        if not args and not kwargs and self._owns(x, vector):
            base = base_layer._parameters
            return scale_linear(x, vector, base["weight"], base["bias"])
        return base_layer(_scale(x, vector), *args, **kwargs)

    def _routed_forward(self, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each row by the vectors that the routing names; the others keep the base's own bits."""
        if self.merged:
            raise ValueError(
                f"adapter_names cannot be used while {self.merged_adapters} are merged; unmerge them first"
            )
        names = tuple(name for name in routing.names if name in self.ia3_l)
        tables = routing.tables(x.shape[:-1], names, x.device)
        vectors = _of_one_dtype([self.ia3_l[name].flatten() for name in names])
        if self.is_feedforward:
            return self.base_layer(_scale_rows(x, vectors, tables), *args, **kwargs)  # type: ignore[no-any-return]
        return _scale_rows(self.base_layer(x, *args, **kwargs), vectors, tables)

    def _vector(self) -> Tensor | None:
        """The product of the active adapters' vectors, of one adapter its Parameter itself; None where none is active.

        Read from the module's own tables: the look-up of nn.ParameterDict would cost as much as scaling a single row.
        """
        own: Any = self._modules["ia3_l"]._parameters  # type: ignore[union-attr]
        vectors = [own[name] for name in self.active_adapters if name in own]
        return functools.reduce(torch.mul, vectors) if vectors else None

    def _owns(self, x: Tensor, vector: Tensor) -> bool:
        """Whether one op may take the place of the base module. Autocast has casts of its own, kept by the module."""
        return (
            self._obstacle_to_owning() is None
            and is_ordinary(x)
            and is_ordinary(vector)
            and x.dtype == self.base_layer._parameters["weight"].dtype  # type: ignore[union-attr]
            and not are_few(x, self.out_features)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _obstacle_to_owning(self) -> str | None:
        if not torch.is_grad_enabled():  # the op gains in backward; without one, the module costs the host less
            return "no gradients are recorded"
        parts = base_parts(self)
        return parts if isinstance(parts, str) else None

    def path(self) -> tuple[str, str]:
        """(path, why not a better one) of the next forward: for `fastpeft.explain`."""
        if not self.is_feedforward:
            return "added", "it is the output that is scaled: the base module runs as it is"
        reason = self._obstacle_to_owning()
        return ("fused", "") if reason is None else ("added", reason)

    def __repr__(self) -> str:
        return f"ia3.{super().__repr__()}"


def _scale(x: Tensor, vector: Tensor) -> Tensor:
    """x · vector in x's dtype: by the op; in plain torch what is small, or can only so be transformed or exported."""
    if is_ordinary(x) and is_ordinary(vector) and not (are_few(x, x.shape[-1]) or inferring_few(x)):
        return scale_columns(x, vector)
    return (x * vector.flatten()).to(x.dtype)


def _of_one_dtype(vectors: list[Tensor]) -> list[Tensor]:
    if len({vector.dtype for vector in vectors}) < 2:
        return vectors
    wide = functools.reduce(torch.promote_types, (vector.dtype for vector in vectors))
    return [vector.to(wide) for vector in vectors]


def _scale_rows(x: Tensor, vectors: list[Tensor], tables: RoutingTables) -> Tensor:
    """Each row of x times 1 + Σ weight · (vector - 1) over its entries, in x's dtype."""
    if not vectors:
        return x
    rows = x.reshape(-1, x.shape[-1])
    if is_ordinary(x) and all(is_ordinary(vector) for vector in vectors):
        return scale_routed(rows, vectors, *tables).view(x.shape)
    order, starts, weights = tables
    changes = torch.stack([*(vector - 1 for vector in vectors), torch.zeros_like(vectors[0])])
    factor = torch.ones_like(rows, dtype=changes.dtype)
    for p, (line, bounds) in enumerate(zip(order.long(), starts.long(), strict=True)):
        slots = torch.bucketize(torch.arange(len(line), device=line.device), bounds[1:], right=True)
        change = changes[slots] if weights is None else changes[slots] * weights[p].unsqueeze(1)
        factor = factor.index_add(0, line, change)
    return (rows * factor).to(x.dtype).view(x.shape)


class Linear(IA3Layer):
    """IA³ on nn.Linear or transformers' Conv1D; named as in PEFT, where layer reports show it as `ia3.Linear`."""


def linear_base_for(module: nn.Module, where: str = "") -> Base:
    """The kind of a base layer, which must be a linear one.

    Raises:
        ValueError, NotImplementedError: as `base_for`; ValueError for an embedding, which IA³ cannot scale.
    """
    base = base_for(module, where)
    if isinstance(base, EmbeddingBase):
        raise ValueError(f"IA3 adapts linear layers; {where or 'the layer'} is an Embedding. Change target_modules.")
    return base
