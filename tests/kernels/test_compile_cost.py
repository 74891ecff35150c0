"""The compile checks see what they are there to see: a fault in each example kernel, and none in the good one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from compile_cost import SHARED_LIMIT, Compiler, Cost, discover

from fastpeft_kernels.gpu._compile import CompileCase

CASES = discover("example_kernels")


@pytest.fixture(scope="module")
def examples() -> Iterator[Compiler]:
    compiler = Compiler("example_kernels", search_path=[str(Path(__file__).parent)])
    yield compiler
    compiler.close()


def complaints(examples: Compiler, name: str, capability: int) -> str:
    cost = examples.compile(f"dots/{name}", f"cuda:{capability}")
    assert cost is not None
    return "; ".join(cost.complaints(CASES[f"dots/{name}"], capability))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_good_kernel_passes(examples, capability):
    assert complaints(examples, "good", capability) == ""


def test_dots_of_few_rows_may_use_warp_instructions(examples):
    cost = examples.compile("dots/short", "cuda:90")
    assert cost.matrix == 0
    assert cost.warp_matrix > 0
    assert cost.complaints(CASES["dots/short"], 90) == []
    assert (
        "not on the matrix units" in cost.complaints(CASES["dots/good"], 90)[0]
    )  # the same code for a dot of 128 rows


def test_spills_are_seen(examples):
    assert "spills" in complaints(examples, "spilling", 100)


def test_shared_memory_is_counted(examples):
    assert "shared memory" in complaints(examples, "oversized", 90)


def test_missing_matrix_instructions_are_seen(examples):
    assert "not on the matrix units" in complaints(examples, "no-matrix", 90)


def test_a_pipeline_that_is_none_is_seen(examples):
    case = CASES["dots/no-pipeline"]
    cost = examples.compile("dots/no-pipeline", "cuda:90")
    assert cost.overlapped > 0  # one step's instructions run on without a wait
    assert cost.complaints(case, 90) == ["no cp.async.bulk: loads do not go through the bulk copy engine"]
    assert dataclasses.replace(cost, bulk_copies=2).complaints(case, 90) == []
    assert "serialised" in dataclasses.replace(cost, bulk_copies=2, overlapped=0).complaints(case, 90)[0]


def test_tensor_memory_is_counted(examples):
    cost = examples.compile("dots/good", "cuda:100")
    assert 0 < cost.tensor_memory <= 512
    assert "columns of tensor memory" in dataclasses.replace(cost, tensor_memory=640).complaints(
        CASES["dots/good"], 100
    )[0]  # fmt: skip


def test_compiler_errors_are_reported_and_survived(examples):
    with pytest.raises(RuntimeError, match="power of 2"):
        examples.compile("dots/broken", "cuda:90")
    assert examples.compile("dots/good", "cuda:90") is not None


def test_amd_target_compiles(examples):
    assert examples.compile("dots/good", "hip:gfx942") is None


def test_kernels_that_ask_for_their_target_are_told(examples):
    assert examples.compile("dots/asking", "cuda:90") is not None
    with pytest.raises(RuntimeError, match=r"older than 9\.0"):
        examples.compile("dots/asking", "cuda:80")
    with pytest.raises(RuntimeError, match="not CUDA"):
        examples.compile("dots/asking", "hip:gfx942")


def test_consumer_cards_have_less_shared_memory():
    cost = Cost(registers=64, stack=0, shared=100 * 1024, matrix=4, warp_matrix=4, bulk_copies=0)
    assert cost.complaints(CASES["dots/good"], 80) == []
    assert str(SHARED_LIMIT[86]) in cost.complaints(CASES["dots/good"], 86)[0]


def test_a_package_that_does_not_import_is_an_error():
    with pytest.raises(RuntimeError, match="compile process ended"):
        Compiler("no_such_package_of_kernels")


def test_case_needs_a_value_for_each_constexpr():
    with pytest.raises(ValueError, match="each needs the other"):
        CompileCase("odd", None, {"BLOCK": "constexpr"}, {})


def test_case_is_chosen_everywhere_unless_it_says_otherwise():
    everywhere = CompileCase("any", None, {}, {})
    hopper = CompileCase("hopper", None, {}, {}, capabilities=(90,))
    assert everywhere.chosen_for(80)
    assert hopper.chosen_for(90)
    assert not hopper.chosen_for(80)
