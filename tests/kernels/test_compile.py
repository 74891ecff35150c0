"""Every kernel in every tile configuration, compiled for GPUs that are not here.

It spills nothing, fits shared memory, and runs on the matrix units where it should.
"""

import importlib
import pkgutil

import pytest
from compile_cost import COMPILED_AS, SHARED_LIMIT, Compiler, discover

from fastpeft_kernels import gpu

CASES = discover("fastpeft_kernels.gpu")
TARGETS = (80, 90, 100)
SMALL_SHARED = (86, 89)  # same code as 8.0, less shared memory


def chosen(*capabilities: int) -> list[object]:
    """(case, capability) wherever the launcher can choose that case, as pytest parameters with readable ids."""
    return [
        pytest.param(key, capability, id=f"{key}-sm{capability}")
        for key, case in CASES.items()
        for capability in capabilities
        if case.chosen_for(capability)
    ]


@pytest.mark.parametrize("compiler", ["pinned", "3.6"], indirect=True, ids="triton-{}".format)
@pytest.mark.parametrize(("key", "capability"), chosen(*TARGETS))
def test_compiles_lean(compiler: Compiler, key: str, capability: int) -> None:
    cost = compiler.compile(key, f"cuda:{capability}")
    assert cost is not None
    assert not cost.complaints(CASES[key], capability), cost


@pytest.mark.parametrize("compiler", ["pinned", "3.6"], indirect=True, ids="triton-{}".format)
@pytest.mark.parametrize(("key", "capability"), chosen(*SMALL_SHARED))
def test_fits_consumer_shared_memory(compiler: Compiler, key: str, capability: int) -> None:
    cost = compiler.compile(key, f"cuda:{COMPILED_AS[capability]}")  # compiled above: Triton's cache answers
    assert cost is not None
    assert cost.shared <= SHARED_LIMIT[capability], cost


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
