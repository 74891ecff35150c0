"""The suites of two serving systems' tables: their routings, and contenders that compute one and the same."""

import dataclasses
from collections import Counter

import pytest
import torch
from bench_cases import CEILINGS, ONCE

from fastpeft.benchmark import GPU_SUITES, SUITES, serving_ops
from fastpeft.benchmark.cases import measure
from fastpeft.benchmark.libraries import FROZEN, OURS
from fastpeft.benchmark.serving_ops import (
    GATHER,
    LOOP,
    POPULARITIES,
    SEPARATE,
    PunicaCase,
    RoutedGroupCase,
    VllmLoraCase,
    lengths,
    route,
)


def tiny(case):
    if isinstance(case, PunicaCase):
        return dataclasses.replace(case, batch=min(case.batch, 7), h1=40, h2=24, r=4, dtype="fp32")
    if isinstance(case, RoutedGroupCase):
        return dataclasses.replace(case, rows=7, K=32, widths=(24, 8, 8), r=4, dtype="fp32")
    return dataclasses.replace(case, M=min(case.M, 9), hidden=32, r=4, dtype="fp32")


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("batch", [1, 2, 7, 16, 63, 64])
def test_popularities_spread_the_whole_batch(popularity, batch):
    shares = lengths(batch, popularity)
    assert sum(shares) == batch
    assert min(shares) >= 1
    assert shares == sorted(shares, reverse=True)


def test_popularities_of_64_rows_are_punicas():
    assert lengths(64, "uniform") == [8] * 8
    assert lengths(64, "zipf") == [17, 17, 11, 7, 5, 3, 2, 1, 1]
    assert len(lengths(64, "distinct")) == 64
    with pytest.raises(ValueError, match="no popularity 'even'; there are identical"):
        lengths(64, "even")


def test_a_route_sends_each_row_to_its_slot():
    slots = [2, 0, 2, 1, 0]
    (rows,), (starts,) = route(slots, 4, "cpu")
    assert rows.tolist() == [1, 4, 3, 0, 2]
    assert starts.tolist() == [0, 2, 3, 5, 5]


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_punicas_contenders_compute_the_same(popularity, device):
    case = tiny(PunicaCase(popularity, 64, device=device))
    x, W, As, Bs = operands = case.operands()
    object.__setattr__(case, "operands", lambda: operands)
    deltas = [
        rows @ A.t() @ B.t() for rows, A, B in zip(x.split(case.lengths), As, Bs, strict=True)
    ]  # one adapter after the other, in rows' order
    steps = case.steps({})
    assert set(steps) == {FROZEN, OURS, LOOP, GATHER}
    if device == "cpu":  # a graph's replay returns nothing
        torch.testing.assert_close(steps[FROZEN](), x @ W.t())
        for name in (OURS, LOOP, GATHER):
            torch.testing.assert_close(steps[name](), x @ W.t() + torch.cat(deltas), msg=name)


@pytest.mark.parametrize("op", ["shrink", "expand"])
def test_vllms_contenders_compute_the_same(op):
    case = tiny(VllmLoraCase(op, 64, 4096))
    ours, loop = (contender() for contender in case._set().values())
    if op == "shrink":  # ours is in the order of the routing
        ours = torch.empty_like(loop).index_copy_(0, route(case.slots(), 4, "cpu").rows[0].long(), ours[0])
    torch.testing.assert_close(ours, loop)
    assert len(Counter(case.slots())) > 1


def test_contenders_of_groups_compute_the_same():
    case = tiny(RoutedGroupCase(3))
    seeded = {}
    for name in (OURS, SEPARATE, FROZEN):  # on operands that every call of `steps` draws
        torch.manual_seed(0)
        seeded[name] = case.steps({})[name]()
    assert [out.shape for out in seeded[OURS]] == [(7, 24), (7, 8), (7, 8)]
    for ours, separate, frozen in zip(*(seeded[name] for name in (OURS, SEPARATE, FROZEN)), strict=True):
        torch.testing.assert_close(ours, separate)
        assert not torch.allclose(ours, frozen)


@pytest.mark.parametrize(
    ("suite", "baseline"), [("punica", LOOP), ("vllm-lora", LOOP), ("routed-groups", SEPARATE)], ids=str
)
def test_the_suite_runs_and_says_what_it_must_move(suite, baseline, monkeypatch):
    for kind in (PunicaCase, VllmLoraCase, RoutedGroupCase):
        monkeypatch.setattr(kind, "effort", None)
    cases = list(SUITES[suite](False, "cpu"))
    assert suite in GPU_SUITES
    assert len({case.name for case in cases}) == len(cases) > len(list(SUITES[suite](True, "cpu")))
    for case in map(tiny, cases[:5]):
        result = measure(case, {}, ONCE, CEILINGS)
        assert result.error is None, result.error
        assert OURS in result.speedup[baseline]
        assert result.roofline["seconds"] > 0


def test_each_distinct_adapter_is_counted_once():
    distinct, identical = (PunicaCase(kind, 64).work().adapter_bytes for kind in ("distinct", "identical"))
    assert distinct - identical == 63 * 2 * 16 * (4096 + 11008)
    shrink, expand = (VllmLoraCase(op, 64, 4096).work().adapter_bytes for op in ("shrink", "expand"))
    assert expand - shrink == 2 * 64 * 4096
    assert serving_ops.PunicaCase("distinct", 64).params["adapters"] == 64
    groups = [RoutedGroupCase(adapters).work().adapter_bytes for adapters in (8, 64)]
    assert groups[1] - groups[0] == 56 * 2 * 16 * (3 * 4096 + 6144)
