"""The output folder of a training run: what it may hold, what a later run finds there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastpeft.cli.errors import CommandError, one_line
from fastpeft.cli.settings import TrainSettings

RECORD = "training.json"  # the settings of the run, and its result when it is done
OURS = (RECORD, "adapter_config.json", "adapter_model.safetensors", "loss.csv", "loss.png", "checkpoints")


def check_output(settings: TrainSettings) -> Path | None:
    """Check the output folder and change nothing; returns the checkpoint to go on from, if any.

    Raises:
        CommandError: the folder holds something that the settings do not say what to do with.
    """
    folder = settings.output
    if folder.is_file():
        raise CommandError(f"{folder} is a file: give another --output folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written to" if there.is_dir() else "is a file"
        raise CommandError(f"{folder} cannot be made, for {there} {why}: give another --output folder")
    if settings.resume and settings.overwrite:
        raise CommandError("--resume and --overwrite contradict each other: give one of them")
    ran = (folder / RECORD).exists()
    if settings.resume:
        if not ran:
            raise CommandError(f"nothing to resume in {folder}: no run began there; leave --resume out")
        settings.check_resumable(read_record(folder))
        return last_checkpoint(folder / "checkpoints")  # None: killed before the first one, so from the start
    if folder.exists() and any(folder.iterdir()):
        if not ran:
            raise CommandError(f"{folder} is not empty and holds no earlier run: give another --output")
        if not settings.overwrite:
            raise CommandError(f"{folder} is not empty: give another --output, or --resume, or --overwrite")
    return None


def open_output(settings: TrainSettings) -> None:
    """Make the folder and write the record; with --overwrite, first remove what an earlier run wrote, and only that."""
    check_output(settings)  # again: another run may have begun there meanwhile
    settings.output.mkdir(parents=True, exist_ok=True)
    if settings.overwrite:
        for name in OURS:
            path = settings.output / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    write_json(settings.output / RECORD, settings.record())


def read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text())
        return {"settings": dict(record["settings"]), "data_sha256": dict(record["data_sha256"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{folder / RECORD} cannot be read ({one_line(error)}): start anew with --overwrite"
        ) from error


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: a kill may have left a later one without its last file."""
    whole = {}
    for path in folder.glob("checkpoint-*"):
        try:
            whole[step_of(path)] = path
        except (OSError, ValueError, KeyError):
            continue
    return whole[max(whole)] if whole else None


def step_of(checkpoint: Path) -> int:
    """The steps that were done at a checkpoint, from the file that Trainer writes last."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename: the file is whole or as before."""
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)
