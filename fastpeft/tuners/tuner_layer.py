"""What every layer with adapters has in common: which adapters it holds, which are active, which are merged."""

import warnings
from abc import ABC
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.utils.integrations import offload_hook
from fastpeft.utils.modules import set_requires_grad_on


class BaseTunerLayer(ABC):
    """Mixin for an nn.Module that wraps `base_layer` and keeps trainable weights by adapter name.

    A subclass names its containers (ModuleDict, ParameterDict, dict), all keyed by adapter name.
    """

    base_layer: nn.Module
    adapter_layer_names: tuple[str, ...] = ()  # containers of trainable weights
    other_param_names: tuple[str, ...] = ()  # containers of everything else: rank, scaling, dropout ...

    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"
    _paused: list[str] | None = None  # while disabled: the adapters that were trainable before
    merged_adapters: list[str] = []  # noqa: RUF012  (PEFT's class attribute; an instance always sets its own)
    cast_input_dtype_enabled: bool = True

    # The base layer.

    def get_base_layer(self) -> Any:  # a module of any kind: its attributes are its own
        """The module below all adapter layers, should they be nested."""
        layer: Any = self
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: some models read it from what they take for a plain layer (T5's `wo.weight`)."""
        return self.get_base_layer().weight

    @property
    def bias(self) -> Tensor | None:
        return self.get_base_layer().bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def unmerge(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} cannot be unmerged")

    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raise what `merge` would raise, and change nothing."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def settle_adapters(self) -> None:  # noqa: B027  (most methods have nothing to do)
        """Called when adapters were added, loaded or cast: for methods to arrange what many adapters share."""

    # State.

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the layer adds to its base weight, so that it can be written as LoRA. For methods to override."""
        return False

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    def _containers(self, names: Sequence[str]) -> list[Any]:
        return [container for name in names if hasattr(container := getattr(self, name), "keys")]

    def _get_available_adapters(self) -> set[str]:
        """Names of the adapters with weights on this layer."""
        return {name for container in self._containers(self.adapter_layer_names) for name in container}

    def _all_available_adapter_names(self) -> list[str]:
        return sorted({n for c in self._containers(self.adapter_layer_names + self.other_param_names) for n in c})

    def _parts(self, adapter_names: Sequence[str] | None = None) -> list[tuple[str, Any]]:
        """`(adapter name, its Module or Parameter)` for all weights of these adapters, or of all adapters."""
        return [
            (name, part)
            for container in self._containers(self.adapter_layer_names)
            for name, part in container.items()
            if adapter_names is None or name in adapter_names
        ]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters, and only these, and train them (unless `inference_mode`); freeze all others."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, part in self._parts():
            set_requires_grad_on(part, name in names and not inference_mode)
        self._active_adapter = names
        self._paused = None

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off. Off freezes them; on again restores which of them were trainable."""
        if enabled:
            trainable = self.active_adapters if self._paused is None else self._paused
            self._paused = None
        else:
            trainable = []
            if self._paused is None:
                self._paused = [name for name, part in self._parts() if _is_trainable(part)]
        for name, part in self._parts():
            set_requires_grad_on(part, name in trainable)
        self._disable_adapters = not enabled

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze these adapters, whether they are active or not."""
        for _, part in self._parts([adapter_names] if isinstance(adapter_names, str) else adapter_names):
            set_requires_grad_on(part, requires_grad)

    def discard_adapter(self, adapter_name: str) -> None:
        """Drop an adapter's weights and settings. The caller sees to which adapters are active next."""
        for container in self._containers(self.adapter_layer_names + self.other_param_names):
            if adapter_name in container:
                del container[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter. If it was the only active one, the first of the others by name becomes active.

        On a model, use the model's `delete_adapter`: it chooses the same new adapter on all layers.
        """
        self.discard_adapter(adapter_name)
        if adapter_name in self.active_adapters:
            self.set_adapter(next_active_adapters(self.active_adapters, adapter_name, self._get_available_adapters()))

    # Devices and dtypes.

    def _get_base_layer_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Where the base computes and in which floating dtype; None where that cannot be told."""
        weight = getattr(self.get_base_layer(), "weight", None)
        if not isinstance(weight, Tensor):
            return None, None
        device = weight.device
        hook = offload_hook(self.get_base_layer())
        if device.type == "meta" and hook is not None and hook.execution_device is not None:
            device = torch.device(hook.execution_device)
        return device, weight.dtype if weight.is_floating_point() or weight.is_complex() else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter to the device, and to the dtype, of the base layer. Weights on meta stay there."""
        base_device, dtype = self._get_base_layer_device_and_dtype()
        device = device or base_device
        if device is None:
            return
        containers = self._containers(self.adapter_layer_names + self.other_param_names)
        for part in [container[adapter_name] for container in containers if adapter_name in container]:
            if isinstance(part, nn.Module):
                if not any(p.is_meta for p in part.parameters()):
                    part.to(device=device, dtype=dtype)
            elif isinstance(part, Tensor) and not part.is_meta:
                part.data = part.data.to(device=device, dtype=dtype if part.is_floating_point() else None)

    def _cast_input_dtype(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """x in the adapter's dtype, unless `helpers.disable_input_dtype_casting` switched that off."""
        if x is None or not self.cast_input_dtype_enabled or x.dtype == dtype:
            return x
        return x.to(dtype)


def _is_trainable(part: nn.Module | Tensor) -> bool:
    return part.requires_grad if isinstance(part, Tensor) else any(p.requires_grad for p in part.parameters())


def next_active_adapters(active: Sequence[str], deleted: str, available: set[str]) -> list[str]:
    """What is active once an active adapter is deleted: the other active ones, or else the first by name."""
    remaining = [name for name in active if name != deleted]
    if remaining or not available:
        return remaining
    first = min(available)
    warnings.warn(f"adapter {deleted!r} was active and is deleted; {first!r} is active now", stacklevel=4)
    return [first]


def check_adapters_to_merge(layer: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters that are still to be merged: of those named, or else of the active ones.

    Raises:
        TypeError: a single name instead of a list.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names must be a list of names, got {adapter_names!r}; pass [{adapter_names!r}]")
    names = list(layer.active_adapters if adapter_names is None else adapter_names)
    if not layer.merged:
        return names
    rest = [name for name in names if name not in layer.merged_adapters]
    if rest:
        warnings.warn(f"{layer.merged_adapters} are merged already; merging {rest} on top of them", stacklevel=3)
    else:
        warnings.warn(f"{names} are merged already, nothing to do", stacklevel=3)
    return rest
