"""One file of weights, and the seal in it that says which adapter they are of.

A .safetensors file carries the seal in its header; a .bin file, which is a zip archive, as one more record. Other
readers pay no heed to it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastpeft.utils.error import PeftError

_SEAL_RECORD = "fastpeft_seal.json"
_OVERHEAD = 1 << 24  # bytes of a .bin that are no tensors: keys, sizes, the seal


class AdapterFileError(PeftError, ValueError):
    """A file of an adapter is missing, unreadable, or does not hold what it should."""


class OversizedFileError(AdapterFileError):
    """A weights file holds more bytes than the caller has room for."""


class MixedAdapterError(AdapterFileError):
    """The config and the weights in one folder belong to two different saves."""


@dataclass(frozen=True)
class Seal:
    """What a weights file knows about the pair it belongs to.

    Attributes:
        config: canonical JSON of the config fields that decide what the weights mean (PeftConfig.signature).
        config_sha256: digest of `config`.
        tensors_sha256: digest of every tensor's name, dtype, shape and bytes.
    """

    config: str
    config_sha256: str
    tensors_sha256: str

    @property
    def pair(self) -> str:
        return hashlib.sha256(f"{self.config_sha256}{self.tensors_sha256}".encode()).hexdigest()[:16]

    def is_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are the tensors that were sealed, and the seal itself is whole."""
        return self == seal_of(self.config, tensors)

    def metadata(self) -> dict[str, str]:
        """As entries of a safetensors header."""
        return {f"fastpeft_{name}": value for name, value in vars(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Seal | None:
        names = [f"fastpeft_{name}" for name in cls.__dataclass_fields__]
        return cls(*(metadata[name] for name in names)) if all(name in metadata for name in names) else None


def seal_of(signature: str, tensors: Mapping[str, Tensor]) -> Seal:
    return Seal(signature, hashlib.sha256(signature.encode()).hexdigest(), _tensors_digest(tensors))


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.reshape(-1).cpu()
        # Not numpy(): torch then takes the memory of the model's weights for one that is not its own any more.
        digest.update((ctypes.c_ubyte * flat.nbytes).from_address(flat.data_ptr()))
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], seal: Seal) -> None:
    """Write a weights file and flush it to the disk.

    Args:
        path: its suffix says which format, .safetensors or .bin.
        tensors: contiguous CPU tensors, no two on one storage.
    """
    if path.name.endswith(".safetensors"):
        save_file(dict(tensors), path, metadata={"format": "pt"} | seal.metadata())
        _sort_metadata(path)
    else:
        torch.save(dict(tensors), path)
        with zipfile.ZipFile(path, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            record = zipfile.ZipInfo(f"{root}/{_SEAL_RECORD}")  # without the time of day: equal adapters, equal files
            archive.writestr(record, json.dumps(seal.metadata()))
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order: safetensors writes it in a random one, and equal adapters should be equal files."""
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # else a name that JSON can write in two ways: leave it as it is
            file.seek(8)
            file.write(text.ljust(length))


def read_seal(path: Path) -> Seal | None:
    """The seal of a weights file; None where there is none or the file is not readable."""
    try:
        if path.name.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                return Seal.from_metadata(file.metadata() or {})
        with open(path, "rb") as archive:
            return _seal_in_archive(archive)
    except Exception:  # a broken file has no seal; reading its tensors says what is wrong
        return None


def read_tensors(path: Path, max_bytes: int | None = None) -> tuple[dict[str, Tensor], Seal | None]:
    """Read a weights file onto the CPU, and its seal if it has one; no code from it is run.

    Args:
        max_bytes: how much the tensors may occupy; refused before so much is allocated. None for no limit.

    Raises:
        OversizedFileError: they would occupy more.
        AdapterFileError: missing, truncated, damaged, not a dict of tensors, or a pickle that asks for code.
    """
    if not path.is_file():
        raise AdapterFileError(f"there is no weights file {path}; save the adapter there first, or correct the path")
    try:
        tensors, seal = _load(path, max_bytes)
    except OversizedFileError:
        raise
    except UnpicklingError as error:  # torch's own text advises weights_only=False, which would run the code
        raise AdapterFileError(
            f"{path} ({path.stat().st_size} bytes) is not a readable adapter: its pickle is damaged or holds more than "
            "tensors, and could run code. Ask its author for adapter_model.safetensors"
        ) from error
    except Exception as error:  # the readers raise a dozen types, from struct errors to UnpicklingError
        raise AdapterFileError(
            f"{path} ({path.stat().st_size} bytes) is not a readable adapter: {error}. The file is truncated or "
            "damaged, or holds something else than tensors; save or download it again"
        ) from error
    if not isinstance(tensors, dict):
        raise AdapterFileError(f"{path} should hold a dict of tensors, but holds a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise AdapterFileError(f"{path} should hold named tensors, but {name!r} is a {type(tensor).__name__}")
    _check_size(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), max_bytes)
    if seal is not None and not seal.is_of(tensors):
        raise AdapterFileError(
            f"{path} is damaged: its content is not what the digest inside it was made of. Save or download it again"
        )
    return tensors, seal


def _load(path: Path, max_bytes: int | None) -> tuple[Any, Seal | None]:
    """Content and seal through one handle: a save that replaces the file meanwhile cannot mix the two."""
    if path.name.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, Seal.from_metadata(file.metadata() or {})  # noqa: SIM118
    with open(path, "rb") as archive:
        if max_bytes is not None:
            with zipfile.ZipFile(archive) as records:  # which may be packed
                _check_size(path, sum(record.file_size for record in records.infolist()), max_bytes + _OVERHEAD)
            archive.seek(0)
        tensors = torch.load(archive, map_location="cpu", weights_only=True)
        return tensors, _seal_in_archive(archive) if zipfile.is_zipfile(archive) else None


def _seal_in_archive(archive: BinaryIO) -> Seal | None:
    with zipfile.ZipFile(archive) as records:
        name = next((name for name in records.namelist() if name.endswith(f"/{_SEAL_RECORD}")), None)
        return None if name is None else Seal.from_metadata(json.loads(records.read(name)))


def _check_size(path: Path, nbytes: int, max_bytes: int | None) -> None:
    if max_bytes is not None and nbytes > max_bytes:
        raise OversizedFileError(f"{path} ({path.stat().st_size} bytes) holds {nbytes} bytes, more than {max_bytes}")
