"""Putting an adapter on the modules that were chosen for it: on all of them, or on none."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.utils.integrations import init_empty_weights
from fastpeft.utils.modules import get_submodules


def check_adapter_name(name: str) -> None:
    """Raises ValueError for a name that cannot be a key of a ModuleDict."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"{name!r} cannot be the name of an adapter: expected a non-empty string without dots that is not the name "
            "of a method of torch.nn.ModuleDict"
        )


def put_on_modules(
    model: nn.Module,
    keys: Sequence[str],
    adapter_name: str,
    put: Callable[..., None],
    layer_cls: type[BaseTunerLayer],
    low_cpu_mem_usage: bool,
) -> None:
    """Put the adapter on all the modules, or, should that fail halfway (out of memory), on none.

    Args:
        keys: their paths.
        put: does it for one of them, as `BaseTuner._create_and_replace` does with the config and the adapter's name
            filled in.
        layer_cls: the method's adapter layers.
        low_cpu_mem_usage: what is created is on the meta device.
    """
    _discard(model.modules(), adapter_name, layer_cls)
    try:
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for key in keys:
                parent, target, name = get_submodules(model, key)
                put(target, name, parent, current_key=key)
    except BaseException:
        _discard(model.modules(), adapter_name, layer_cls)
        for key in keys:
            parent, layer, name = get_submodules(model, key)
            if isinstance(layer, layer_cls) and not layer._get_available_adapters():
                setattr(parent, name, layer.base_layer)
        raise


def _discard(modules: Iterable[Any], adapter_name: str, layer_cls: type[BaseTunerLayer]) -> None:
    """Take what is left of an earlier adapter of this name off its layers: the new one may target fewer."""
    for module in modules:
        if isinstance(module, layer_cls) and adapter_name in module._get_available_adapters():
            module.discard_adapter(adapter_name)
