"""PEFT's collection of helpers, under the path where programs look for them; the code is in modules by subject."""

import os
import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from fastpeft.utils.constants import (
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    WEIGHTS_NAME,
)
from fastpeft.utils.modules import freeze_adapter as _freeze_adapter
from fastpeft.utils.modules import get_submodules as _get_submodules
from fastpeft.utils.modules import input_embeddings_name as _get_input_embeddings_name
from fastpeft.utils.modules import module_names_tied_with_embedding as _get_module_names_tied_with_embedding
from fastpeft.utils.modules import set_requires_grad_on as _set_layer_requires_grad
from fastpeft.utils.modules import storage_identity as id_tensor_storage
from fastpeft.utils.modules import transpose
from fastpeft.utils.trainable import set_additional_trainable_modules
from fastpeft.utils.trainable import set_auxiliary_adapter as _set_adapter
from fastpeft.utils.trainable import set_trainable as _set_trainable
from fastpeft.utils.training import (
    cast_mixed_precision_params,
    fsdp_auto_wrap_policy,
    infer_device,
    prepare_model_for_kbit_training,
    shift_tokens_right,
)

__all__ = [
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_module_names_tied_with_embedding",
    "_get_submodules",
    "_is_valid_match",
    "_set_adapter",
    "_set_layer_requires_grad",
    "_set_trainable",
    "cast_mixed_precision_params",
    "check_file_exists_on_hf_hub",
    "fsdp_auto_wrap_policy",
    "get_pattern_key",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "match_target_against_key",
    "prepare_model_for_kbit_training",
    "set_additional_trainable_modules",
    "shift_tokens_right",
    "str_to_bool",
    "transpose",
]


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """A regular expression given as `target_modules` has to match a module's whole path."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first of the patterns that matches a module's path from some dot to its end; else the path itself."""
    return next((key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match)), key_to_match)


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether `target_key` is the path `key` or its end, from a dot on."""
    return f".{key}".endswith(f".{target_key}")


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    for tensor in (input_ids, inputs_embeds):
        if tensor is not None:
            return int(tensor.shape[0])
    raise ValueError("pass input_ids or inputs_embeds: both are None, so the batch size is unknown")


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The quantisation config of a transformers model that was quantised by this method, else None."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def str_to_bool(value: str) -> bool:
    """Read a switch from an environment variable: y, yes, t, true, on, 1 or n, no, f, false, off, 0, in any case."""
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return True
    if word in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError(f"expected a yes or no (1/0, true/false, on/off, y/n), got {value!r}")


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a hub repository has a file; None where that cannot be found out (offline, or no such repository)."""
    from huggingface_hub import file_exists
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    if str_to_bool(os.environ.get("HF_HUB_OFFLINE", "0")):
        return None
    try:
        return bool(file_exists(repo_id, filename, **kwargs))
    except (HFValidationError, EntryNotFoundError):
        return None
    except Exception as error:
        warnings.warn(f"could not look for {filename} in {repo_id} on the hub: {error}", stacklevel=2)
        return None
