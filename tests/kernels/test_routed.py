"""Routed LoRA: as close to fp64 as each row by itself in eager torch, on both backends, and blind to the other rows."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lora_operands import BACKENDS, DTYPES, LAYOUTS
from numerics import assert_as_close_as_torch
from routed_operands import Entries, Routing, by_row_add, factors, one_each, routing
from torch import Tensor

from fastpeft_kernels import backend, expand_routed, lora_routed, shrink_routed, tiles
from fastpeft_kernels.masks import apply_mask, draw_mask
from fastpeft_kernels.routed_ops import (
    _expand_routed,
    _expand_routed_backward,
    _lora_routed,
    _shrink_routed,
    _shrink_routed_backward,
)

SCALES = (0.7, 1.3, 0.4, 2.0, 1.1)
Operands = tuple[Tensor, Tensor, list[Tensor], list[Tensor]]  # base, x, As, Bs


def make(
    shape: tuple[int, int, int], ranks: Sequence[int], dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> tuple[Operands, Tensor]:
    """Leaves, and a gradient for the output."""
    (M, K, N), (wide, narrow) = shape, dtypes
    base, dout = (torch.randn(M, N, device=device).to(wide) for _ in range(2))
    x = torch.randn(M, K, device=device).to(wide).requires_grad_()
    As, Bs = factors(ranks, K, narrow, device), factors(ranks, N, narrow, device, transposed=True)
    return (base.requires_grad_(), x, As, Bs), dout


def copies(inputs: Operands, dtype: torch.dtype | None = None) -> Operands:
    """Fresh leaves with the same values and strides; in `dtype` where given."""

    def leaf(t: Any) -> Any:
        if isinstance(t, list):
            return [leaf(part) for part in t]
        return t.detach().to(dtype or t.dtype).requires_grad_()

    return tuple(leaf(t) for t in inputs)  # type: ignore[return-value]


def results(op: Callable[..., Tensor], inputs: Operands, dout: Tensor, *rest: Any) -> dict[str, Tensor]:
    """The output and the gradients, those of all slots side by side; zeros where eager torch has none."""
    base, x, As, Bs = inputs
    out = op(base, x, As, Bs, *rest)
    out.backward(dout.to(out.dtype))
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (*As, *Bs)]
    dAs, dBs = (torch.cat([grad.flatten() for grad in part]) for part in (grads[: len(As)], grads[len(As) :]))
    return {"out": out.detach(), "dbase": base.grad, "dx": x.grad, "dAs": dAs, "dBs": dBs}


def check(
    path: str, inputs: Operands, dout: Tensor, entries: Entries, device: str, op: Any = lora_routed, **kwargs: Any
) -> None:
    """`lora_routed`, or what computes the same, against rows by themselves."""
    scales = SCALES[: len(inputs[2])]
    tensors = routing(entries, len(scales), device, **kwargs)
    with backend(path):
        ours = results(op, inputs, dout, scales, *tensors)
    eager_in, exact_in = copies(inputs), copies(inputs, torch.float64)
    eager = results(by_row_add, eager_in, dout, scales, entries)
    exact = results(by_row_add, exact_in, dout, scales, entries)
    for key in eager:
        assert ours[key].dtype == eager[key].dtype
        assert ours[key].shape == eager[key].shape
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


MIXED = [[(0, 1.0)], [(2, 1.0)], [], [(1, 1.0)], [(0, 1.0)], [], [(2, 1.0)]]
CASES: dict[str, tuple[tuple[int, int, int], tuple[int, ...], Entries]] = {
    "one-row": ((1, 1, 1), (1,), [[(0, 1.0)]]),
    "mixed": ((7, 33, 65), (3, 16, 1), MIXED),
    "all-ranks": ((45, 72, 40), (17, 64, 3, 1, 16), one_each([m * 7 % 6 - 1 for m in range(45)])),
    "runs-and-an-empty-slot": ((40, 300, 24), (4, 8, 16), one_each([2] * 18 + [0] * 17 + [-1] * 5)),
    "weighted": (
        (9, 40, 33),
        (3, 17, 8),
        [[(1, 0.3)], [(0, 0.7), (1, 0.25)], [], [(2, 1.0)], [(1, -0.5), (2, 2.0), (0, 0.1)], *one_each([0, -1, 2, 2])],
    ),
}


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_close_to_fp64_as_torch(path, case, dtypes, device):
    shape, ranks, entries = CASES[case]
    check(path, *make(shape, ranks, dtypes, device), entries, device)


@pytest.mark.parametrize("dtypes", DTYPES[1:4:2], ids=str)
def test_tiles_of_many_rows(dtypes, device, monkeypatch):
    monkeypatch.setattr(tiles, "FEW_ROUTED_ROWS", 1)
    monkeypatch.setattr(tiles, "ROWS_PER_PLANE", 32)  # several planes of a slot
    entries = one_each([0] * 70 + [1, -1, 2] * 3)
    check("triton", *make((79, 40, 33), (3, 40, 16), dtypes, device), entries, device)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(path, layout, device):
    strided = LAYOUTS[layout]
    (base, x, As, Bs), dout = make((7, 40, 33), (4, 17, 8), (torch.bfloat16, torch.float32), device)
    base, x = (strided(t.detach()).requires_grad_() for t in (base, x))
    As, Bs = ([strided(t.detach()).requires_grad_() for t in ts] for ts in (As, Bs))
    check(path, (base, x, As, Bs), strided(dout), MIXED, device)


@pytest.mark.parametrize("path", BACKENDS)
def test_factors_of_one_bank_may_lie_differently(path, device):
    (base, x, As, Bs), dout = make((7, 40, 33), (4, 17, 8), (torch.float32, torch.float32), device)
    As[1], Bs[2] = (LAYOUTS["transposed"](t.detach()).requires_grad_() for t in (As[1], Bs[2]))
    check(path, (base, x, As, Bs), dout, MIXED, device)


@pytest.mark.parametrize("path", BACKENDS)
def test_the_gradient_of_a_sum_has_stride_0(path, device):
    inputs, dout = make((7, 40, 33), (4, 17, 8), (torch.bfloat16, torch.float32), device)
    check(path, inputs, dout[:1, :1].expand(7, 33), MIXED, device)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_mask(path, weighted, device):
    """The mask of a row drops for every adapter of the row, and in backward too."""
    entries = CASES["weighted"][2] if weighted else one_each([0, 2, -1, 1, 1, 0, 2, -1, 0])
    (base, x, As, Bs), dout = make((9, 72, 33), (3, 17, 8), (torch.bfloat16, torch.float32), device)
    mask = draw_mask(9, 72, 0.4, torch.device(device))
    keep = apply_mask(torch.ones(9, 72, device=device), mask)

    def masked(base: Tensor, x: Tensor, *rest: Any) -> Tensor:
        return by_row_add(base, x * keep.to(x.dtype), *rest)

    inputs, scales = (base, x, As, Bs), SCALES[:3]
    with backend(path):
        ours = results(lora_routed, inputs, dout, scales, *routing(entries, 3, device, weighted=weighted), mask)
    eager_in, exact_in = copies(inputs), copies(inputs, torch.float64)
    eager = results(masked, eager_in, dout, scales, entries)
    exact = results(masked, exact_in, dout, scales, entries)
    for key in eager:
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize(
    "entries", [one_each([-1] * 5), one_each([0, -1, 1, -1, -1]), [[], [(0, 0.5), (1, 0.5)], *[[]] * 3]]
)
def test_rows_without_an_adapter_have_the_bits_of_the_base(path, entries, device):
    """Rows of nobody, and those of a slot of rank 0: -0 stays -0, and nothing of a row's neighbours comes in."""
    (base, x, As, Bs), _ = make((5, 24, 33), (4, 0), (torch.bfloat16, torch.bfloat16), device)
    base = base.detach()
    base[:, 0], base[:, 1] = -0.0, torch.inf
    As[0].data[0, 0] = torch.nan
    bits = base.view(torch.int16)
    for grad in (False, True):
        with backend(path), torch.set_grad_enabled(grad):
            out = lora_routed(base, x, As, Bs, SCALES[:2], *routing(entries, 2, device))
        touched = torch.tensor([any(slot == 0 for slot, _ in row) for row in entries], device=device)
        assert torch.equal(out.detach().view(torch.int16)[~touched], bits[~touched])
        assert torch.isnan(out[touched]).all() or not touched.any()


@pytest.mark.parametrize("path", BACKENDS)
def test_no_rows(path, device):
    inputs, dout = make((0, 24, 33), (4, 17), (torch.bfloat16, torch.float32), device)
    with backend(path):
        found = results(lora_routed, inputs, dout, SCALES[:2], *routing([], 2, device))
    assert found["out"].shape == (0, 33)
    assert found["dx"].shape == (0, 24)
    assert found["dAs"].shape == (21 * 24,)
    assert not found["dAs"].any()
    assert not found["dBs"].any()


@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[4]], ids=str)
def test_a_row_does_not_see_the_others(dtypes, device):
    """Its bits are the same whatever the others carry, whichever slot it takes, however large other ranks are."""
    (base, x, As, Bs), _ = make((18, 264, 33), (4, 20, 33, 16), dtypes, device)
    row, others = 17, [[-1] * 18, [2] * 18, [m % 4 for m in range(18)]]
    outs = []
    with backend("triton"), torch.no_grad():
        for slots in others:
            entries = one_each([*slots[:row], 1, *slots[row + 1 :]])
            outs.append(lora_routed(base, x, As, Bs, SCALES[:4], *routing(entries, 4, device))[row])
        weighted = [[(0, 0.5), (2, 0.5)]] * 18  # two passes
        weighted[row] = [(1, 1.0)]
        outs.append(lora_routed(base, x, As, Bs, SCALES[:4], *routing(weighted, 4, device))[row])
        alone = routing(one_each([-1] * row + [0]), 1, device)  # another slot of a bank of one
        outs.append(lora_routed(base, x, As[1:2], Bs[1:2], SCALES[1:2], *alone)[row])
    assert not torch.equal(outs[0], base[row])
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize("path", BACKENDS)
def test_tensors_may_be_refilled(path, device):
    """A CUDA graph replays with another routing, and training with other weights, at the same addresses."""
    (base, x, As, Bs), _ = make((7, 24, 33), (4, 17, 8), (torch.float32, torch.float32), device)
    tensors = routing(MIXED, 3, device)
    with backend(path), torch.no_grad():
        lora_routed(base, x, As, Bs, SCALES[:3], *tensors)
        entries = one_each([1, 1, 0, -1, 2, 2, -1])
        for kept, new in zip(tensors[:2], routing(entries, 3, device)[:2], strict=True):
            kept.copy_(new)
        As[1].mul_(2.0)
        out = lora_routed(base, x, As, Bs, SCALES[:3], *tensors)
    torch.testing.assert_close(out, by_row_add(base, x, As, Bs, SCALES, entries).detach())


def test_more_slots_than_are_looked_at_together(device):
    slots = 140
    (base, x, As, Bs), _ = make((5, 8, 16), [1] * slots, (torch.float32, torch.float32), device)
    entries, scales = one_each([139, 0, -1, 130, 128]), [1.0] * slots
    with backend("triton"), torch.no_grad():
        out = lora_routed(base, x, As, Bs, scales, *routing(entries, slots, device))
    torch.testing.assert_close(out, by_row_add(base, x, As, Bs, scales, entries).detach())


def test_tables_are_kept_by_what_is_in_them(device):
    """The same factors find theirs again; others, other scales or another dtype do not."""
    pytest.importorskip("triton")
    from fastpeft_kernels.gpu import _bank

    As = factors((4, 3), 24, torch.float32, device)
    kept = _bank.factor_bank(As, 0, SCALES[:2])
    assert _bank.factor_bank(As, 0, list(SCALES[:2])) is kept
    assert kept.table[:, _bank.RANK.value].tolist() == [4, 3, 0]
    assert kept.table[:2, _bank.ADDRESS.value].tolist() == [A.data_ptr() for A in As]
    assert kept.table[:, _bank.FIRST.value].tolist() == [0, 4, 7]
    for other in ((As, 0, SCALES[1:3]), (As[::-1], 0, SCALES[:2]), ([A.detach().half() for A in As], 0, SCALES[:2])):
        assert _bank.factor_bank(*other) is not kept
    assert _bank._bank.cache_info().maxsize == _bank.MOST_TABLES


@pytest.mark.gpu
def test_cuda_graph_replays_with_another_routing():
    (base, x, As, Bs), _ = make((16, 256, 512), (16, 8, 64), (torch.bfloat16, torch.bfloat16), "cuda")
    tensors = routing(one_each([0, 1, 2, -1] * 4), 3, "cuda")
    with torch.no_grad():
        lora_routed(base, x, As, Bs, SCALES[:3], *tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = lora_routed(base, x, As, Bs, SCALES[:3], *tensors)
        for slots in ([2] * 16, [-1] * 16, [0] * 9 + [1] * 7):
            for kept, new in zip(tensors[:2], routing(one_each(slots), 3, "cuda")[:2], strict=True):
                kept.copy_(new)
            graph.replay()
            assert torch.equal(out, lora_routed(base, x, As, Bs, SCALES[:3], *tensors))
        with pytest.raises(RuntimeError, match="run the step once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            lora_routed(base, x, [A.clone() for A in As], Bs, SCALES[:3], *tensors)


def test_saved_bytes(device):
    """x by reference, S, and the routing: nothing of the size of x or out."""
    (base, x, As, Bs), _ = make((256, 512, 128), (4, 16), (torch.bfloat16, torch.float32), device)
    tensors = routing(one_each([0, 1] * 128), 2, device)
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        lora_routed(base, x, As, Bs, SCALES[:2], *tensors)
    for known in (x, *As, *Bs, *tensors[:2]):
        assert kept.pop(known.untyped_storage().data_ptr())
    assert 0 < sum(kept.values()) <= 4 * 256 * 16


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "weights-and-mask"])
def test_opcheck(path, full, device):
    (base, x, As, Bs), dout = make((6, 40, 20), (3, 16), (torch.float32, torch.float32), device)
    entries = [[(0, 0.5), (1, 0.5)], [], *one_each([1, 1, 0, -1])] if full else one_each([0, -1, 1, 1, 0, -1])
    tensors, scales = routing(entries, 2, device), list(SCALES[:2])
    mask = draw_mask(6, 40, 0.3, torch.device(device)) if full else None
    quiet = [[t.detach() for t in ts] for ts in (As, Bs)]
    with backend(path):
        S = shrink_routed(x, As, scales, *tensors, mask).detach()
        torch.library.opcheck(_shrink_routed, (x, As, scales, *tensors, mask), test_utils=CHECKS)
        torch.library.opcheck(_expand_routed, (base, S.clone().requires_grad_(), Bs, *tensors[:2]), test_utils=CHECKS)
        torch.library.opcheck(_lora_routed, (base.detach(), x.detach(), *quiet, scales, *tensors, mask))
        for need_dx in (True, False):
            arguments = (S.clone(), x.detach(), quiet[0], scales, *tensors, mask, need_dx)
            torch.library.opcheck(_shrink_routed_backward, arguments)
        torch.library.opcheck(_expand_routed_backward, (dout, S, quiet[1], *tensors[:2]))


@pytest.mark.parametrize("path", BACKENDS)
def test_compiles_to_one_graph(path, device):
    inputs, _ = make((7, 24, 20), (3, 16, 1), (torch.float32, torch.float32), device)
    tensors = routing(MIXED, 3, device)

    def block(base: Tensor, x: Tensor, As: list[Tensor], Bs: list[Tensor]) -> Tensor:
        return lora_routed(base.sin(), x.cos(), As, Bs, SCALES[:3], *tensors).square().sum()

    def grads(fn: Any) -> list[Tensor]:
        base, x, As, Bs = copies(inputs)
        fn(base, x, As, Bs).backward()
        return [t.grad for t in (base, x, *As, *Bs)]

    torch._dynamo.reset()
    with backend(path):
        compiled = torch.compile(block, fullgraph=True)
        for ours, eager in zip(grads(compiled), grads(block), strict=True):
            torch.testing.assert_close(ours, eager)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), block(*inputs))


def test_autocast_casts_the_input_and_no_factor(device):
    (base, x, As, Bs), dout = make((7, 40, 33), (4, 17, 8), (torch.float32, torch.float32), device)
    tensors, narrow = routing(MIXED, 3, device), x.detach().bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        S = shrink_routed(x, As, SCALES[:3], *tensors)
        expand_routed(base, S, Bs, *tensors[:2]).backward(dout)
    assert torch.equal(S, shrink_routed(narrow, As, SCALES[:3], *tensors))
    assert As[0].grad.dtype == x.grad.dtype == torch.float32


def test_errors(device):
    (base, x, As, Bs), _ = make((7, 24, 33), (4, 17), (torch.float32, torch.float32), device)
    tensors = routing(one_each([0, 1, -1, 0, 0, 1, 1]), 2, device)
    scales = SCALES[:2]
    wrong: list[tuple[str, Callable[[], object]]] = [
        (r"flatten the batch first; got \(1, 7, 24\)", lambda: shrink_routed(x[None], As, scales, *tensors)),
        (r"factors must hold a matrix for each slot", lambda: shrink_routed(x, [], (), *tensors)),
        (
            r"factors\[1\] must be \(r_j, 24\); got \(17, 23\)",
            lambda: shrink_routed(x, [As[0], As[1][:, :-1]], scales, *tensors),
        ),
        (r"Bs\[0\] must be \(33, r_j\)", lambda: lora_routed(base, x, As, As, scales, *tensors)),
        (
            r"of one dtype; got torch.float32 for slot 0",
            lambda: shrink_routed(x, [As[0], As[1].half()], scales, *tensors),
        ),
        (
            r"rows must be \(P, M\) = \(P, 7\)",
            lambda: shrink_routed(x, As, scales, tensors.rows.long(), tensors.starts),
        ),
        (
            r"starts must be \(P, slots \+ 1\) = \(1, 3\)",
            lambda: shrink_routed(x, As, scales, tensors.rows, tensors.starts[:, :2]),
        ),
        (r"scales needs one number a slot: expected 2, got 1", lambda: shrink_routed(x, As, [1.0], *tensors)),
        (r"weights must be \(P, M\)", lambda: shrink_routed(x, As, scales, *tensors[:2], x[:1])),
        (r"mask must be \(M, ⌈K / 32⌉\) = \(7, 1\)", lambda: shrink_routed(x, As, scales, *tensors, tensors.rows)),
        (r"S must be \(P, M, R\) = \(1, 7, 17\)", lambda: expand_routed(base, x[None], Bs, *tensors[:2])),
        (
            r"fit each other slot by slot; got ranks \[4, 17\]",
            lambda: lora_routed(base, x, As, Bs[::-1], scales, *tensors),
        ),
        (r"base must be \(M, N\) of x's 7 rows", lambda: lora_routed(base[:3], x, As, Bs, scales, *tensors)),
    ]
    with torch.no_grad():
        for message, call in wrong:
            with pytest.raises(ValueError, match=message):
                call()
    weights = torch.ones(1, 7, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for weights"):
        lora_routed(base, x, As, Bs, scales, *tensors[:2], weights)


def test_a_routing_is_what_the_ops_say(device):
    """The tests' own routing, by hand once."""
    tensors = routing([[(1, 0.5), (0, 2.0)], [], [(0, 1.0)]], 2, "cpu")
    assert tensors.rows.tolist() == [[2, 0, 1], [0, 1, 2]]
    assert tensors.starts.tolist() == [[0, 1, 2], [0, 1, 1]]
    assert isinstance(tensors, Routing)
    assert tensors.weights is not None
    assert tensors.weights.tolist() == [[1.0, 0.5, 0.0], [2.0, 0.0, 0.0]]
