"""The output of `fastpeft generate --prompts`: lines in the order of the prompts, and a record by which a run goes on.

Beside OUTPUT lies OUTPUT.run.json, with what the results depend on; a later run goes on where nothing of it changed.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.cli.errors import CommandError, one_line
from fastpeft.cli.output import write_json
from fastpeft.cli.requests import Request


class Results:
    """Where the lines go: a file, which a later run may find half full, or standard output.

    Args:
        output: the file; None prints.
        record: what the results depend on, as JSON; see `record_of`.
        resume: go on in a file that an earlier run began.

    Raises:
        CommandError: the file is there and is not to be gone on with, or was begun with other prompts or options.
    """

    def __init__(self, output: Path | None, record: dict[str, Any], resume: bool, requests: Sequence[Request]) -> None:
        self.output, self.record = output, record
        self.done = 0  # lines that are in the file
        self._size = 0  # bytes of the file that hold whole lines
        if output is None:
            if resume:
                raise CommandError("--resume goes on in a file: name it with --output")
            return
        self._record_file = output.with_name(output.name + ".run.json")
        if resume and output.exists():
            self._check_record(record)
            self._count_whole_lines(requests)
        elif output.exists():
            raise CommandError(f"{output} exists: give another file with --output, or --resume to go on with it")

    def open(self) -> None:
        """Make the file, or drop what comes after its last whole line, of a run that was killed."""
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._record_file, self.record)
        with self.output.open("ab") as file:
            file.truncate(self._size)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add lines at the end; they are in the file when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if self.output is None:
            print(text, end="", flush=True)
        else:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(text)
        self.done += len(rows)

    def _check_record(self, record: dict[str, Any]) -> None:
        try:
            begun = json.loads(self._record_file.read_text(encoding="utf-8"))
            assert isinstance(begun, dict)
        except (OSError, ValueError, AssertionError) as error:
            raise CommandError(
                f"{self._record_file}, the record of how {self.output} was begun, cannot be read: "
                "give another file with --output"
            ) from error
        changed = [key for key in record if begun.get(key) != record[key]]
        if changed:
            raise CommandError(
                f"{', '.join(changed)} changed since {self.output} was begun: run it as it was then, or give another "
                "file with --output"
            )

    def _count_whole_lines(self, requests: Sequence[Request]) -> None:
        assert self.output is not None
        data = self.output.read_bytes()
        self._size = data.rfind(b"\n") + 1
        lines = data[: self._size].decode("utf-8", "replace").split("\n")[:-1]
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                fits = number < len(requests) and row == requests[number].result(row["completion"])
            except (ValueError, KeyError, TypeError):
                fits = False
            if not fits:
                raise CommandError(
                    f"{self.output}, line {number + 1} is not that prompt's result: give another file with --output"
                )
        self.done = len(lines)


def record_of(prompts: Path, adapters: dict[str, str], base: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the results of a run depend on: contents of files by their SHA-256, options by value."""
    return {
        "the prompts file": _sha256(prompts),
        **{f"adapter {name}": [_sha256(file) for file in _files_of(Path(folder))] for name, folder in adapters.items()},
        "the base": base,
        **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
    }


def _files_of(folder: Path) -> list[Path]:
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    return [folder.expanduser() / name for name in names if (folder.expanduser() / name).exists()]


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {one_line(error, 100)}") from error
