"""The weights of one adapter on the CPU: read from its files and checked, or given by the caller."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpeft.adapter_files import find_config, find_weights
from fastpeft.checkpoint import AdapterFileError, load_peft_weights
from fastpeft.config import PeftConfig
from fastpeft.sealed_file import OversizedFileError
from fastpeft.serving.errors import AdapterTooLargeError
from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper
from fastpeft.utils.peft_types import PeftType

MAX_CONFIG_BYTES = 1 << 20

_PREFIX = "base_model.model."  # of a file's keys
_WRAPPERS = {"base_layer", "original_module"}  # what stands in the name of a layer that has adapters

FileIdentity = tuple[int, int, int]  # inode, bytes, time of the last change in ns


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """One adapter's config and tensors, on the CPU in memory of their own.

    Attributes:
        config: what the adapter is.
        tensors: keys of an adapter file -> tensor.
        file: what the file was when it was read; None for weights that came from no file.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]
    file: FileIdentity | None = None

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def layout(self) -> tuple[object, ...]:
        """Two adapters of one layout differ in the values of their weights alone."""
        return self.config.signature(), tuple(sorted((key, tensor.shape) for key, tensor in self.tensors.items()))


def read_adapter(folder: Path, limit: int | None = None) -> AdapterWeights:
    """Read and check the adapter in a local folder.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors (or .bin).
        limit: bytes; a larger file is not read, nor one whose tensors would occupy more.

    Raises:
        AdapterTooLargeError: the weights are larger than `limit`.
        ValueError, OSError: a file is missing or damaged, or the two do not belong together.
    """
    identity = file_identity(folder)
    if limit is not None and identity[1] > limit:
        raise AdapterTooLargeError(
            f"the weights in {folder} have {identity[1]} bytes, more than the {limit} bytes that the CPU tier may "
            "hold; give the engine a larger cpu_bytes"
        )
    config = PeftConfig.from_pretrained(folder)
    try:
        tensors = load_peft_weights(folder, device="cpu", check_config=config, max_bytes=limit)
    except OversizedFileError as error:
        raise AdapterTooLargeError(
            f"{error}, which is what the CPU tier may hold; give the engine a larger cpu_bytes"
        ) from error
    if file_identity(folder) != identity:
        raise AdapterFileError(f"{folder} was written to while it was read; register the adapter again")
    # safetensors maps the file into memory: cut short later, it would take the process down with it
    return AdapterWeights(config, {key: tensor.clone() for key, tensor in tensors.items()}, identity)


def method_of(source: Path | AdapterWeights) -> str | None:
    """The method of an adapter, such as "LORA"; None if its config does not say, which is told when it is read."""
    if isinstance(source, AdapterWeights):
        return PeftType(source.config.peft_type).value
    config = find_config(source)
    try:
        return None if config is None else PeftType(json.loads(config.read_bytes())["peft_type"]).value
    except (OSError, ValueError, KeyError, TypeError):
        return None


def base_weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a base model under its own names, whatever adapters wrap its layers now."""
    adapters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for attribute in module.adapter_layer_names
        for parameter in getattr(module, attribute).parameters()
    }
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): parameter.detach()
        for name, parameter in model.named_parameters()
        if id(parameter) not in adapters
    }


def without_base_weights(weights: AdapterWeights, base: Mapping[str, Tensor]) -> AdapterWeights:
    """Leave out copies of the base model's weights: PEFT saves the embeddings with adapters that target them.

    Weights of the base that are not the model's own stay, and are refused where they are loaded: all adapters share the
    base.

    Args:
        base: from `base_weights_of`.
    """
    saved_whole = getattr(weights.config, "modules_to_save", None) or ()
    copies = set()
    for key, tensor in weights.tensors.items():
        name = ".".join(part for part in key.removeprefix(_PREFIX).split(".") if part not in _WRAPPERS)
        own = base.get(name)
        if own is None or own.shape != tensor.shape or any(f".{module}." in f".{name}." for module in saved_whole):
            continue
        given = tensor.to(own.device)
        if torch.equal(own.to(given.dtype), given) or torch.equal(own, given.to(own.dtype)):  # one of them rounded
            copies.add(key)
    if not copies:
        return weights
    return replace(weights, tensors={key: value for key, value in weights.tensors.items() if key not in copies})


def file_identity(folder: Path) -> FileIdentity:
    """What tells one state of a weights file from another.

    Raises:
        AdapterFileError: there is no adapter in the folder, or no folder; or its config is far too long for one.
    """
    config, weights = (find_config(folder), find_weights(folder)) if folder.is_dir() else (None, None)
    if config is None or weights is None:
        there = f"the folder holds {sorted(os.listdir(folder))[:8]}" if folder.is_dir() else "there is no such folder"
        raise AdapterFileError(f"no adapter at {folder}: {there}. Pass a folder that save_pretrained wrote")
    if (size := config.stat().st_size) > MAX_CONFIG_BYTES:
        raise AdapterFileError(
            f"{config} has {size} bytes, and an adapter's config at most {MAX_CONFIG_BYTES}; it is not one that "
            "save_pretrained wrote"
        )
    facts = weights.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
