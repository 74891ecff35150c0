"""The two files of an adapter on disk, written so that no crash can mix two adapters.

    <folder>/adapter_config.json          what the adapter is
    <folder>/adapter_model.safetensors    its tensors (or adapter_model.bin, on request)

A save goes through a hidden folder beside them, `.fastpeft-save-<pair>-<random>`:

    1. write weights and config there, and flush them to the disk;
    2. rename the weights into place, and remove weights of the other format;
    3. rename the config into place, and remove the hidden folder.

Killed before 2, the folder holds the old adapter; after 3, the new one. Between the two, the weights in place are new
and their config waits in the hidden folder. The weights file carries a *seal* whose `pair` names that folder, so
readers take the config from there, and the next save moves it into place.

The seal also carries a digest of the config's meaning and one of the tensors. A pair that was mixed by other means
(half a copy, an interrupted download) and a file with flipped bits are noticed when the weights are read. Files without
a seal, such as those that reference PEFT wrote, are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastpeft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from fastpeft.utils.error import PeftError

_STAGE_PREFIX = ".fastpeft-save-"
_ABANDONED_AFTER = 3600.0  # seconds: a hidden folder that old belongs to a save that was killed
_SEAL_RECORD = "fastpeft_seal.json"  # its name inside adapter_model.bin, which is a zip archive


class AdapterFileError(PeftError, ValueError):
    """A file of an adapter is missing, unreadable, or does not hold what it should."""


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
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_pair(
    folder: Path, config_text: str, signature: str, tensors: Mapping[str, Tensor], *, safe_serialization: bool = True
) -> None:
    """Write an adapter into `folder`: all of it, or nothing.

    Args:
        folder: made if missing; other files in it are left alone.
        config_text: content of adapter_config.json.
        signature: the config's part of the seal.
        tensors: contiguous CPU tensors, no two on one storage.
        safe_serialization: safetensors, or else a torch archive, adapter_model.bin.

    Raises:
        OSError: the disk is full or the folder cannot be written; the adapter that was there still is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_interrupted_save(folder)
    seal = seal_of(signature, tensors)
    name, other = SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
    if not safe_serialization:
        name, other = other, name
    stage = Path(tempfile.mkdtemp(prefix=f"{_STAGE_PREFIX}{seal.pair}-", dir=folder))
    try:
        _write_weights(stage / name, tensors, seal)
        _write_flushed(stage / CONFIG_NAME, config_text)
        # safetensors makes files that only their owner can read; an adapter is a file like any other
        os.chmod(stage / name, (stage / CONFIG_NAME).stat().st_mode)
        _flush_folder(stage)
        os.replace(stage / name, folder / name)
    except BaseException:
        if not _waits_for_config(stage):  # once the weights are in place, their config must stay where readers find it
            shutil.rmtree(stage, ignore_errors=True)
        raise
    (folder / other).unlink(missing_ok=True)
    _flush_folder(folder)
    _move_config(stage, folder)


def write_text(path: Path, text: str) -> None:
    """Write a file of its own beside the adapter, such as the model card: the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        os.unlink(name)  # made anew below, with the permissions that the user's umask gives
        _write_flushed(Path(name), text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_config(folder: Path, text: str) -> None:
    """Replace adapter_config.json alone, leaving whatever weights are there."""
    folder.mkdir(parents=True, exist_ok=True)
    finish_interrupted_save(folder)
    write_text(folder / CONFIG_NAME, text)


def find_config(folder: Path) -> Path | None:
    """The config that belongs to the weights in `folder`: the file in place, or one that a killed save left waiting."""
    for stage in _stages(folder):
        if _waits_for_config(stage) and _is_stage_of_weights_in(folder, stage):
            return stage / CONFIG_NAME
    plain = folder / CONFIG_NAME
    return plain if plain.is_file() else None


def find_weights(folder: Path) -> Path | None:
    """The weights file in `folder`; safetensors first, as every reader of adapters prefers it."""
    paths = (folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME)
    return next((path for path in paths if path.exists()), None)


def finish_interrupted_save(folder: Path) -> None:
    """Move a config that a killed save left waiting into its place, and remove what such saves left behind."""
    for stage in _stages(folder):
        if _waits_for_config(stage):
            if _is_stage_of_weights_in(folder, stage):
                _move_config(stage, folder)
            else:  # its weights have been replaced since
                shutil.rmtree(stage, ignore_errors=True)
        elif time.time() - stage.stat().st_mtime > _ABANDONED_AFTER:
            shutil.rmtree(stage, ignore_errors=True)


def read_seal(weights: Path) -> Seal | None:
    """The seal of a weights file; None where there is none or the file is not readable."""
    try:
        if weights.name.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(weights, framework="pt") as file:
                return Seal.from_metadata(file.metadata() or {})
        with zipfile.ZipFile(weights) as archive:
            record = next((name for name in archive.namelist() if name.endswith(f"/{_SEAL_RECORD}")), None)
            return None if record is None else Seal.from_metadata(json.loads(archive.read(record)))
    except Exception:  # a broken file has no seal; reading its tensors says what is wrong
        return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a weights file onto the CPU; no code from it is run.

    Raises:
        AdapterFileError: missing, truncated, damaged, not a dict of tensors, or a pickle that asks for code.
    """
    if not path.is_file():
        raise AdapterFileError(f"there is no weights file {path}; save the adapter there first, or correct the path")
    try:
        tensors = _load(path)
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
    seal = read_seal(path)
    if seal is not None and not seal.is_of(tensors):
        raise AdapterFileError(
            f"{path} is damaged: its content is not what the digest inside it was made of. Save or download it again"
        )
    return tensors


def _load(path: Path) -> dict[str, Tensor]:
    if path.name.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def _write_weights(path: Path, tensors: Mapping[str, Tensor], seal: Seal) -> None:
    if path.name.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(dict(tensors), path, metadata={"format": "pt"} | seal.metadata())
        _sort_metadata(path)
    else:
        torch.save(dict(tensors), path)
        with zipfile.ZipFile(path, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{root}/{_SEAL_RECORD}", json.dumps(seal.metadata()))
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


def _write_flushed(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power cut, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(handle)


def _move_config(stage: Path, folder: Path) -> None:
    try:
        os.replace(stage / CONFIG_NAME, folder / CONFIG_NAME)
    except FileNotFoundError:
        if not (folder / CONFIG_NAME).is_file():
            raise
        # another save into this folder finished ours
    _flush_folder(folder)
    shutil.rmtree(stage, ignore_errors=True)


def _stages(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob(f"{_STAGE_PREFIX}*")))


def _waits_for_config(stage: Path) -> bool:
    """Whether this save put its weights in place and has only its config still to move: weights are staged first."""
    return (stage / CONFIG_NAME).is_file() and find_weights(stage) is None


def _is_stage_of_weights_in(folder: Path, stage: Path) -> bool:
    weights = find_weights(folder)
    seal = None if weights is None else read_seal(weights)
    return seal is not None and stage.name.startswith(f"{_STAGE_PREFIX}{seal.pair}-")
