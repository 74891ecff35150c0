"""Every kernel in every tile configuration, compiled for GPUs that are not here.

It spills nothing, fits shared memory, and runs on the matrix units where it should.
"""

import importlib
import pkgutil
from collections.abc import Iterable

import pytest
from compile_cost import COMPILED_AS, Compiler, discover

from fastpeft_kernels import gpu

CASES = discover("fastpeft_kernels.gpu")


def chosen(targets: Iterable[int]) -> list[object]:
    """(case, target, capabilities), as pytest parameters with readable ids: a case is compiled once for each target,
    and judged for every capability that runs that code and for which the launcher can choose it."""
    found = []
    for key, case in CASES.items():
        for target in targets:
            capabilities = [c for c, code in COMPILED_AS.items() if code == target and case.chosen_for(c)]
            if capabilities:
                found.append(pytest.param(key, target, capabilities, id=f"{key}-sm{target}"))
    return found


@pytest.mark.parametrize("compiler", ["pinned"], indirect=True, ids="triton-{}".format)
@pytest.mark.parametrize(("key", "target", "capabilities"), chosen(dict.fromkeys(COMPILED_AS.values())))
def test_compiles_lean(compiler: Compiler, key: str, target: int, capabilities: list[int]) -> None:
    """8.6 and 8.9 run the code of 8.0 with less shared memory."""
    check(compiler, key, target, capabilities)


@pytest.mark.parametrize("compiler", ["3.6"], indirect=True, ids="triton-{}".format)
@pytest.mark.parametrize(("key", "target", "capabilities"), chosen([90]))
def test_compiles_lean_where_we_measure(compiler: Compiler, key: str, target: int, capabilities: list[int]) -> None:
    """The Triton and the GPU of bench/gpu.sh; every target with this Triton too would take three minutes more."""
    check(compiler, key, target, capabilities)


def check(compiler: Compiler, key: str, target: int, capabilities: list[int]) -> None:
    cost = compiler.compile(key, f"cuda:{target}")
    assert cost is not None
    assert {c: found for c in capabilities if (found := cost.complaints(CASES[key], c))} == {}, cost


@pytest.mark.parametrize("compiler", ["pinned"], indirect=True, ids="triton-{}".format)
@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case.capabilities is None])
def test_compiles_for_amd(compiler: Compiler, key: str) -> None:
    """Nothing here is tuned for gfx942; what is chosen for any GPU must at least compile."""
    compiler.compile(key, "hip:gfx942")


def test_every_kernel_is_compiled():
    """A kernel that no compile case names would be checked by nothing here."""
    compiled = {case.fn for case in CASES.values()}
    kernels = {
        f"{info.name}.{name}": value
        for info in pkgutil.iter_modules(gpu.__path__)
        for name, value in vars(importlib.import_module(f"{gpu.__name__}.{info.name}")).items()
        if name.endswith("_kernel")
    }
    assert kernels
    assert [name for name, kernel in kernels.items() if kernel not in compiled] == []
