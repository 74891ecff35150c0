"""The suite that fills the table of products: it compares what it says, on operands as the ops pass them."""

import dataclasses

import pytest
import torch

from fastpeft.benchmark import own_gemm
from fastpeft.benchmark.cases import Effort, measure
from fastpeft.benchmark.own_gemm import FROZEN, LIBRARY, OWN, OwnGemmCase, own_gemm_cases
from fastpeft_kernels import current_product
from fastpeft_kernels.gpu import linear
from fastpeft_kernels.masks import apply_mask
from fastpeft_kernels.tiles import LINEAR_TILES

ONCE = Effort(budget_s=0, warmup=0, min_rounds=2, max_rounds=2)


@pytest.fixture(autouse=True)
def _where_it_runs(device):
    if linear._arch(torch.ones(1, device=device).device) not in LINEAR_TILES:
        pytest.skip("this GPU has no own product")


def tiny(direction: str, device: str) -> OwnGemmCase:
    return OwnGemmCase(direction, M=24, K=40, N=72, r=4, device=device)


@pytest.mark.parametrize("direction", ["forward", "dx"])
def test_every_contender_computes_the_same_product(direction, device, monkeypatch):
    monkeypatch.setattr(own_gemm, "graph_replay", lambda step, device: step)
    case = tiny(direction, device)
    operands = case.operands()
    monkeypatch.setattr(OwnGemmCase, "operands", lambda self: operands)
    x, W, S, B, mask = (t if t is None or t.dtype == torch.int32 else t.double() for t in operands)
    low = S @ B.t()
    assert (mask is not None) == (direction == "dx")
    exact = x @ W.t() + (low if mask is None else apply_mask(low, mask))
    steps = case.steps({})
    assert {OWN, LIBRARY, FROZEN, "own-128x128"} <= set(steps)
    for name, step in steps.items():
        torch.testing.assert_close(
            step().double(), x @ W.t() if name == FROZEN else exact, rtol=2e-2, atol=2e-2, msg=name
        )
    assert current_product() == "auto"


def test_result_compares_with_the_library(device, monkeypatch):
    monkeypatch.setattr(OwnGemmCase, "effort", None)
    result = measure(tiny("dx", device), {}, ONCE)
    assert result.error is None
    assert OWN in result.speedup[LIBRARY]
    assert {OWN, LIBRARY} <= set(result.floor)
    assert result.params["class"] == "few rows"


def test_says_why_where_it_cannot_run(device, monkeypatch):
    result = measure(dataclasses.replace(tiny("forward", device), N=71), {}, ONCE)
    assert "a multiple of 8 columns, got 71" in result.error


def test_cases_have_names_of_their_own_and_both_directions():
    cases = list(own_gemm_cases(False, "cpu"))
    assert len({case.name for case in cases}) == len(cases)
    down = [case for case in cases if {case.K, case.N} == {14336, 4096}]
    assert {(case.direction, case.K, case.N) for case in down} == {
        ("forward", 14336, 4096), ("forward", 4096, 14336), ("dx", 4096, 14336), ("dx", 14336, 4096),
    }  # fmt: skip
    assert len(list(own_gemm_cases(True, "cpu"))) < len(cases)
