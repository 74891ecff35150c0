"""Biases of the base model that adapters train (`bias` in a config). No adapter has a copy of its own."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn


def bias_of(config: Any) -> str:
    """Which biases a config trains: "none", "all" of the model, or "<method>_only" of the adapted layers."""
    return getattr(config, "bias", "none")


def check_biases(configs: Mapping[str, Any]) -> None:
    """Raises ValueError where more than one adapter, by name -> config, trains biases."""
    with_bias = [name for name, config in configs.items() if bias_of(config) != "none"]
    if len(with_bias) > 1:
        raise ValueError(
            f"only one adapter of a model can train biases, they have no copy each: {with_bias} have bias other "
            'than "none". Set bias="none" for all but one.'
        )


def warn_of_biases(configs: Mapping[str, Any], adapters: Iterable[str]) -> None:
    """Warn that switching these adapters off leaves the biases that they trained."""
    for adapter in adapters:
        if (bias := bias_of(configs[adapter])) != "none":
            warnings.warn(
                f"adapter {adapter!r} trains biases (bias={bias!r}), which are part of the base model and stay as "
                "they are: without its adapters the model is not the base model",
                stacklevel=3,
            )


def unfreeze_biases(model: nn.Module, bias: str, layers: Sequence[Any]) -> None:
    """Train the biases that a config names.

    Args:
        layers: the adapted ones.
    """
    if bias == "all":
        for name, parameter in model.named_parameters():
            if f".{name}".endswith(".bias"):
                parameter.requires_grad = True
    elif bias.endswith("_only"):
        for layer in layers:
            if getattr(layer, "bias", None) is not None:
                layer.bias.requires_grad = True
    elif bias != "none":
        raise NotImplementedError(f'bias must be "none", "all" or "<method>_only" ("lora_only"), got {bias!r}')
