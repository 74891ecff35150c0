"""Which keys of a state dict belong to an adapter, and what a file calls them.

This is told from the modules, not from how keys look: a base model may have a module called `lora_head`, and an adapter
may be called `weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastpeft.config import PeftConfig
from fastpeft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper

_WRAPPED = "base_model.model."  # what the keys of a PeftModel start with, and those of every file
_FSDP = "_fsdp_wrapped_module."  # stands in module names, not in state-dict keys


def adapter_prefixes(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Where an adapter's own weights are in a state dict: prefix of their keys -> the same without the adapter's name.

    Everything on a tuner layer but the wrapped layer belongs to adapters. What is kept by adapter name (ModuleDict,
    ParameterDict) belongs to the one it is named after, anything else to all. A module may say that files know its one
    weight by the name of the container alone (DoRA's magnitude).
    """
    prefixes = {}
    copies = [f"{name}.modules_to_save." for name, _ in wrapped_modules(model)]
    for name, module in modules_by_state_name(model):
        if not isinstance(module, (BaseTuner, BaseTunerLayer)) or any(name.startswith(copy) for copy in copies):
            continue
        parts = [
            *module.named_children(),
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]
        for attribute, part in parts:
            path = f"{name}.{attribute}".removeprefix(".")
            if attribute in ("base_layer", "model"):
                continue
            if not isinstance(part, (nn.ModuleDict, nn.ParameterDict)):
                prefixes[path] = path
            elif adapter_name in part:
                single = getattr(part[adapter_name], "single_weight_in_files", False)
                prefixes[f"{path}.{adapter_name}{'.weight' if single else ''}"] = path
    return prefixes


def prefixes_of_others(model: Any, adapter_name: str) -> set[str]:
    """Prefixes of what belongs to other adapters alone, whole trained modules included."""
    prefixes: set[str] = set()
    for other in model.peft_config:
        if other != adapter_name:
            prefixes |= {key for key, shared in adapter_prefixes(model, other).items() if key != shared}
            for name, wrapper in wrapped_modules(model):
                prefixes |= {f"{name}.{key}" for key in wrapper.adapter_state_dict_load_map(other).values()}
    return prefixes


def modules_by_state_name(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        yield name.replace(_FSDP, ""), module


def wrapped_modules(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module) for name, module in modules_by_state_name(model) if isinstance(module, AuxiliaryTrainingWrapper)
    ]


def prefix_of(key: str, prefixes: Mapping[str, str] | set[str]) -> str | None:
    """The prefix, ending at a dot or at the key's end, that a key lies under."""
    end = len(key)
    while end > 0:
        if key[:end] in prefixes:
            return key[:end]
        end = key.rfind(".", 0, end)
    return None


def bias_keys(model: nn.Module, state: Mapping[str, Tensor], config: PeftConfig) -> set[str]:
    """Biases of the base model that train with the adapter."""
    bias = getattr(config, "bias", "none")
    if bias == "none":
        return set()
    if bias == "all":
        return {key for key in state if key == "bias" or key.endswith(".bias")}
    layers = [name for name, module in modules_by_state_name(model) if isinstance(module, BaseTunerLayer)]
    return {f"{name}.base_layer.bias".removeprefix(".") for name in layers} & state.keys()


def without_adapter_name(key: str, adapter_name: str) -> str:
    """A base model's key as files have it: an adapter's name is dropped as last or last but one part, as PEFT does."""
    parts = key.split(".")
    for position in (-1, -2):
        if -position < len(parts) and parts[position] == adapter_name:
            return ".".join(parts[:position] + parts[position:][1:])
    return key


def with_model_keys(model: nn.Module, weights: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Weights of a file under the keys that the model has for them."""
    state = model.state_dict()
    prefixes = adapter_prefixes(model, adapter_name)
    to_model = {}
    for key in state:
        prefix = prefix_of(key, prefixes)
        if prefix is not None:
            to_model[prefixes[prefix] + key[len(prefix) :]] = key
    absent = []
    for name, wrapper in wrapped_modules(model):
        for file_key, own_key in wrapper.adapter_state_dict_load_map(adapter_name).items():
            to_model[f"{name}.{file_key}"] = f"{name}.{own_key}"
            if not {f"{name}.{file_key}", f"{_WRAPPED}{name}.{file_key}"} & weights.keys():
                absent.append(f"{name}.{file_key}")
    if absent:
        raise ValueError(
            f"the weights lack {absent}, which the adapter's modules_to_save need; load a file that was saved with the "
            "same modules_to_save"
        )
    # a file's keys start with what a PeftModel adds; injected into a bare model, the same adapter has shorter ones
    is_wrapped = any(key.startswith(_WRAPPED) for key in state)
    found = {key if is_wrapped else key.removeprefix(_WRAPPED): value for key, value in weights.items()}
    return {to_model.get(key, key): value for key, value in found.items()}
