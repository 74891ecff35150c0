"""Weights of an adapter from a folder or from the hub: found, read, checked, and their keys mapped."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers.utils.hub import http_user_agent

from fastpeft.adapter_files import find_config, find_weights
from fastpeft.config import PeftConfig
from fastpeft.sealed_file import AdapterFileError, MixedAdapterError, Seal, read_tensors
from fastpeft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from fastpeft.utils.other import infer_device
from fastpeft.utils.peft_types import PEFT_TYPE_TO_PREFIX_MAPPING

_PREFIXES = ("base_model.model.", "base_model.")  # of a file's keys, the longer one first


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: dict[str, str] | None = None,
    *,
    check_config: bool | PeftConfig = True,
    max_bytes: int | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The weights of a saved adapter.

    Args:
        model_id: folder that holds adapter_model.safetensors or adapter_model.bin, or a hub id.
        device: where to put them; this machine's accelerator unless given.
        key_mapping: patterns to replacements. Each key, without its "base_model.model.", takes the first that fits it.
        check_config: notice weights that were saved with another config than the one beside them, or than this one if
            it was read before. Switch it off to use them with a config of your own.
        max_bytes: refuse a file whose tensors occupy more, before it is in memory.
        hf_hub_download_kwargs: `subfolder`, `revision`, `token`, `cache_dir`, ...

    Returns:
        Key to tensor, with the keys of the file.

    Raises:
        OversizedFileError: the tensors occupy more than `max_bytes`.
        AdapterFileError: no weights there; a file that is truncated, damaged, or asks to run code; NaN or infinities.
        MixedAdapterError: the config beside the weights is not the one they were saved with.
    """
    path = _weights_file(model_id, dict(hf_hub_download_kwargs))
    tensors, seal = read_tensors(path, max_bytes)
    _check_finite(path, tensors)
    if seal is not None and check_config is not False:
        check_pair(path, seal, _config_beside(path) if check_config is True else check_config)
    if key_mapping:
        tensors = {_mapped(key, key_mapping): tensor for key, tensor in tensors.items()}
    device = torch.device(infer_device() if device is None else device)
    return {key: tensor.to(device) for key, tensor in tensors.items()}


def check_pair(weights: Path, seal: Seal | None, config: PeftConfig | None) -> None:
    """Raise MixedAdapterError unless a weights file and a config are of one save.

    Args:
        weights: the file, for the message.
        seal: its seal. Weights without one, as reference PEFT writes them, go with any config.
        config: the config that was found with it, if any.
    """
    if seal is None or config is None or config.signature() == seal.config:
        return
    defaults = type(config)().to_dict()
    saved, found = (defaults | json.loads(text) for text in (seal.config, config.signature()))
    differences = [
        f"{name} was {saved.get(name)!r} and is {found.get(name)!r}"
        for name in sorted(saved.keys() | found.keys())
        if saved.get(name) != found.get(name)
    ]
    raise MixedAdapterError(
        f"adapter_config.json in {weights.parent} is not the config that {weights.name} was saved with: "
        f"{'; '.join(differences)}. One of the two files was replaced, copied alone, or edited. Restore it; or, if the "
        f"config is right as it is, call fastpeft.checkpoint.reseal_adapter({os.fspath(weights.parent)!r}) once"
    )


def _config_beside(weights: Path) -> PeftConfig | None:
    if find_config(weights.parent) is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever loads this config in earnest warns
        return PeftConfig.from_pretrained(weights.parent)


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Adapter weights are finite floats. Modules that were saved whole may be infinite, as masks are, but not NaN."""
    for key, tensor in tensors.items():
        is_adapter = any(prefix in key for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values())
        if not tensor.is_floating_point():
            if is_adapter:
                raise AdapterFileError(f"{key} in {path} is of {tensor.dtype}; expected a floating-point dtype")
            continue
        values = tensor.float() if tensor.element_size() == 1 else tensor  # fp8 has no isnan
        bad = ~values.isfinite() if is_adapter else values.isnan()
        if bad.any():
            raise AdapterFileError(
                f"{key} in {path} has {int(bad.sum())} of {tensor.numel()} values that are NaN or infinite: the "
                "training diverged, or the file is damaged. Load an earlier checkpoint"
            )


def _mapped(key: str, key_mapping: Mapping[str, str]) -> str:
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
    if prefix is None:
        raise ValueError(f"key_mapping applies to keys that start with 'base_model.'; the weights have {key!r}")
    name = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        mapped, count = re.subn(pattern, replacement, name)
        if count:
            return prefix + mapped
    return key


def _weights_file(model_id: str | os.PathLike[str], hub_kwargs: dict[str, Any]) -> Path:
    subfolder = hub_kwargs.pop("subfolder", None)
    folder = Path(model_id, subfolder or "")
    local = find_weights(folder)
    if local is not None:
        return local
    repo_id = os.fspath(model_id)
    token = hub_kwargs.pop("use_auth_token", None)
    if hub_kwargs.get("token") is None and token is not None:
        hub_kwargs["token"] = token
    hub_kwargs = {"user_agent": http_user_agent(), "subfolder": subfolder, **hub_kwargs}
    try:
        for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
            if (path := _from_hub(repo_id, name, hub_kwargs)) is not None:
                return path
        reason = "the repository has neither of them"
    except (HFValidationError, EntryNotFoundError) as error:
        reason = f"that folder holds {sorted(os.listdir(folder))[:8]}" if folder.is_dir() else str(error)
    raise AdapterFileError(
        f"no {SAFETENSORS_WEIGHTS_NAME} or {WEIGHTS_NAME} at '{folder}': {reason}. Pass a folder that save_pretrained "
        "wrote, or a hub id"
    )


def _from_hub(repo_id: str, name: str, hub_kwargs: dict[str, Any]) -> Path | None:
    """A file of a hub repository, downloaded, or from the cache when offline; None if the repository lacks it."""
    if hub_constants.HF_HUB_OFFLINE or hub_kwargs.get("local_files_only"):
        try:
            return Path(hf_hub_download(repo_id, name, **{**hub_kwargs, "local_files_only": True}))
        except LocalEntryNotFoundError:
            if name == WEIGHTS_NAME:  # neither is in the cache
                raise
            return None
    subfolder = hub_kwargs["subfolder"]
    exists = file_exists(
        repo_id=repo_id,
        filename=f"{subfolder}/{name}" if subfolder else name,
        revision=hub_kwargs.get("revision"),
        repo_type=hub_kwargs.get("repo_type"),
        token=hub_kwargs.get("token"),
    )
    return Path(hf_hub_download(repo_id, name, **hub_kwargs)) if exists else None
