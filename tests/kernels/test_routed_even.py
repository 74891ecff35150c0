"""Batches whose slots have as many rows, in order: batched products, as close to fp64 as each row by itself."""

import pytest
import torch
from lora_operands import DTYPES
from routed_operands import laid_side_by_side, one_each, routing
from test_routed import SCALES, check, make

from fastpeft_kernels import (
    backend,
    expand_routed,
    lora_routed,
    reference_routed,
    routed_even,
    routed_ops,
    routed_pairs,
    shrink_routed,
)
from fastpeft_kernels.dropout import draw_mask
from fastpeft_kernels.routed_pairs import Pairs

ONE_BY_ONE = {"shrink", "shrink_backward", "expand_", "expand_backward"}
IN_PAIRS = {"forward", "backward"}


@pytest.fixture
def taken(monkeypatch):
    """The names of the functions of routed_even, and of Pairs, that ran."""
    names = []
    for owner, name in [*((routed_even, name) for name in ONE_BY_ONE), *((Pairs, name) for name in IN_PAIRS)]:
        inner = getattr(owner, name)

        def spy(*args, name=name, inner=inner):
            names.append(name)
            return inner(*args)

        monkeypatch.setattr(owner, name, spy)
    return names


def one_by_one(base, x, As, Bs, scales, rows, starts, weights=None, mask=None):
    S = shrink_routed(x, As, scales, rows, starts, weights, mask)
    return expand_routed(base, S, Bs, rows, starts)


EVEN = {
    "one-rank": ((24, 33, 40), (4, 4, 4), [0] * 8 + [1] * 8 + [2] * 8),
    "ranks": ((24, 33, 40), (5, 8, 3), [0] * 8 + [1] * 8 + [2] * 8),
    "an-empty-slot-of-the-largest-rank": ((10, 40, 33), (4, 17, 3), [0] * 5 + [2] * 5),
    "one-row-each": ((3, 17, 9), (2, 3, 2), [0, 1, 2]),
}


@pytest.mark.parametrize("case", EVEN)
@pytest.mark.parametrize(
    ("op", "weighted", "wanted"),
    [(lora_routed, False, IN_PAIRS), (lora_routed, True, ONE_BY_ONE), (one_by_one, False, ONE_BY_ONE)],
)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_close_to_fp64_as_torch(case, op, weighted, wanted, dtypes, device, taken):
    shape, ranks, slots = EVEN[case]
    check("torch", *make(shape, ranks, dtypes, device), one_each(slots), device, op, weighted=weighted)
    assert set(taken) == wanted


@pytest.mark.parametrize(
    ("ranks", "slots"),
    [
        ((4, 4), [0] * 3 + [1] * 4),  # uneven
        ((4, 4), [0, 1] * 4),  # not in order
        ((4, 4), [0] * 3 + [1] * 3 + [-1]),  # a row without an adapter
        ((4, 4), [1] * 6),  # one slot
        ((1, 16, 1), [0] * 2 + [1] * 2 + [2] * 2),  # more padding than ranks
    ],
)
def test_other_batches_go_slot_by_slot(ranks, slots, device, taken):
    dtypes = (torch.bfloat16, torch.float32)
    check("torch", *make((len(slots), 33, 40), ranks, dtypes, device), one_each(slots), device)
    assert not taken


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), (4, 4, 9, 9)], ids=str)
@pytest.mark.parametrize("places", [(0, 1, 2, 3), (1, 0, 3, 2)], ids=str)
@pytest.mark.parametrize(("op", "wanted"), [(lora_routed, IN_PAIRS), (one_by_one, ONE_BY_ONE)])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_factors_side_by_side_are_not_copied(ranks, places, op, wanted, dtypes, device, taken, monkeypatch):
    """Where they lie in order, each rank by itself; in another order they are copied."""
    (base, x, As, Bs), dout = make((24, 33, 40), ranks, dtypes, device)
    As, Bs = ([t.requires_grad_() for t in laid_side_by_side(factors, places)] for factors in (As, Bs))
    copied = []
    padded = routed_even.padded
    for module in (routed_even, routed_pairs):
        monkeypatch.setattr(module, "padded", lambda *args: copied.append(args) or padded(*args))
    check("torch", (base, x, As, Bs), dout, one_each([m // 6 for m in range(24)]), device, op)
    assert set(taken) == wanted
    assert bool(copied) == (places != (0, 1, 2, 3))


@pytest.mark.parametrize("op", [lora_routed, one_by_one])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_base_that_is_wider_than_the_factors_is_not_rounded_to_them(op, recorded, device):
    """What weighted rows with dropout add pass by pass."""
    (base, x, As, Bs), _ = make((6, 40, 33), (4, 4), (torch.bfloat16, torch.bfloat16), device)
    base = torch.randn(base.shape, device=device)
    with backend("torch"), torch.no_grad():
        for B in Bs:
            B.zero_()
        with torch.set_grad_enabled(recorded):
            out = op(base, x, As, Bs, SCALES[:2], *routing(one_each([0] * 3 + [1] * 3), 2, device))
    assert torch.equal(out, base)


def test_large_batches_go_slot_by_slot(device, taken, monkeypatch):
    monkeypatch.setattr(routed_even, "MOST_ELEMENTS", 6 * 40 - 1)
    check("torch", *make((6, 40, 40), (4, 4), DTYPES[0], device), one_each([0] * 3 + [1] * 3), device)
    assert not taken


@pytest.mark.parametrize(("op", "wanted"), [(lora_routed, IN_PAIRS), (one_by_one, ONE_BY_ONE)])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dropouts_mask(op, wanted, dtypes, device, taken, monkeypatch):
    """The same mask as slot by slot: the output and every gradient."""
    inputs, dout = make((24, 70, 40), (5, 8, 3), dtypes, device)
    base, x, As, Bs = inputs
    rows, starts, _ = routing(one_each([0] * 8 + [1] * 8 + [2] * 8), 3, device)
    mask = draw_mask(x.detach(), 0.4)
    found = {}
    for even in (True, False):
        if not even:
            monkeypatch.setattr(reference_routed, "_even", lambda *args: None)
            monkeypatch.setattr(routed_ops, "pairs_for", lambda *args: None)
        for t in (base, x, *As, *Bs):
            t.grad = None
        with backend("torch"):
            out = op(base, x, As, Bs, SCALES[:3], rows, starts, mask=mask)
            out.backward(dout)
        found[even] = [out.detach(), x.grad, *(factor.grad for factor in (*As, *Bs))]
    assert set(taken) == wanted
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert ours.dtype == theirs.dtype
        bar = 4 * torch.finfo(theirs.dtype).eps * theirs.abs().max()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(bar))


def pairs_on_a_shelf(ranks=(4, 4, 9, 9)):
    """Operands on a CPU whose factors lie side by side, one routing for them, and the gradients that they have."""
    (base, x, As, Bs), dout = make((24, 33, 40), ranks, (torch.float32, torch.float32), "cpu")
    As, Bs = ([t.requires_grad_() for t in laid_side_by_side(factors, (0, 1, 2, 3))] for factors in (As, Bs))
    leaves = (base, x, *As, *Bs)

    def forward():
        tensors = routing(one_each([m // 6 for m in range(24)]), 4, "cpu")
        return lora_routed(base, x, As, Bs, SCALES[:4], *tensors)

    return leaves, forward, dout, torch.autograd.grad(forward(), leaves, dout)


def assert_same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_factors_that_moved_before_the_backward(taken):
    """Nobody keeps to memory that no longer is theirs, and slots stay together as they were in the forward."""
    leaves, forward, dout, wanted = pairs_on_a_shelf()
    out, places = forward(), [leaf.data for leaf in leaves[2:]]
    for leaf in leaves[2:]:
        leaf.data = leaf.data.clone()
    kept = [place.clone() for place in places]
    for place in places:
        place.fill_(torch.nan)
    assert_same(torch.autograd.grad(out, leaves, dout), wanted)
    out = forward()  # they are apart now
    for leaf, place, value in zip(leaves[2:], places, kept, strict=True):
        leaf.data = place.copy_(value)
    assert_same(torch.autograd.grad(out, leaves, dout), wanted)
    assert set(taken) == IN_PAIRS


def test_hooks_that_give_back_copies():
    leaves, forward, dout, wanted = pairs_on_a_shelf()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        out = forward()
    with torch.no_grad():
        for leaf in leaves[2:]:
            leaf.zero_()  # the copies are what was saved
    assert_same(torch.autograd.grad(out, leaves, dout), wanted)


def test_a_factor_that_was_changed_before_the_backward_is_noticed():
    leaves, forward, dout, _ = pairs_on_a_shelf()
    out = forward()
    with torch.no_grad():
        leaves[-1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_the_output_is_nobody_elses():
    leaves, forward, _, _ = pairs_on_a_shelf()
    before = leaves[0].detach().clone()
    with torch.no_grad():
        forward().zero_()
    forward().detach().zero_()
    assert torch.equal(leaves[0], before)


def test_what_is_not_finite_stays_with_its_slot(device):
    """An adapter that diverges in joint training leaves the others' rows and gradients as they are."""
    shape, ranks, slots = EVEN["ranks"]
    inputs, dout = make(shape, ranks, (torch.float32, torch.float32), device)
    base, x, As, Bs = inputs
    tensors = routing(one_each(slots), 3, device)
    with torch.no_grad():
        As[1][0, 0] = torch.inf
        Bs[1][1, 1] = torch.nan
    with backend("torch"):
        out = lora_routed(base, x, As, Bs, SCALES[:3], *tensors)
        out.backward(dout)
    others = torch.tensor([slot != 1 for slot in slots], device=device)
    assert not out[~others].isfinite().all()
    for t in (out[others], x.grad[others], As[0].grad, As[2].grad, Bs[0].grad, Bs[2].grad):
        assert t.isfinite().all()
