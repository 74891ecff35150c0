"""Adapter weights: out of a model, into a model, onto disk.

In a model, the keys of adapter weights carry the adapter's name (`q_proj.lora_A.default.weight`); in a file they do not
(`q_proj.lora_A.weight`), so that an adapter can be loaded under any name. Which keys belong to an adapter is found from
the modules, not from how the keys look.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from fastpeft import adapter_files
from fastpeft.adapter_keys import (
    adapter_prefixes,
    bias_keys,
    prefix_of,
    prefixes_of_others,
    with_model_keys,
    without_adapter_name,
    wrapped_modules,
)
from fastpeft.config import PeftConfig
from fastpeft.saved_embeddings import embedding_keys
from fastpeft.sealed_file import AdapterFileError, MixedAdapterError, read_tensors
from fastpeft.tuners.switching import check_not_merged
from fastpeft.tuners.tuners_utils import BaseTunerLayer
from fastpeft.utils.modules import storage_identity
from fastpeft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING
from fastpeft.utils.warning import PeftWarning
from fastpeft.weights import check_pair, load_peft_weights

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys

__all__ = [
    "AdapterFileError",
    "MixedAdapterError",
    "adapter_folder",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "read_adapter_files",
    "reseal_adapter",
    "save_adapter_files",
    "set_peft_model_state_dict",
]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] | str = "auto",
) -> dict[str, Tensor]:
    """The weights of one adapter under the keys of a file, without the adapter's name.

    Args:
        model: a PeftModel, or a model that adapters were injected into; the bare model inside DDP, FSDP or DeepSpeed.
        state_dict: weights to choose from, where the model's own are sharded; `model.state_dict()` unless given.
        adapter_name: which adapter.
        unwrap_compiled: look through torch.compile's wrapper.
        save_embedding_layers: also return the base model's embeddings. "auto": where they are targets, or were resized.

    Returns:
        Key to tensor; tensors are the model's own, not copies.

    Raises:
        ValueError: the model has no such adapter.
        NotImplementedError: the model is tensor-parallel.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = _config_of(model, adapter_name)
    _refuse_tensor_parallel(model)
    whole_state = model.state_dict() if state_dict is None else state_dict
    of_others = prefixes_of_others(model, adapter_name)
    state = {key: value for key, value in whole_state.items() if prefix_of(key, of_others) is None}
    own = adapter_prefixes(model, adapter_name)
    weights = {own[prefix] + key[len(prefix) :]: state[key] for key in state if (prefix := prefix_of(key, own))}
    extra = {*bias_keys(model, state, config), *embedding_keys(model, state, config, save_embedding_layers)}
    weights |= {without_adapter_name(key, adapter_name): state[key] for key in state if key in extra}
    for name, wrapper in wrapped_modules(model):
        inside = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        saved = wrapper.adapter_state_dict(adapter_name, inside)
        weights |= {f"{name}.{key}": value for key, value in saved.items()}
    if state_dict is None:  # weights that a caller put together may be of any shape
        _warn_of_shards(weights, adapter_name)
    return weights


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Put weights with the keys of a file into an adapter that the model already has.

    Everything is checked first: if this raises, the model is as it was.

    Args:
        model: a PeftModel, or a model that adapters were injected into.
        peft_model_state_dict: as get_peft_model_state_dict returns it, or as read from a file.
        adapter_name: the adapter to fill; it need not be the name under which the weights were saved.
        ignore_mismatched_sizes: leave out, with a warning, tensors of another shape than the model's.
        low_cpu_mem_usage: the adapter is on the meta device: put the given tensors in place of its own.

    Returns:
        `missing_keys`: keys of the whole model that got nothing; `unexpected_keys`: keys that fit nothing in it.

    Raises:
        ValueError: the model has no such adapter, or it is merged, or weights of its `modules_to_save` are not there.
        RuntimeError: a tensor has another shape than the model's.
        NotImplementedError: the model is tensor-parallel.
    """
    _config_of(model, adapter_name)
    check_not_merged(model, adapter_name)  # unmerging would subtract the new weights where the old ones were added
    _refuse_tensor_parallel(model)
    weights = with_model_keys(model, peft_model_state_dict, adapter_name)
    mismatched = _mismatched_shapes(model, weights)
    if mismatched and not ignore_mismatched_sizes:
        raise RuntimeError(
            f"adapter {adapter_name!r} does not fit {_type_of_base(model)}; nothing was loaded:\n"
            + "\n".join(mismatched.values())
            + "\nLoad it with the base model and the rank it was trained with, or pass ignore_mismatched_sizes=True"
        )
    if mismatched:
        weights = {key: value for key, value in weights.items() if key not in mismatched}
        listed = "\n".join(mismatched.values())
        warnings.warn(f"left as they were because of ignore_mismatched_sizes=True:\n{listed}", stacklevel=2)
    result: _IncompatibleKeys = model.load_state_dict(weights, strict=False, assign=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        _place(model, adapter_name)
    return result


def save_adapter_files(
    directory: str | os.PathLike[str],
    config: PeftConfig,
    state_dict: Mapping[str, Tensor],
    *,
    safe_serialization: bool = True,
    auto_mapping_dict: dict[str, Any] | None = None,
) -> None:
    """Write an adapter's config and weights. A crash leaves the adapter that was there, or this one, never a mixture.

    Args:
        directory: folder, made if missing. Files of other names in it are left alone.
        config: written as it is; files usually say `inference_mode=True`.
        state_dict: keys as get_peft_model_state_dict returns them; tensors may share memory and be on any device.
        safe_serialization: False writes adapter_model.bin instead of adapter_model.safetensors.
        auto_mapping_dict: class and module of a base model that has no task type.

    Raises:
        TypeError: an entry is not a whole tensor.
        OSError: the disk is full or the folder cannot be written.
    """
    adapter_files.save_pair(
        Path(directory),
        config.to_json(auto_mapping_dict),
        config.signature(),
        _storable(state_dict),
        safe_serialization=safe_serialization,
    )


def read_adapter_files(directory: str | os.PathLike[str]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config and the weights, on the CPU, of the adapter in a local folder.

    Raises:
        ValueError: there is no adapter, or a file is damaged; MixedAdapterError if the two do not belong together.
    """
    folder = Path(directory)
    config = PeftConfig.from_pretrained(folder)
    weights = adapter_files.find_weights(folder)
    if weights is None:
        raise AdapterFileError(f"{folder} has a config but no weights; it holds {sorted(os.listdir(folder))[:8]}")
    tensors, seal = read_tensors(weights)
    check_pair(weights, seal, config)
    return config, tensors


def reseal_adapter(directory: str | os.PathLike[str]) -> None:
    """Accept a config that was changed on purpose after its weights were saved: save both again as one pair."""
    folder = Path(directory)
    config = PeftConfig.from_pretrained(folder)
    weights = adapter_files.find_weights(folder)
    if weights is None:
        raise AdapterFileError(f"{folder} has no weights to go with its config; save the adapter there first")
    tensors, _ = read_tensors(weights)
    save_adapter_files(folder, config, tensors, safe_serialization=weights.suffix == ".safetensors")


def adapter_folder(directory: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where an adapter is saved: "default" in `directory`, any other name in a folder of that name inside it.

    Raises:
        ValueError: the name would lead out of `directory`.
    """
    if adapter_name == "default":
        return Path(directory)
    root = Path(directory).absolute()
    folder = Path(os.path.normpath(root / adapter_name))
    if root == folder or root not in folder.parents:
        raise ValueError(f"adapter name {adapter_name!r} leads out of {root}; rename the adapter to save it there")
    return Path(directory, adapter_name)


def _place(model: nn.Module, adapter_name: str) -> None:
    """Move weights that replaced those on the meta device to where their base layers are."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._move_adapter_to_device_of_base_layer(adapter_name)


def _mismatched_shapes(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Key -> what is wrong, for tensors of another shape than the model's."""
    state = model.state_dict()
    wrong = {}
    for key, value in weights.items():
        if key not in state or state[key].shape == value.shape:
            continue
        if state[key].ndim and state[key].shape[-1] == 1 and state[key].numel() * 2 == value.numel():
            continue  # 4-bit weights are packed two to a byte
        theirs, own = tuple(value.shape), tuple(state[key].shape)
        wrong[key] = f"- size mismatch for {key}: the weights have shape {theirs}, the model {own}"
    return wrong


def _config_of(model: Any, adapter_name: str) -> PeftConfig:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or adapter_name not in configs:
        known = f"its adapters are {sorted(configs)}" if isinstance(configs, dict) else "it has no adapters"
        raise ValueError(f"{type(model).__name__} has no adapter {adapter_name!r}; {known}")
    config: PeftConfig = configs[adapter_name]
    PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type or ""]  # raises for a method that is not built
    if config.is_prompt_learning:
        raise NotImplementedError(f"weights of {config.peft_type} live outside the layers; not supported yet")
    return config


def _type_of_base(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def _refuse_tensor_parallel(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.endswith("base_layer") and getattr(module, "_hf_device_mesh", None) is not None:
            raise NotImplementedError(
                f"{name} is sharded by tensor parallelism, where saving and loading adapters is not supported yet; "
                "load the base model without a tp_plan"
            )


def _warn_of_shards(weights: Mapping[str, Tensor], adapter_name: str) -> None:
    """LoRA factors are matrices; a shard that was not gathered is flat or empty."""
    factors = ((key, tuple(value.shape)) for key, value in weights.items() if ".lora_A" in key or ".lora_B" in key)
    bad = [(k, shape) for k, shape in factors if not k.endswith(".bias") and (len(shape) < 2 or 0 in shape)]
    if bad:
        warnings.warn(
            f"adapter {adapter_name!r} has {len(bad)} LoRA factors that are no matrices, for example {bad[0][0]} of "
            f"shape {bad[0][1]}: shards of DeepSpeed ZeRO-3 or FSDP that were not gathered. Pass a gathered state_dict "
            "or save inside deepspeed.zero.GatheredParameters or FSDP.summon_full_params",
            PeftWarning,
            stacklevel=3,
        )


def _storable(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file takes them: on the CPU, contiguous, each with memory of its own."""
    storages = set()
    tensors = {}
    for key, value in state_dict.items():
        if not isinstance(value, Tensor) or hasattr(value, "full_tensor"):
            raise TypeError(
                f"{key} is a {type(value).__name__}; an adapter file takes whole tensors. Pass a gathered state_dict"
            )
        tensor = value.detach().cpu().contiguous()
        storage = storage_identity(tensor)
        tensors[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors
