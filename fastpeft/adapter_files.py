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

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fastpeft.sealed_file import read_seal, seal_of, write_tensors
from fastpeft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

_STAGE_PREFIX = ".fastpeft-save-"
_ABANDONED_AFTER = 3600.0  # seconds: a hidden folder that old belongs to a save that was killed


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
        write_tensors(stage / name, tensors, seal)
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
