"""The LoRA layer: one base layer, and by adapter name two small factors and a variant that says how they act."""

import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastpeft.routing import as_routing
from fastpeft.routing_scope import routing_for
from fastpeft.tuners.bases import Base, base_for
from fastpeft.tuners.lora.factor_bank import FactorBank
from fastpeft.tuners.lora.few import forward_of_few
from fastpeft.tuners.lora.fused import fused_forward
from fastpeft.tuners.lora.repeated_batch import RepeatedBatch
from fastpeft.tuners.lora.routed import routed_forward
from fastpeft.tuners.lora.variants import LoraVariant, variant_for
from fastpeft.tuners.shared_inputs import InputGroup
from fastpeft.tuners.tuner_layer import BaseTunerLayer, check_adapters_to_merge
from fastpeft.utils.walks import set_mode_below
from fastpeft.utils.warning import PeftWarning


class LoraLayer(nn.Module, BaseTunerLayer):
    """y = base(x) + scaling · drop(x) Aᵀ Bᵀ, base frozen. arXiv:2106.09685 section 4.1.

    What depends on the kind of base layer is in `base` (fastpeft.tuners.bases), what depends on the method in
    `variants`. Nothing on the layer changes during a forward. What layers share that are called on one tensor is in
    their `input_group`, while their parent's forward runs.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = (
        "r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "variants",
    )  # fmt: skip

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int, lora_alpha: float, **kwargs: Any
    ) -> None:
        """Wrap a base layer and give it a first adapter, which is active.

        Raises:
            ValueError, NotImplementedError: no such base layer, rank or option; see `check_adapter`.
        """
        super().__init__()
        self.base_layer = base_layer
        self.base: Base = base_for(self.get_base_layer(), kwargs.get("target_name", ""))
        self.in_features, self.out_features = self.base.features(self.get_base_layer())
        self.fan_in_fan_out = self.base.fan_in_fan_out
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict({})
        self.lora_A = nn.ModuleDict({})
        self.lora_B = nn.ModuleDict({})
        self.lora_embedding_A = nn.ParameterDict({})
        self.lora_embedding_B = nn.ParameterDict({})
        self.lora_magnitude_vector = nn.ModuleDict({})
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.variants: dict[str, LoraVariant] = {}
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}  # with which the merged adapters were merged
        self._merged_state: dict[str, Any] = {}  # what their variants must know to unmerge them
        self.cast_input_dtype_enabled = True
        self.input_group: InputGroup | None = None
        self.factor_bank = FactorBank()
        self.repeated_batch = RepeatedBatch()
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    # Adapters.

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add an adapter, or make one of that name anew. It is trainable if it is active.

        Args:
            r: rank; the config's own is overridden by rank_pattern.
            lora_alpha: numerator of the scaling, likewise.
            config: a LoraConfig.
        """
        check_adapter(self.base, self.get_base_layer(), r, config, kwargs.get("target_name", ""))
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged; unmerge it before it is replaced")
        if config.lora_bias and getattr(self.get_base_layer(), "bias", None) is None:
            kind = type(self.get_base_layer()).__name__
            warnings.warn(
                f"lora_bias=True on a {kind} without bias: the adapter cannot be merged", PeftWarning, stacklevel=2
            )
        self.repeated_batch.forget()
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.lora_bias[adapter_name] = config.lora_bias
        self.variants[adapter_name] = variant_for(config)
        self.scaling[adapter_name] = self._initial_scale(adapter_name)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.base.create_factors(self, adapter_name, r, config.lora_bias)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        if adapter_name in self.lora_magnitude_vector:
            del self.lora_magnitude_vector[adapter_name]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.variants[adapter_name].create_parameters(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str | None) -> None:
        """Draw the factors anew so that the adapter changes nothing: True or "gaussian". False or None leaves them."""
        if init_lora_weights is False or init_lora_weights is None:
            return
        gaussian = isinstance(init_lora_weights, str) and init_lora_weights.lower() == "gaussian"
        if init_lora_weights is not True and not gaussian:
            raise ValueError(f'init_lora_weights must be True, False or "gaussian", got {init_lora_weights!r}')
        self.base.reset_factors(self, adapter_name, gaussian)

    def settle_adapters(self) -> None:
        self.repeated_batch.forget()
        self.factor_bank.gather(self)

    def discard_adapter(self, adapter_name: str) -> None:
        super().discard_adapter(adapter_name)
        self.settle_adapters()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(*args, **kwargs)
        self.settle_adapters()  # each tensor for itself was cast, or brought here
        return moved

    def train(self, mode: bool = True) -> Self:
        if not isinstance(mode, bool):
            raise ValueError(f"training mode is expected to be boolean, got {mode!r}")
        self.training = mode
        set_mode_below(self, mode)
        return self

    # Scaling.

    def _initial_scale(self, adapter: str) -> float:
        """alpha / r, or alpha / √r with rank-stabilised LoRA (arXiv:2312.03732)."""
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times what its config gave it; pass over one that is not here."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._initial_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of all active adapters."""
        for adapter in self._active_here():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of all active adapters, or reset it to what their config gave them."""
        for adapter in self._active_here():
            self.scaling[adapter] = self._initial_scale(adapter) if scale is None else self.scaling[adapter] / scale

    # Merging.

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """It is LoRA."""
        return True

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base weight: in its layout, in the adapter's dtype."""
        return self.variants[adapter].delta_weight(self, adapter).to(self.base.factors(self, adapter)[1].dtype)

    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raise what `merge` would raise, and change nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.r and name not in self.merged_adapters]
        self._check_mergeable(names)
        if safe_merge:
            self._merged_tensors(names, safe=True)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight, and into its bias with lora_bias. All or none of them.

        Args:
            safe_merge: look for NaN and infinity in the result before it is stored.
            adapter_names: those to merge; by default the active ones. Adapters not on this layer are passed over.

        Raises:
            ValueError: with safe_merge, the result is not finite; or an adapter's weights were never loaded.
            RuntimeError: the adapter has a bias (lora_bias) and the base layer has none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if names:
            self._check_mergeable(names)
            weight, bias, state = self._merged_tensors(names, safe_merge)
            self._store(weight, bias)
            self.merged_adapters += names
            self._merged_state |= state
            self._merged_scaling |= {name: self.scaling[name] for name in names}

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, the last one first."""
        if not self.merged:
            warnings.warn("no adapter is merged, nothing to do", stacklevel=2)
            return
        self._store(*self._unmerged_tensors())
        self.merged_adapters = []
        self._merged_scaling = {}
        self._merged_state = {}

    def _unmerged_tensors(self) -> tuple[Tensor, Tensor | None]:
        """The base weight and bias without the merged adapters; new tensors where they differ."""
        module = self.get_base_layer()
        weight, bias = module.weight.data, getattr(module, "bias", None)
        scaling = dict(self.scaling)
        self.scaling.update(self._merged_scaling)
        try:
            for name in reversed(self.merged_adapters):
                weight = self.variants[name].unmerge(self, name, weight, self._merged_state[name])
                bias = self._with_factor_bias(name, bias, -1)
        finally:
            self.scaling.update(scaling)
        return weight, bias

    def _check_mergeable(self, names: Sequence[str]) -> None:
        for name in names:
            if any(factor.is_meta for factor in self.base.factors(self, name)):
                raise ValueError(f"adapter {name!r} has no weights yet (it is on the meta device); load them first")
            if self.base.factor_bias(self, name) is not None and getattr(self.get_base_layer(), "bias", None) is None:
                raise RuntimeError(
                    f"adapter {name!r} has a bias (lora_bias=True) and the base layer has none to merge it into; "
                    "use the adapter unmerged"
                )

    @torch.no_grad()
    def _merged_tensors(
        self, names: Sequence[str], safe: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor | None]]:
        """The base weight and bias with these adapters in them, new tensors where they differ; and merge states."""
        module = self.get_base_layer()
        weight, bias = module.weight.data, getattr(module, "bias", None)
        base_weight, _ = self._unmerged_tensors()
        state: dict[str, Any] = {}
        for name in names:
            weight, state[name] = self.variants[name].merge(self, name, weight, base_weight)
            bias = self._with_factor_bias(name, bias, 1)
            if safe and not all(t is None or bool(t.isfinite().all()) for t in (weight, bias)):
                raise ValueError(
                    f"merging adapter {name!r} would put NaN or infinity into the base weight; nothing was merged. "
                    "Look at the adapter's weights and at its scaling."
                )
        return weight, bias, state

    @torch.no_grad()
    def _with_factor_bias(self, adapter: str, bias: Tensor | None, sign: int) -> Tensor | None:
        factor_bias = self.base.factor_bias(self, adapter)
        if factor_bias is None:
            return bias
        assert bias is not None, "checked in _check_mergeable"
        return (bias + sign * self.scaling[adapter] * factor_bias).to(bias.dtype)

    @torch.no_grad()
    def _store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write into the base layer's own storage, which other tensors may share (tied weights)."""
        module = self.get_base_layer()
        module.weight.data.copy_(weight)
        if bias is not None and bias is not module.bias:
            module.bias.data.copy_(bias)

    # Forward.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters, in the base layer's output dtype.

        Args:
            x: the base layer's input, (..., K), or integer ids for an embedding.
            adapter_names: with this keyword, row i of the batch takes the adapter of that name and no other; else
                the routing in force decides (fastpeft.routing), or the active adapters where there is none.
        """
        adapter_names = kwargs.pop("adapter_names", None) if kwargs else None
        if kwargs and kwargs.pop("alora_offsets", None) is not None:
            raise NotImplementedError("alora_offsets (activated LoRA) is not supported yet")
        routing = routing_for(self) if adapter_names is None else as_routing(adapter_names)
        if routing is not None and not self._disable_adapters:
            return routed_forward(self, routing, x, *args, **kwargs)
        if self._disable_adapters and self.merged:
            self.unmerge()
        plain_call = not args and not kwargs
        if plain_call and (out := forward_of_few(self, x)) is not None:
            return out
        adapters = self.adapters_to_apply()
        if plain_call and adapters and (out := fused_forward(self, adapters, x)) is not None:
            return out
        return self._add(self.base_layer(x, *args, **kwargs), x, adapters)

    def adapters_to_apply(self) -> list[str]:
        """The adapters that a forward without `adapter_names` adds, in order."""
        return [] if self._disable_adapters or self.merged_adapters else self._active_here()

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.r]

    def _add(self, out: Tensor, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """Add adapters to the base layer's output. With none of them, the very same tensor."""
        dtype = out.dtype
        if len(adapters) > 1:  # one rounding at the end, whatever their number
            out = out.to(torch.promote_types(dtype, torch.float32))
        for name in adapters:
            out = self.variants[name].add(self, name, out, x)
        return out.to(dtype)

    def __repr__(self) -> str:
        return f"lora.{super().__repr__()}"


class Linear(LoraLayer):
    """LoRA on nn.Linear or transformers' Conv1D; named as in PEFT, where layer reports show it as `lora.Linear`."""


class Embedding(LoraLayer):
    """LoRA on nn.Embedding; reports show `lora.Embedding`."""


def check_adapter(base: Base, module: nn.Module, r: int, config: Any, where: str = "") -> None:
    """Raise for an adapter that this base layer cannot take; nothing has been created then.

    Raises:
        ValueError: the rank is no positive number, or lora_bias on a layer that cannot have it.
        NotImplementedError: DoRA on a layer for which it is not built.
    """
    at = f" for {where}" if where else ""
    if isinstance(r, bool) or not isinstance(r, numbers.Integral) or r <= 0:
        raise ValueError(f"the rank r must be a positive integer, got {r!r}{at}; see r and rank_pattern")
    if config.lora_bias and not base.supports_lora_bias:
        kind = type(module).__name__
        raise ValueError(f"lora_bias=True is not possible{at}: {kind} has no bias; leave it out of target_modules")
    if config.use_dora and not base.supports_dora:
        kind = type(module).__name__
        raise NotImplementedError(
            f"use_dora=True is not supported yet on {kind}{at}: leave it out of target_modules, or adapt it "
            "without DoRA"
        )
