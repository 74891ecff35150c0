"""Compile processes for the compile tests, one for each Triton version, started when first needed."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from compile_cost import Compiler

OLD_TRITON = "3.6"  # the version of the GPU machines that we aim at; the pinned one is newer


def old_triton_path() -> Path:
    """Where `make` puts the older Triton; `FASTPEFT_TRITON_36` names another place."""
    return Path(os.environ.get("FASTPEFT_TRITON_36") or Path(sys.prefix) / "triton-3.6")


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows are split from 128 rows on, not from 512: the interpreter goes through M = 146 as one band of
    several tiles and one whose last tile is not full, at a fourth of the time."""
    from fastpeft_kernels import tiles
    from fastpeft_kernels.gpu import dora

    monkeypatch.setattr(tiles, "ROWS_PER_PLANE", 128)
    monkeypatch.setattr(dora, "ROWS_PER_PLANE", 128)


@pytest.fixture(scope="session")
def _compilers() -> Iterator[dict[str, Compiler]]:
    started: dict[str, Compiler] = {}
    yield started
    for compiler in started.values():
        compiler.close()


@pytest.fixture
def compiler(request: pytest.FixtureRequest, _compilers: dict[str, Compiler]) -> Compiler:
    """The compile process of the project's kernels; the test's parameter is "pinned" or "3.6"."""
    version: str = request.param
    path = old_triton_path() if version == OLD_TRITON else None
    if path and not path.is_dir():
        if "FASTPEFT_TRITON_36" in os.environ:
            pytest.fail(f"FASTPEFT_TRITON_36 names {path}, which is no folder; `make test` makes it")
        pytest.skip(f"no Triton {version} in {path}; `make test` installs it")
    if version not in _compilers:
        _compilers[version] = Compiler("fastpeft_kernels.gpu", path)
    return _compilers[version]
