"""lora_linear and lora_add: both backends against eager torch, measured by their distance from fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_operands import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    SHAPES,
    eager_add,
    eager_linear,
    known_mask,
    leaves,
    operands,
    run,
)
from numerics import assert_as_close_as_torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels import backend, dropout, lora, lora_add, lora_linear, low_rank
from fastpeft_kernels.masks import apply_mask, draw_mask


def linear_inputs(t: dict[str, Any]) -> tuple[Any, ...]:
    return t["x"], t["W"], t["bias"], t["A"], t["B"], 0.7


def add_inputs(t: dict[str, Any]) -> tuple[Any, ...]:
    return t["out"], t["x"], t["A"], t["B"], 0.7


OPS = {"linear": (lora_linear, eager_linear, linear_inputs), "add": (lora_add, eager_add, add_inputs)}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_close_to_fp64_as_torch(name, path, shape, dtypes, device):
    op, eager_op, pick = OPS[name]
    tensors = operands(shape, dtypes, device)
    inputs, dout = pick(tensors), tensors["dout"]
    with backend(path):
        ours = run(op, leaves(inputs), dout)
    eager, exact = run(eager_op, leaves(inputs), dout), run(eager_op, leaves(inputs, torch.float64), dout)
    for key in eager:
        assert ours[key].dtype == eager[key].dtype
        assert ours[key].shape == eager[key].shape
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(name, path, layout, device):
    """x, A, B and the gradient may have any strides."""
    op, eager_op, pick = OPS[name]
    tensors = operands((33, 40, 36, 8), (torch.bfloat16, torch.float32), device)
    for key in ("x", "A", "B", "out", "dout"):
        tensors[key] = LAYOUTS[layout](tensors[key].detach()).requires_grad_(key != "dout")
    inputs, dout = pick(tensors), tensors["dout"]
    with backend(path):
        ours = run(op, inputs, dout)
    eager, exact = run(eager_op, leaves(inputs), dout), run(eager_op, leaves(inputs, torch.float64), dout)
    for key in eager:
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
@pytest.mark.usefixtures("small_bands")
def test_sums_over_several_planes_of_rows(dtypes, device):
    """dA and dB of more rows than one plane of the kernels' split reduction takes, the last plane not full."""
    t = operands((300, 40, 36, 8), dtypes, device)
    with backend("triton"):
        ours = run(lora_linear, leaves(linear_inputs(t)), t["dout"])
    eager = run(eager_linear, leaves(linear_inputs(t)), t["dout"])
    exact = run(eager_linear, leaves(linear_inputs(t), torch.float64), t["dout"])
    for key in eager:
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_several_tiles(name, dtypes, device):
    """More rows and more columns than one tile of the path on a CPU, the last tiles not full."""
    op, eager_op, pick = OPS[name]
    t = operands((1100, 1500, 1300, 8), dtypes, device)
    inputs, dout = pick(t), t["dout"]
    ours, eager = run(op, leaves(inputs), dout), run(eager_op, leaves(inputs), dout)
    exact = run(eager_op, leaves(inputs, torch.float64), dout)
    for key in eager:
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("path", BACKENDS)
def test_expanded_gradient_and_batch_dimensions(path, device):
    t = operands((12, 40, 36, 8), (torch.float32, torch.float32), device)
    x = t["x"].detach().view(3, 4, 40).requires_grad_()
    with backend(path):
        lora_linear(x, t["W"], None, t["A"], t["B"], 0.7).sum().backward()  # the gradient of a sum has stride 0
    exact = leaves((t["x"], t["W"], None, t["A"], t["B"], 0.7), torch.float64)
    eager_linear(*exact).sum().backward()
    torch.testing.assert_close(x.grad.view(12, 40).double(), exact[0].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(t["B"].grad.double(), exact[4].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_no_rows(name, path, device):
    op, _, pick = OPS[name]
    t = operands((0, 40, 36, 8), (torch.bfloat16, torch.float32), device)
    with backend(path):
        ours = run(op, (*pick(t)[:-1], 0.7, 0.3), t["dout"])
    assert ours["out"].shape == (0, 36)
    assert not t["A"].grad.any()
    assert not t["B"].grad.any()


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_a_checkpoint_draws_the_same_mask_again(name, reentrant, path, device):
    op, _, pick = OPS[name]
    t = operands((66, 70, 36, 8), DTYPES[1], device)
    inputs, dout = pick(t), t["dout"]
    with backend(path):
        torch.manual_seed(7)
        ours = run(lambda *args: checkpoint(op, *args, 0.4, use_reentrant=reentrant), leaves(inputs), dout)
        torch.manual_seed(7)
        expected = run(op, (*leaves(inputs), 0.4), dout)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_dropout_uses_one_mask_in_forward_and_backward(name, path, dtypes, device):
    """With the mask known, output and gradients are those of eager torch with that mask."""
    op, _, pick = OPS[name]
    t = operands((66, 70, 36, 8), dtypes, device)
    keep = known_mask(t["x"], 0.4, path)
    assert 0.5 < keep.mean() < 0.7
    inputs, dout, at = pick(t), t["dout"], 0 if name == "linear" else 1

    def masked(*args: Any) -> Tensor:  # as eager_op, with drop(x) on the low-rank path only
        x, A, B = args[at], args[-3], args[-2]
        base = F.linear(x, args[1], args[2]) if name == "linear" else args[0]
        scale = torch.tensor(1 / 0.6, dtype=A.dtype, device=device)
        return eager_add(base, x.to(A.dtype) * keep.to(A.dtype) * scale, A, B, 0.7)

    with backend(path):
        ours = run(op, (*leaves(inputs)[:-1], 0.7, 0.4), dout)
    eager, exact = run(masked, leaves(inputs), dout), run(masked, leaves(inputs, torch.float64), dout)
    for key in eager:
        allowed = eager[key].double() + 2e-5 * exact[key].abs().max()  # 1 - p is rounded to a multiple of 2^-16
        assert_as_close_as_torch(key, ours[key], allowed, exact[key], eager[key].dtype)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_many_rows_do_not_lose_the_last_ones(narrow, device):
    """16-bit adapters: entries of one sign over many row chunks, where a 16-bit running sum stands still."""
    M, K, r = 8192, 32, 4
    x, S = (torch.randn(M, size, device=device).mul_(0.1).add_(1.0).to(narrow) for size in (K, r))
    mask = draw_mask(M, K, 0.1, torch.device(device))
    dropped = apply_mask(x, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "TILE", 64 * K)  # the smallest tiles, as for wide layers
        dA = low_rank.outer(x, S, mask)
        _, dB = low_rank.output_pass(x.float(), S.new_zeros(K, r), S, 1.0)
    exact = S.double().t() @ dropped.double()
    assert_as_close_as_torch("dA", dA, S.t() @ dropped, exact)
    assert_as_close_as_torch("dB", dB.t(), S.t() @ x, S.double().t() @ x.double())


@pytest.mark.parametrize("path", BACKENDS)
def test_same_seed_same_bits(path, device):
    t = operands((70, 64, 36, 8), (torch.bfloat16, torch.float32), device)

    def once(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        with backend(path):
            return run(lora_linear, (*leaves(linear_inputs(t))[:-1], 0.7, 0.1), t["dout"])

    first, again, other = once(3), once(3), once(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["out"], other["out"])


def test_saved_bytes(device):
    """x itself by reference, S, and one bit an element: at most MK/8 + 8Mr bytes beside x and the parameters."""
    M, K, N, r = 256, 512, 384, 16
    t = operands((M, K, N, r), (torch.bfloat16, torch.float32), device)
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        lora_linear(t["x"], t["W"], t["bias"], t["A"], t["B"], 0.7, 0.1)
    for known in ("x", "W", "A", "B"):
        assert kept.pop(t[known].untyped_storage().data_ptr())
    assert 0 < sum(kept.values()) <= M * K // 8 + 8 * M * r


@pytest.mark.parametrize("path", BACKENDS)
def test_untrained_parts_cost_nothing(path, device):
    """No gradient for x, and none at all without grad mode."""
    t = operands((9, 24, 20, 4), (torch.float32, torch.float32), device)
    x = t["x"].detach()
    with backend(path):
        lora_linear(x, t["W"], None, t["A"], t["B"], 0.7).sum().backward()
        assert x.grad is None
        assert t["A"].grad is not None
        with torch.no_grad():
            assert not lora_linear(x, t["W"], None, t["A"], t["B"], 0.7).requires_grad


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_autocast_computes_as_torch_does(dtypes, device):
    t = operands((33, 64, 48, 8), dtypes, device)
    inputs = linear_inputs(t)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, eager = run(lora_linear, leaves(inputs), t["dout"]), run(eager_linear, leaves(inputs), t["dout"])
    exact = run(eager_linear, leaves(inputs, torch.float64), t["dout"])
    for key in eager:
        assert ours[key].dtype == eager[key].dtype
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("name", OPS)
def test_backward_inside_autocast_stays_accurate(name, device):
    op, eager_op, pick = OPS[name]
    t = operands((33, 64, 48, 8), (torch.float32, torch.float32), device)
    inputs = leaves(pick(t))
    out = op(*inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        out.backward(t["dout"])
    exact = run(eager_op, leaves(pick(t), torch.float64), t["dout"])
    for key, gradient in exact.items():
        if key != "out":
            ours = inputs[int(key.removeprefix("grad "))].grad.double()
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "dropout"])
def test_opcheck(path, masked, device):
    t = operands((6, 40, 36, 4), (torch.float32, torch.float32), device)
    mask = draw_mask(6, 40, 0.3, torch.device(device)) if masked else None
    S = torch.randn(6, 4, device=device)
    x, W, A, B, dout = (t[key].detach() for key in ("x", "W", "A", "B", "dout"))
    with backend(path):
        torch.library.opcheck(lora._lora_linear, (t["x"], W, t["bias"], t["A"], t["B"], mask, 0.7), test_utils=_CHECKS)
        torch.library.opcheck(lora._lora_add, (t["out"], t["x"], t["A"], t["B"], mask, 0.7), test_utils=_CHECKS)
        for needs in ((True, True), (False, True), (True, False)):
            torch.library.opcheck(lora._lora_linear_backward, (dout, x, W, A, B, S, mask, 0.7, *needs))
            torch.library.opcheck(lora._lora_add_backward, (dout, x, A, B, S, mask, 0.7, *needs))


# Without test_aot_dispatch_dynamic's comparison of second outputs' gradients: S is an output for backward alone.
_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": lambda t: t["A"][:, :-1]}, r"lora_A must be \(r, K\) = \(r, 24\)"),
        ({"B": lambda t: t["B"][:, :-1]}, r"lora_B must be \(N, r\) = \(20, 4\)"),
        ({"W": lambda t: t["W"][:, :-1]}, r"W must be \(N, K\)"),
        ({"W": lambda t: t["W"].half()}, r"W must be .* of x's dtype"),
        ({"W": lambda t: t["W"].clone().requires_grad_()}, "freeze it"),
        ({"bias": lambda t: t["bias"][:-1]}, r"bias must be \(20,\)"),
        ({"A": lambda t: t["A"].half()}, "lora_A and lora_B must both be float32"),
        ({"p": lambda t: 1.0}, "0 <= p < 1"),
        ({"p": lambda t: float("nan")}, "0 <= p < 1"),
    ],
)
def test_errors_of_linear(change, message, device):
    t = operands((9, 24, 20, 4), (torch.float32, torch.float32), device) | {"p": 0.0}
    t |= {key: make(t) for key, make in change.items()}
    with pytest.raises(ValueError, match=message):
        lora_linear(t["x"], t["W"], t["bias"], t["A"], t["B"], 0.7, t["p"])


def test_no_kernel_rounds_a_float64_output(device):
    """The kernels add in fp32: an output in fp64, whatever x is, is not theirs."""
    t = operands((9, 24, 20, 4), (torch.float32, torch.float32), device)
    out = t["out"].detach().double()
    ours = lora_add(out, t["x"], t["A"], torch.zeros_like(t["B"]), 0.7)
    assert torch.equal(ours, out)
    with backend("triton"), pytest.raises(RuntimeError, match="no kernels for float64"):
        lora_add(out, t["x"], t["A"], t["B"], 0.7)


def test_errors_of_add(device):
    t = operands((9, 24, 20, 4), (torch.float32, torch.float32), device)
    with pytest.raises(ValueError, match="out and x need the same rows"):
        lora_add(t["out"][:-1], t["x"], t["A"], t["B"], 0.7)


BLOCKS: dict[str, Callable[[dict[str, Any], float], Callable[..., Tensor]]] = {
    "linear": lambda t, p: lambda x, A, B: lora_linear(x, t["W"], t["bias"].detach(), A, B, 0.7, p).square(),
    "add": lambda t, p: lambda x, A, B: lora_add(x @ t["W"].t(), x, A, B, 0.3, p).square(),
    "dropout": lambda t, p: lambda x, A, B: dropout(x @ A.t(), p) @ B.t(),
}


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("name", BLOCKS)
def test_compiles_to_one_graph(path, p, name, device):
    t = operands((16, 24, 20, 4), (torch.float32, torch.float32), device)
    block = BLOCKS[name](t, p)

    def grads(fn: Callable[..., Tensor]) -> list[Tensor]:
        inputs = leaves((t["x"], t["A"], t["B"]))
        torch.manual_seed(5)
        out = fn(*inputs)
        out.sum().backward()
        return [out.detach(), *(i.grad for i in inputs)]

    torch._dynamo.reset()
    with backend(path):
        for ours, eager in zip(grads(torch.compile(block, fullgraph=True)), grads(block), strict=True):
            torch.testing.assert_close(ours, eager)
