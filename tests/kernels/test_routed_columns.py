"""gather_routed and scale_routed: as close to fp64 as each row by itself in eager torch, on both backends."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lora_operands import BACKENDS, DTYPES, LAYOUTS
from numerics import assert_as_close_as_torch
from routed_operands import Entries, factors, one_each, routing
from torch import Tensor

from fastpeft_kernels import backend, gather_routed, scale_routed, tiles
from fastpeft_kernels.routed_columns import (
    _gather_routed,
    _gather_routed_backward,
    _scale_routed,
    _scale_routed_backward,
)

SCALES = (0.7, 1.3, 0.4)
WEIGHTED: Entries = [[(1, 0.3)], [(0, 0.7), (1, 0.25)], [], [(2, 1.0)], [(1, -0.5), (2, 2.0)], *one_each([0, -1, 2, 2])]
ENTRIES = {"mixed": one_each([0, 2, 2, -1, 0, 2, 0, -1, 0]), "weighted": WEIGHTED}


def leaves(tensors: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Fresh leaves of the same values and strides; in `dtype` where given."""
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def flat_grads(tensors: Sequence[Tensor | None]) -> Tensor:
    """The gradients side by side; zeros where there is none."""
    given = [t for t in tensors if t is not None]
    return torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).flatten() for t in given])


def by_row_gather(ids: Tensor, As: Sequence[Tensor], entries: Entries, like: Tensor, rows: Tensor) -> Tensor:
    """S in the shape of `like`, line by line."""
    S = torch.zeros(like.shape, dtype=As[0].dtype, device=like.device)
    for p, order in enumerate(rows.tolist()):
        for line, row in enumerate(order):
            if len(entries[row]) > p:
                slot, weight = entries[row][p]
                column = As[slot][:, ids[row]] * (SCALES[slot] * weight)
                S = S.index_put((torch.tensor(p), torch.tensor(line), torch.arange(len(column))), column)
    return S


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "transposed"])
def test_gather(path, kind, dtype, layout, device):
    entries = ENTRIES[kind]
    tensors = routing(entries, 3, device)
    ids = torch.tensor([4, 4, 0, 1, 4, 4, 10, 2, 4], device=device)  # one id twice in a slot
    As = [LAYOUTS[layout](A.detach()).requires_grad_() for A in factors((3, 17, 1), 11, dtype, device)]
    eager_As, exact_As = leaves(As), leaves(As, torch.float64)
    with backend(path):
        S = gather_routed(ids, As, SCALES, *tensors)
        dS = torch.randn(S.shape, device=device).to(dtype)
        S.backward(dS)
    eager, exact = (by_row_gather(ids, parts, entries, S, tensors.rows) for parts in (eager_As, exact_As))
    eager.backward(dS)
    exact.backward(dS.double())
    assert S.dtype == As[0].grad.dtype == dtype
    assert_as_close_as_torch("S", S.detach(), eager.detach(), exact.detach())
    assert_as_close_as_torch("dA", flat_grads(As), flat_grads(eager_As), flat_grads(exact_As))


def test_many_rows_of_one_id(device):
    """A run of lines that is longer than a program takes at once."""
    tensors = routing(one_each([0] * 150 + [1] * 3), 2, device)
    ids = torch.tensor([3] * 149 + [2] * 4, device=device, dtype=torch.int32)
    As = factors((4, 2), 5, torch.float32, device)
    with backend("triton"):
        S = gather_routed(ids, As, SCALES[:2], *tensors)
        dS = torch.randn(S.shape, device=device)
        S.backward(dS)
    torch.testing.assert_close(As[0].grad[:, 3], dS[0, :149].sum(0) * SCALES[0])
    torch.testing.assert_close(As[0].grad[:, 2], dS[0, 149] * SCALES[0])
    torch.testing.assert_close(As[1].grad[:, 2], dS[0, 150:, :2].sum(0) * SCALES[1])
    assert not As[0].grad[:, [0, 1, 4]].any()


def by_row_scale(y: Tensor, vectors: Sequence[Tensor | None], entries: Entries, bias: Tensor | None) -> Tensor:
    outs = []
    for row, taken in zip(y, entries, strict=True):
        factor, wide = None, torch.promote_types(y.dtype, torch.float32)
        for slot, weight in taken:
            vector = vectors[slot]
            if vector is not None:
                change = weight * (vector.flatten().to(wide) - 1)
                factor = change + 1 if factor is None else factor + change
        if factor is None:
            outs.append(row)
        elif bias is None:
            outs.append((row.to(wide) * factor).to(y.dtype))
        else:
            outs.append(((row.to(wide) - bias) * factor + bias).to(y.dtype))
    return torch.stack(outs) if outs else y.clone()


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_scale(path, kind, dtypes, with_bias, device):
    C, (wide, narrow), entries = 40, dtypes, ENTRIES[kind]
    vectors = [(torch.randn(shape, device=device) + 1).to(narrow) for shape in ((C,), (C, 1), (1, C))]
    check_scale(path, torch.randn(9, C, device=device).to(wide), vectors, entries, with_bias, device)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_of_strided_tensors(path, layout, device):
    y, vector = torch.randn(9, 40, device=device).bfloat16(), torch.randn(80, device=device)
    vectors = [vector[::2], None, vector[40:]]
    check_scale(path, LAYOUTS[layout](y), vectors, WEIGHTED, True, device, LAYOUTS[layout])


def test_scale_sums_bands(device, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS_PER_PLANE", 16)
    vectors = [torch.randn(24, device=device), None]
    check_scale("triton", torch.randn(70, 24, device=device), vectors, one_each([0] * 60 + [1, -1] * 5), False, device)


def check_scale(
    path: str,
    y: Tensor,
    vectors: Sequence[Tensor | None],
    entries: Entries,
    with_bias: bool,
    device: str,
    strided: Callable[[Tensor], Tensor] = lambda t: t,
) -> None:
    bias = torch.randn(y.shape[1], device=device).to(y.dtype) if with_bias else None
    dout = strided(torch.randn(y.shape, device=device).to(y.dtype))
    tensors = routing(entries, len(vectors), device)
    with backend(path):
        (ours_y,), ours_l = leaves([y]), leaves(vectors)
        ours = scale_routed(ours_y, ours_l, *tensors, bias)
        ours.backward(dout)
    (eager_y,), eager_l = leaves([y]), leaves(vectors)
    (exact_y,), exact_l = leaves([y], torch.float64), leaves(vectors, torch.float64)
    eager = by_row_scale(eager_y, eager_l, entries, bias)
    eager.backward(dout)
    exact = by_row_scale(exact_y, exact_l, entries, None if bias is None else bias.double())
    exact.backward(dout.double())
    assert_as_close_as_torch("out", ours.detach(), eager.detach(), exact.detach())
    assert_as_close_as_torch("dy", ours_y.grad, eager_y.grad, exact_y.grad)
    assert_as_close_as_torch("dl", flat_grads(ours_l), flat_grads(eager_l), flat_grads(exact_l))
    assert [None if t is None else t.grad.shape for t in ours_l] == [None if t is None else t.shape for t in vectors]
    bare = [not any(vectors[slot] is not None for slot, _ in row) for row in entries]
    assert torch.equal(ours.detach()[bare], y[bare])


@pytest.mark.parametrize("path", BACKENDS)
def test_no_rows_and_no_vectors(path, device):
    y = torch.randn(3, 8, device=device)
    with backend(path):
        assert torch.equal(scale_routed(y, [None, None], *routing(one_each([0, 1, -1]), 2, device)), y)
        empty, vector = y[:0].clone().requires_grad_(), torch.ones(8, device=device, requires_grad=True)
        scale_routed(empty, [vector], *routing([], 1, device)).sum().backward()
        assert not vector.grad.any()
        A = torch.ones(2, 8, device=device, requires_grad=True)
        S = gather_routed(torch.zeros(0, dtype=torch.int64, device=device), [A], [1.0], *routing([], 1, device))
        S.sum().backward()
        assert S.shape == (1, 0, 2)
        assert not A.grad.any()


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("path", BACKENDS)
def test_opcheck(path, device):
    entries: Entries = [[(0, 0.5), (1, 0.5)], [], *one_each([1, 1, 0, -1])]
    tensors, scales = routing(entries, 2, device), list(SCALES[:2])
    ids, As = torch.tensor([1, 0, 1, 2, 1, 0], device=device), factors((3, 16), 7, torch.float32, device)
    y, dout = (torch.randn(6, 20, device=device) for _ in range(2))
    vectors = [torch.randn(20, device=device).requires_grad_(), y.new_empty(0)]
    bias = torch.randn(20, device=device)
    with backend(path):
        torch.library.opcheck(_gather_routed, (ids, As, scales, *tensors), test_utils=CHECKS)
        dS = torch.randn(2, 6, 16, device=device)
        torch.library.opcheck(_gather_routed_backward, (dS, ids, [A.detach() for A in As], scales, *tensors))
        torch.library.opcheck(_scale_routed, (y.clone().requires_grad_(), vectors, *tensors, bias), test_utils=CHECKS)
        torch.library.opcheck(_scale_routed_backward, (dout, y, [v.detach() for v in vectors], *tensors, bias))


@pytest.mark.parametrize("path", BACKENDS)
def test_compiles_to_one_graph(path, device):
    tensors, ids = routing(one_each([0, 1, -1, 1]), 2, device), torch.tensor([1, 0, 1, 2], device=device)
    sources = [
        torch.randn(4, 20, device=device),
        *factors((3, 16), 7, torch.float32, device),
        torch.randn(20, 1, device=device),
    ]

    def block(y: Tensor, A0: Tensor, A1: Tensor, vector: Tensor) -> Tensor:
        S = gather_routed(ids, [A0, A1], SCALES[:2], *tensors)
        return S.square().sum() + scale_routed(y, [None, vector], *tensors).square().sum()

    torch._dynamo.reset()
    found = []
    with backend(path):
        for fn in (torch.compile(block, fullgraph=True), block):
            inputs = leaves(sources)
            fn(*inputs).backward()
            found.append([t.grad for t in inputs])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager)


def test_errors(device):
    tensors = routing(one_each([0, 1, -1]), 2, device)
    y, ids, As = (
        torch.randn(3, 8, device=device),
        torch.zeros(3, device=device),
        factors((2, 3), 8, torch.float32, device),
    )
    vector = torch.ones(8, device=device)
    wrong: list[tuple[str, Callable[[], object]]] = [
        (r"ids must be \(M,\) of int64 or int32", lambda: gather_routed(ids, As, SCALES[:2], *tensors)),
        (
            r"factors\[1\] must be \(r_j, 8\)",
            lambda: gather_routed(ids.long(), [As[0], As[1][:, :5]], SCALES[:2], *tensors),
        ),
        (r"y must be \(M, C\)", lambda: scale_routed(y[0], [vector] * 2, *tensors)),
        (r"vectors\[1\] must be \(8,\), \(1, 8\) or \(8, 1\)", lambda: scale_routed(y, [vector, vector[:7]], *tensors)),
        (r"all of one dtype, torch.float32", lambda: scale_routed(y, [vector, vector.half()], *tensors)),
        (r"bias must be \(8,\)", lambda: scale_routed(y, [vector, None], *tensors, vector[:3])),
        (
            "no gradient for bias",
            lambda: scale_routed(y, [vector, None], *tensors, vector.clone().requires_grad_()),
        ),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
