"""lora_group: as close to fp64 as the separate layers of eager torch, on both backends."""

import importlib
from itertools import cycle
from typing import Any

import pytest
import torch
from lora_operands import BACKENDS, DTYPES, LAYOUTS, eager_add, eager_linear, operands
from numerics import assert_as_close_as_torch
from torch import Tensor

from fastpeft_kernels import LoraOperands, backend, lora_group, lora_linear, product
from fastpeft_kernels.lora_group import _lora_group, _lora_group_backward
from fastpeft_kernels.masks import apply_mask, draw_mask

lora_group_module = importlib.import_module("fastpeft_kernels.lora_group")  # the package's name is the function's

WIDTHS, RANKS, SCALES = (65, 40, 96), (4, 16, 7), (0.7, 1.3, 0.4)
TRAINED = ("bias", "lora_A", "lora_B")


def make_group(
    M: int, K: int, dtypes: tuple[torch.dtype, torch.dtype], device: str, ranks: tuple[int, ...] = RANKS
) -> tuple[Tensor, list[Any], list]:
    """x, a member of a width and a scaling of its own for each rank, and a gradient for each output."""
    parts = [operands((M, K, N, r), dtypes, device) for N, r in zip(cycle(WIDTHS), ranks, strict=False)]
    members = [LoraOperands(p["W"], p["bias"], p["A"], p["B"], s) for p, s in zip(parts, cycle(SCALES), strict=False)]
    return parts[0]["x"], members, [p["dout"] for p in parts]


def copies(
    x: Tensor, members: list[LoraOperands], dtype: torch.dtype | None = None
) -> tuple[Tensor, list[LoraOperands]]:
    """Fresh leaves with the same values and strides; in `dtype` where given."""

    def leaf(t: Any) -> Any:
        return t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    return leaf(x), [LoraOperands(*map(leaf, member)) for member in members]


def results(outs: Any, x: Tensor, members: list[LoraOperands], douts: list[Tensor]) -> dict[str, Tensor]:
    torch.autograd.backward(outs, [dout.to(out.dtype) for out, dout in zip(outs, douts, strict=True)])
    found = {f"out {i}": out.detach() for i, out in enumerate(outs)} | {"dx": x.grad}
    for i, member in enumerate(members):
        found |= {f"d{name} {i}": getattr(member, name).grad for name in TRAINED}
    return found


def eager_group(x: Tensor, members: list[LoraOperands]) -> list[Tensor]:
    return [eager_linear(x, *member[:5]) for member in members]


def assert_close(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for key in eager:
        assert ours[key].dtype == eager[key].dtype
        assert ours[key].shape == eager[key].shape
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (130, 72)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_close_to_fp64_as_torch(path, shape, dtypes, device):
    x, members, douts = make_group(*shape, dtypes, device)
    with backend(path):
        inputs = copies(x, members)
        ours = results(lora_group(*inputs), *inputs, douts)
    eager_in, exact_in = copies(x, members), copies(x, members, torch.float64)
    eager = results(eager_group(*eager_in), *eager_in, douts)
    assert_close(ours, eager, results(eager_group(*exact_in), *exact_in, douts))


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(path, layout, device):
    x, members, douts = make_group(33, 40, (torch.bfloat16, torch.float32), device)
    strided = LAYOUTS[layout]
    x = strided(x.detach()).requires_grad_()
    members = [
        m._replace(**{n: strided(getattr(m, n).detach()).requires_grad_() for n in ("lora_A", "lora_B")})
        for m in members
    ]
    douts = [strided(dout) for dout in douts]
    eager_in, exact_in = copies(x, members), copies(x, members, torch.float64)
    with backend(path):
        ours = results(lora_group(x, members), x, members, douts)
    eager = results(eager_group(*eager_in), *eager_in, douts)
    assert_close(ours, eager, results(eager_group(*exact_in), *exact_in, douts))


def test_several_tiles(device):
    """More rows and columns than one tile of the path on a CPU."""
    x, members, douts = make_group(1100, 1700, (torch.bfloat16, torch.float32), device)
    inputs, eager_in, exact_in = copies(x, members), copies(x, members), copies(x, members, torch.float64)
    ours = results(lora_group(*inputs), *inputs, douts)
    eager = results(eager_group(*eager_in), *eager_in, douts)
    assert_close(ours, eager, results(eager_group(*exact_in), *exact_in, douts))


def check_with_masks(path, shape, ranks, ps, dtypes, device, monkeypatch):
    """The op, with a mask of our own for each member whose p is 0.4, against the formula with that mask."""
    x, members, douts = make_group(*shape, dtypes, device, ranks)
    members = [member._replace(dropout_p=p) for member, p in zip(members, ps, strict=True)]
    masks = [draw_mask(*shape, p, torch.device(device)) if p else None for p in ps]
    drawn = [mask for mask in masks if mask is not None]
    assert not any(torch.equal(mask, other) for i, mask in enumerate(drawn) for other in drawn[:i])
    monkeypatch.setattr(lora_group_module, "draw_mask", lambda x, p, copies: torch.cat(drawn))
    ones = torch.ones(shape, device=device)
    keeps = [None if mask is None else apply_mask(ones, mask) for mask in masks]

    def masked(x: Tensor, members: list[LoraOperands]) -> list[Tensor]:
        outs = []
        for member, keep in zip(members, keeps, strict=True):
            A = member.lora_A
            dropped = x.to(A.dtype) if keep is None else x.to(A.dtype) * keep.to(A.dtype) / 0.6
            base = torch.nn.functional.linear(x, member.W, member.bias)
            outs.append(eager_add(base, dropped, A, member.lora_B, member.scaling))
        return outs

    eager_in, exact_in = copies(x, members), copies(x, members, torch.float64)
    with backend(path):
        ours = results(lora_group(x, members), x, members, douts)
    eager, exact = (results(masked(*inputs), *inputs, douts) for inputs in (eager_in, exact_in))
    for key in eager:
        allowed = eager[key].double() + 2e-5 * exact[key].abs().max()  # 1 - p is rounded to a multiple of 2^-16
        assert_as_close_as_torch(key, ours[key], allowed, exact[key], eager[key].dtype)


@pytest.mark.parametrize("path", BACKENDS)
def test_dropout_is_independent_and_the_same_in_backward(path, device, monkeypatch):
    """One member without dropout among two with: each takes its own mask, in the order of the members."""
    dtypes = (torch.bfloat16, torch.float32)
    check_with_masks(path, (66, 72), RANKS, (0.4, 0.0, 0.4), dtypes, device, monkeypatch)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("shape", "ranks", "ps"),
    [
        ((66, 72), (32, 20, 32), (0.0, 0.0, 0.0)),  # more than one launch takes: a second adds onto dx
        ((66, 72), (32, 20, 32), (0.0, 0.4, 0.4)),
        ((40, 72), (16, 16, 3, 1, 16), (0.0, 0.0, 0.0, 0.0, 0.0)),
        ((40, 72), (16, 16, 3, 1, 16), (0.4, 0.0, 0.4, 0.4, 0.0)),
        ((40, 40), (64, 24), (0.4, 0.4)),  # a launch for each
        ((40, 40), (80, 4), (0.0, 0.4)),  # more than a block of the rank: the kernels of one layer
        ((3, 300), (16, 16, 16), (0.0, 0.0, 0.0)),  # few rows: three planes of S
        ((3, 300), (32, 8, 16), (0.4, 0.4, 0.0)),
    ],
    ids=str,
)
def test_ranks_and_masks(path, dtypes, shape, ranks, ps, device, monkeypatch):
    check_with_masks(path, shape, ranks, ps, dtypes, device, monkeypatch)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_unused_output_has_no_gradients(path, compiled, device):
    """None, no zeros: an optimizer would let those decay the weights."""
    x, members, douts = make_group(20, 40, (torch.float32, torch.float32), device)
    alone = copies(x, [members[0], members[2]])

    def two(x, members):
        first, _, last = lora_group(x, members)
        return first, last

    with backend(path):
        outs = (torch.compile(two, fullgraph=True, backend="aot_eager") if compiled else two)(x, members)
        torch.autograd.backward(outs, [douts[0], douts[2]])
    assert members[1].lora_A.grad is members[1].lora_B.grad is members[1].bias.grad is None
    expected = results(lora_group(*alone), *alone, [douts[0], douts[2]])
    torch.testing.assert_close(x.grad, expected["dx"])
    torch.testing.assert_close(members[2].lora_B.grad, expected["dlora_B 1"])
    torch.testing.assert_close(members[0].bias.grad, expected["dbias 0"])


@pytest.mark.parametrize("path", BACKENDS)
def test_no_rows_no_gradient_for_x_and_batch_dimensions(path, device):
    x, members, douts = make_group(0, 40, (torch.bfloat16, torch.float32), device)
    with backend(path):
        found = results(lora_group(x, members), x, members, douts)
    assert [found[f"out {i}"].shape for i in range(3)] == [(0, N) for N in WIDTHS]
    assert not found["dlora_A 1"].any()

    x = torch.randn(2, 3, 40, device=device, dtype=torch.bfloat16)
    with backend(path):
        outs = lora_group(x, members)
        assert [out.shape for out in outs] == [(2, 3, N) for N in WIDTHS]
        sum(out.sum() for out in outs).backward()  # the gradient of a sum has stride 0
        with torch.no_grad():
            for quiet, out in zip(lora_group(x, members), outs, strict=True):
                assert not quiet.requires_grad
                assert torch.equal(quiet, out)
    assert x.grad is None


def test_saved_bytes(device):
    """x once and by reference, S of all ranks, one bit an element and member."""
    x, members, _ = make_group(256, 512, (torch.bfloat16, torch.float32), device)
    members = [member._replace(dropout_p=0.1) for member in members]
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        lora_group(x, members)
    for known in (x, *(t for m in members for t in (m.W, m.lora_A, m.lora_B))):
        assert kept.pop(known.untyped_storage().data_ptr())
    assert 0 < sum(kept.values()) <= 3 * 256 * 512 // 8 + 4 * 256 * sum(RANKS)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "dropout"])
def test_opcheck(path, masked, device):
    x, members, douts = make_group(6, 40, (torch.float32, torch.float32), device)
    Ws, biases, As, Bs = (list(operands) for operands in list(zip(*members, strict=True))[:4])
    masks = [draw_mask(6, 40, 0.3, torch.device(device)) if masked else x.new_empty(0) for _ in members]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    S = torch.randn(6, sum(RANKS), device=device)
    with backend(path):
        torch.library.opcheck(_lora_group, (x, Ws, biases, As, Bs, masks, list(SCALES)), test_utils=checks)
        detached = [[t.detach() for t in ts] for ts in (As, Bs)]
        for needs in ((True, True), (False, True), (True, False)):
            arguments = (douts, x.detach(), Ws, *detached, S, masks, list(SCALES), *needs)
            torch.library.opcheck(_lora_group_backward, arguments)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compiles_to_one_graph(path, p, device):
    x, members, _ = make_group(16, 24, (torch.float32, torch.float32), device)

    def block(x: Tensor, members: list[LoraOperands]) -> Tensor:
        q, k, v = lora_group(x, [member._replace(dropout_p=p) for member in members])
        return q.sum() + k.square().sum() + v.sigmoid().sum()

    def grads(fn: Any) -> list[Tensor]:
        inputs = copies(x, members)
        torch.manual_seed(5)
        fn(*inputs).backward()
        return [inputs[0].grad, *(getattr(m, name).grad for m in inputs[1] for name in TRAINED)]

    torch._dynamo.reset()
    with backend(path):
        for ours, eager in zip(grads(torch.compile(block, fullgraph=True)), grads(block), strict=True):
            torch.testing.assert_close(ours, eager)


def test_autocast_computes_as_the_single_op(device):
    x, members, douts = make_group(33, 64, (torch.bfloat16, torch.float32), device)
    single_in = copies(x, members)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = results(lora_group(x, members), x, members, douts)
        single = results([lora_linear(single_in[0], *m) for m in single_in[1]], *single_in, douts)
    for key in single:
        assert ours[key].dtype == single[key].dtype
        torch.testing.assert_close(ours[key], single[key], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("path", BACKENDS)
def test_our_own_product_is_refused(path, device):
    x, members, _ = make_group(9, 24, (torch.float32, torch.float32), device)
    with backend(path), product("own"), pytest.raises(RuntimeError, match='not product "own"'):
        lora_group(x, members)


def test_errors(device):
    x, members, _ = make_group(9, 24, (torch.float32, torch.float32), device)
    with pytest.raises(ValueError, match="at least one member"):
        lora_group(x, [])
    with pytest.raises(ValueError, match=r"W must be \(N, K\)"):
        lora_group(x, [members[0], members[1]._replace(W=members[1].W[:, :-1])])
    with pytest.raises(ValueError, match="0 <= p < 1"):
        lora_group(x, [members[0], members[1]._replace(dropout_p=1.0)])
    x, members = x.detach().double(), [LoraOperands(*(t.double() for t in m[:4]), m.scaling) for m in members]
    with pytest.raises(ValueError, match=r"of one dtype; got torch.float32, torch.float64"):
        lora_group(
            x, [members[0], members[1]._replace(lora_A=members[1].lora_A.float(), lora_B=members[1].lora_B.float())]
        )
