"""What every command's test needs: a caller that never sees a traceback, a few documents, one trained adapter."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from fastpeft.cli import main
from fastpeft.demo import BASE, corpus


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Run the command line in this process."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    """The first documents of a demo corpus, some 6,000 tokens."""
    file = tmp_path_factory.mktemp("data") / "few.jsonl"
    file.write_text("\n".join(corpus("jargon", "train").read_text().splitlines()[:40]) + "\n")
    return file


QUICK = ("--max-steps", 2, "--batch-size", 2, "--block-size", 32, "--rank", 4, "--log-steps", 1, "--dtype", "fp32")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, documents) -> Path:
    """An adapter of two real steps, and of updates large enough to see."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    options = [*QUICK, "--lr", 0.05, "--warmup", 0, "--eval-fraction", 0.1]
    code = main([str(a) for a in ("train", BASE, "--data", documents, "--output", folder, *options)])
    assert code == 0
    return folder


@pytest.fixture
def copy_of(tmp_path):
    """A copy of an adapter folder's two files, to damage."""

    def copy(folder: Path, **changes: object) -> Path:
        target = tmp_path / "copy"
        target.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (target / name).write_bytes((folder / name).read_bytes())
        config = json.loads((target / "adapter_config.json").read_text()) | changes
        (target / "adapter_config.json").write_text(json.dumps(config))
        return target

    return copy
