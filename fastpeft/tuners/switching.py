"""Switching, deleting and casting the adapters of a model, whether or not a tuner object is around it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastpeft.tuners.biases import unfreeze_biases
from fastpeft.tuners.tuner_layer import BaseTunerLayer, next_active_adapters
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper
from fastpeft.utils.constants import UPCAST_DTYPES
from fastpeft.utils.trainable import set_auxiliary_adapter


def _tuner_layers(model: nn.Module, layer_cls: type[Any] = BaseTunerLayer) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, layer_cls)]


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Activate adapters: only these run from now on, and only these are trained.

    Args:
        model: any model with adapter layers in it.
        adapter_name: one name or several.
        inference_mode: keep them frozen.
        layer_cls: the kind of adapter layer to look for.

    Raises:
        ValueError: two of the adapters train the same module whole; nothing has changed then.
    """
    set_auxiliary_adapter(model, adapter_name, inference_mode=inference_mode)
    layers = _tuner_layers(model, layer_cls)
    merged = [layer for layer in layers if layer.merged]
    if merged:
        warnings.warn("adapters are merged; they are unmerged before others become active", stacklevel=2)
    for layer in merged:
        layer.unmerge()
    for layer in layers:
        layer.set_adapter(adapter_name, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Train or freeze adapters, whether they are active or not."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.set_requires_grad(adapter_names, requires_grad)


def check_not_merged(model: nn.Module, adapter_name: str) -> None:
    """Raises ValueError if an adapter is merged into some base weight: it would stay there for good."""
    if any(adapter_name in layer.merged_adapters for layer in _tuner_layers(model)):
        raise ValueError(f"adapter {adapter_name!r} is merged into the base model; call unmerge_adapter() first")


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> list[str] | None:
    """Delete an adapter from all layers of a model.

    If it was the only active one, the first of the others by name becomes active on all layers, with a warning.

    Args:
        prefix: unused, layers are found by their class; kept for programs that call this function of PEFT.

    Returns:
        The names that are active now; None if there are none.

    Raises:
        ValueError: no such adapter, or it is merged. Nothing has changed then.
    """
    layers = _tuner_layers(model, layer_cls)
    wrappers: list[Any] = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    available = {name for module in (*layers, *wrappers) for name in module._get_available_adapters()}
    if adapter_name not in available:
        raise ValueError(
            f"no adapter {adapter_name!r} on this model; there are: {', '.join(sorted(available)) or 'none'}"
        )
    check_not_merged(model, adapter_name)

    active: list[str] = next((module.active_adapters for module in (*layers, *wrappers)), [])
    was_active = adapter_name in active
    new = next_active_adapters(active, adapter_name, available - {adapter_name}) if was_active else list(active)
    for wrapper in wrappers:
        wrapper.delete_adapter(adapter_name, new_active_adapters=new)
    for layer in layers:
        layer.discard_adapter(adapter_name)
        if was_active:
            layer.set_adapter(new)
    if was_active:
        set_auxiliary_adapter(model, new)
    return new or None


@contextmanager
def keep_trainability(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the parameters that are there now end with the requires_grad they have now."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad = requires_grad


def freeze_base_model(
    model: nn.Module, biases: Sequence[str], layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> None:
    """Freeze what belongs to no adapter, but for the biases that adapters train.

    Args:
        biases: the `bias` of each active adapter's config.
    """
    kept = {id(parameter) for parameter in _adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad = False
    for bias in biases:
        unfreeze_biases(model, bias, _tuner_layers(model, layer_cls))


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all adapters, and all those of modules that are trained whole."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from module.parameters()
        elif isinstance(module, BaseTunerLayer):
            for _, part in module._parts():
                yield from part.parameters() if isinstance(part, nn.Module) else [part]


def settle_adapters(model: nn.Module) -> None:
    """Let all layers know that adapters were added, loaded or cast."""
    for layer in _tuner_layers(model):
        layer.settle_adapters()


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Raise an adapter's 16-bit and 8-bit weights to fp32, for stable training. In place."""
    if not autocast_adapter_dtype:
        return
    narrow = {torch.float16, torch.bfloat16, *(getattr(torch, n) for n in UPCAST_DTYPES if hasattr(torch, n))}
    for layer in _tuner_layers(model):
        for _, part in layer._parts([adapter_name]):
            for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
                if parameter.dtype in narrow:
                    parameter.data = parameter.data.float()
