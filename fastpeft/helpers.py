"""Occasional helpers: temporary scaling, dtype casting off, signatures for help() and inspect."""

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastpeft.config import PeftConfig
from fastpeft.tuners.lora.layer import LoraLayer
from fastpeft.tuners.tuner_layer import BaseTunerLayer

__all__ = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """While the context lasts, all LoRA adapters of the model act `multiplier` times as strongly.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: there is no LoRA layer in the model.
    """
    if not isinstance(multiplier, int | float):
        raise TypeError(f"multiplier must be a number, got {type(multiplier).__name__}")
    before = {module: module.scaling for module in model.modules() if isinstance(module, LoraLayer)}
    if not before:
        raise ValueError(f"there is no LoRA layer in this {type(model).__name__}; its scaling cannot be changed")
    try:
        for layer, scaling in before.items():
            layer.scaling = {adapter: scale * multiplier for adapter, scale in scaling.items()}
        yield
    finally:
        for layer, scaling in before.items():
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """While the context lasts, adapter layers do not cast their input to the dtype of their weights.

    For models whose hooks cast weights layer by layer, where the stored dtype is not the one that computes.

    Args:
        active: with False, nothing changes.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or a hub repository holds an adapter. False also where that cannot be found out."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:
        return False
    return True


def _is_opaque(method: Any) -> bool:
    """Whether a method takes whatever comes: (*args, **kwargs) or (**kwargs)."""
    kinds = {parameter.kind for parameter in inspect.signature(method).parameters.values()}
    return bool(kinds) and kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def _document(model: Any, name: str) -> None:
    """Give an opaque method of a PeftModel the signature and docstring of the base model's."""
    method = getattr(model, name, None)
    if method is None or not _is_opaque(method):
        return
    theirs = getattr(type(model.get_base_model()), name)
    ours = method.__func__

    def documented(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    functools.update_wrapper(documented, theirs)  # __wrapped__ is what inspect.signature reads
    setattr(model, name, types.MethodType(documented, model))


def update_forward_signature(model: Any) -> None:
    """Let `help(model.forward)` and `inspect.signature` show the base model's forward, where ours shows nothing."""
    _document(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Let `help(model.generate)` and `inspect.signature` show the base model's generate, where ours shows nothing."""
    _document(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Both of the above, or one: "forward", "generate" or "all"."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f'method must be "forward", "generate" or "all", got {method!r}')
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)
