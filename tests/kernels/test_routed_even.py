"""Batches whose slots have as many rows, in order: batched products, as close to fp64 as each row by itself."""

import pytest
import torch
from lora_operands import DTYPES
from routed_operands import laid_side_by_side, one_each, routing
from test_routed import SCALES, check, make

from fastpeft_kernels import backend, lora_routed, reference_routed, routed_even, shrink_routed
from fastpeft_kernels.dropout import draw_mask


@pytest.fixture
def taken(monkeypatch):
    """The names of the functions of routed_even that ran."""
    names = []
    for name in ("shrink", "shrink_backward", "expand_", "expand_backward"):
        inner = getattr(routed_even, name)

        def spy(*args, name=name, inner=inner):
            names.append(name)
            return inner(*args)

        monkeypatch.setattr(routed_even, name, spy)
    return names


ALL = {"shrink", "shrink_backward", "expand_", "expand_backward"}
EVEN = {
    "one-rank": ((24, 33, 40), (4, 4, 4), [0] * 8 + [1] * 8 + [2] * 8),
    "ranks": ((24, 33, 40), (5, 8, 3), [0] * 8 + [1] * 8 + [2] * 8),
    "an-empty-slot-of-the-largest-rank": ((10, 40, 33), (4, 17, 3), [0] * 5 + [2] * 5),
    "one-row-each": ((3, 17, 9), (2, 3, 2), [0, 1, 2]),
}


@pytest.mark.parametrize("case", EVEN)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_close_to_fp64_as_torch(case, weighted, dtypes, device, taken):
    shape, ranks, slots = EVEN[case]
    check("torch", *make(shape, ranks, dtypes, device), one_each(slots), device, weighted=weighted)
    assert set(taken) == ALL


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
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_factors_side_by_side_are_not_copied(ranks, places, dtypes, device, taken, monkeypatch):
    """Where they lie in order, each rank by itself; in another order they are copied."""
    (base, x, As, Bs), dout = make((24, 33, 40), ranks, dtypes, device)
    As, Bs = ([t.requires_grad_() for t in laid_side_by_side(factors, places)] for factors in (As, Bs))
    copied = []
    padded = routed_even._padded
    monkeypatch.setattr(routed_even, "_padded", lambda *args: copied.append(args) or padded(*args))
    check("torch", (base, x, As, Bs), dout, one_each([m // 6 for m in range(24)]), device)
    assert set(taken) == ALL
    assert bool(copied) == (places != (0, 1, 2, 3))


def test_large_batches_go_slot_by_slot(device, taken, monkeypatch):
    monkeypatch.setattr(routed_even, "MOST_ELEMENTS", 6 * 40 - 1)
    check("torch", *make((6, 40, 40), (4, 4), DTYPES[0], device), one_each([0] * 3 + [1] * 3), device)
    assert not taken


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dropouts_mask(dtypes, device, taken, monkeypatch):
    """The same mask as slot by slot: S, dx and every dA."""
    (_, x, As, _), _ = make((24, 70, 40), (5, 8, 3), dtypes, device)
    rows, starts, _ = routing(one_each([0] * 8 + [1] * 8 + [2] * 8), 3, device)
    mask = draw_mask(x.detach(), 0.4)
    dS = torch.randn((1, 24, 8), device=device).to(dtypes[1])
    found = {}
    for even in (True, False):
        if not even:
            monkeypatch.setattr(reference_routed, "_even", lambda *args: None)
        for t in (x, *As):
            t.grad = None
        with backend("torch"):
            S = shrink_routed(x, As, SCALES[:3], rows, starts, mask=mask)
            S.backward(dS)
        found[even] = [S.detach(), x.grad, *(A.grad for A in As)]
    assert {"shrink", "shrink_backward"} <= set(taken)
    for ours, wanted in zip(found[True], found[False], strict=True):
        assert ours.dtype == wanted.dtype
        bar = 4 * torch.finfo(wanted.dtype).eps * wanted.abs().max()
        torch.testing.assert_close(ours, wanted, rtol=0, atol=float(bar))


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
