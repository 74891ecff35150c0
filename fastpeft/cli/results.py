"""The output of `fastpeft generate --prompts`: lines in the order of the prompts, and a record by which a run goes on.

Beside OUTPUT lies OUTPUT.run.json, with what the results depend on; a later run goes on where nothing of it changed.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastpeft.cli.errors import CommandError, one_line
from fastpeft.cli.requests import Request

if sys.platform != "win32":
    import fcntl


class Results:
    """Where the lines go: a file, which a later run may find half full, or standard output.

    Args:
        output: the file; None prints.
        record: what the results depend on, as JSON; see `record_of`.
        resume: go on in a file that an earlier run began.

    Raises:
        CommandError: the file is there and is not to be gone on with, was begun with other prompts or options, or is
            being written to by another run.
    """

    def __init__(self, output: Path | None, record: dict[str, Any], resume: bool, requests: Sequence[Request]) -> None:
        self.output, self.record = output, record
        self.done = 0  # lines that are in the file
        self._size = self._seen = 0  # bytes of the file: in whole lines, and in all
        if output is None:
            if resume:
                raise CommandError("--resume goes on in a file: name it with --output")
            return
        self._record_file = output.with_name(output.name + ".run.json")
        _check_places(output, self._record_file)
        self._goes_on, self._has_record = resume and output.exists(), resume and self._record_file.exists()
        if self._goes_on or self._has_record:
            self._check_record(record)
        if self._goes_on:
            with _locked(output):  # said before the model is loaded
                self._count_whole_lines(requests)
        elif output.exists():
            raise CommandError(f"{output} exists: give another file with --output, or --resume to go on with it")
        elif self._record_file.exists() and not resume:
            raise CommandError(
                f"{self._record_file} exists, where the record of this run belongs: give another file with --output, "
                "or move it away"
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the file, or drop what comes after its last whole line, of a run that was killed; and lock it meanwhile.

        Raises:
            CommandError: another run began to write there since this one looked; nothing of it is touched.
        """
        if self.output is None:
            yield
            return
        if not self._goes_on:
            self._make_files(self.output)
        with _locked(self.output):
            if self._goes_on:
                with self._opened() as file:
                    file.truncate(self._size)
                self._seen = self._size
            yield

    def _make_files(self, output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not self._has_record:
            self._make(self._record_file, json.dumps(self.record, indent=1) + "\n")
        try:
            self._make(output, "")
        except CommandError:
            if not self._has_record:
                self._record_file.unlink()
            raise

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add lines at the end; they are in the file when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if self.output is None:
            print(text, end="", flush=True)
        else:
            with self._opened() as file:
                self._seen += file.write(text.encode())
        self.done += len(rows)

    def _opened(self) -> BinaryIO:
        """The file, at its end, which must be where this run left it."""
        assert self.output is not None
        file = self.output.open("r+b")
        if file.seek(0, os.SEEK_END) != self._seen:
            file.close()
            raise CommandError(
                f"{self.output} was changed while this run went on: is another one writing to it? Give each run a "
                "file of its own with --output"
            )
        return file

    def _make(self, file: Path, text: str) -> None:
        try:
            with file.open("x", encoding="utf-8") as made:
                made.write(text)
        except FileExistsError as error:
            raise CommandError(
                f"{file} was made by somebody else while the model was loaded, and is left as it is: give another "
                "file with --output"
            ) from error

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
        self._seen = len(data)
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


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep other runs from writing to the file. The lock is gone with the process, however that ends.

    Windows and some network file systems have no such locks: there a run stops where it finds that the file has grown.

    Raises:
        CommandError: another run has the lock.
    """
    with output.open("r+b") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CommandError(
                    f"{output} is being written to by another run: wait for its end and go on with --resume, or give "
                    "another file with --output"
                ) from None
            except OSError:
                pass  # a file system without locks
        yield


def _check_places(output: Path, record: Path) -> None:
    """Raise CommandError where no file can be written: a folder has the name, or a file the name of the folder."""
    for file in (output, record):
        if file.is_dir():
            raise CommandError(f"{file} is a folder, where a file of this run belongs: give another --output")
    for folder in output.parents:
        if folder.exists() and not folder.is_dir():
            raise CommandError(f"{folder} is a file and not a folder: give another --output")


def record_of(prompts: Path, adapters: dict[str, str], base: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the results of a run depend on: files by their SHA-256, options by value, a base's weights by size."""
    return {
        "the prompts file": _sha256(prompts),
        **{f"adapter {name}": [_sha256(file) for file in _files_of(Path(folder))] for name, folder in adapters.items()},
        "the base": [base, *_base_files(Path(base).expanduser())],
        **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
    }


def _base_files(folder: Path) -> list[Any]:
    """Of a base in a folder: its config by content, its weights by size, for they are large."""
    configs = [_sha256(file) for file in [folder / "config.json"] if file.is_file()]
    weights = [
        [file.name, file.stat().st_size] for ending in ("safetensors", "bin") for file in folder.glob(f"*.{ending}")
    ]
    return [*configs, *sorted(weights)]


def _files_of(folder: Path) -> list[Path]:
    from fastpeft.adapter_files import find_config, find_weights

    files = find_config(folder.expanduser()), find_weights(folder.expanduser())
    return [file for file in files if file is not None]


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {one_line(error, 100)}") from error
