"""dora_linear and dora_norm: both backends against eager torch, measured by their distance from fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_operands import BACKENDS, DTYPES, LAYOUTS, SHAPES, leaves, operands, run
from numerics import assert_as_close_as_torch
from torch import Tensor

from fastpeft_kernels import backend, dora, dora_linear, dora_norm, product
from fastpeft_kernels.masks import apply_mask, draw_mask


def eager_dora(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scaling: float
) -> Tensor:
    """PEFT's formula and order of roundings, without dropout."""
    norm = torch.linalg.norm(W.to(A.dtype) + scaling * (B @ A), dim=1).detach()
    g = magnitude / norm
    base = F.linear(x, W, bias)
    extra = (g - 1) * (base if bias is None else base - bias) + g * F.linear(F.linear(x.to(A.dtype), A), B) * scaling
    return (base + extra).to(x.dtype)


def inputs_of(t: dict[str, Any]) -> tuple[Any, ...]:
    return t["x"], t["W"], t["bias"], t["A"], t["B"], t["magnitude"], 0.7


def dora_operands(
    shape: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> dict[str, Any]:
    """Those of LoRA, and a magnitude that is not the norm."""
    t = operands(shape, dtypes, device)
    t["magnitude"] = (torch.rand(shape[2], device=device) + 0.5).to(dtypes[1]).requires_grad_()
    return t


def assert_close(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert ours.keys() == eager.keys()
    for key in eager:
        assert ours[key].dtype == eager[key].dtype
        assert ours[key].shape == eager[key].shape
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_close_to_fp64_as_torch(path, shape, dtypes, device):
    t = dora_operands(shape, dtypes, device)
    with backend(path):
        ours = run(dora_linear, leaves(inputs_of(t)), t["dout"])
    eager = run(eager_dora, leaves(inputs_of(t)), t["dout"])
    assert_close(ours, eager, run(eager_dora, leaves(inputs_of(t), torch.float64), t["dout"]))


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(path, layout, device):
    """x, W, A, B and the gradient may have any strides."""
    t = dora_operands((33, 40, 36, 8), (torch.bfloat16, torch.float32), device)
    for key in ("x", "W", "A", "B", "dout"):
        t[key] = LAYOUTS[layout](t[key].detach()).requires_grad_(key not in ("W", "dout"))
    with backend(path):
        ours = run(dora_linear, inputs_of(t), t["dout"])
    eager = run(eager_dora, leaves(inputs_of(t)), t["dout"])
    assert_close(ours, eager, run(eager_dora, leaves(inputs_of(t), torch.float64), t["dout"]))


@pytest.mark.parametrize(("path", "rows"), [("torch", 1100), ("triton", 146)])
@pytest.mark.usefixtures("small_bands")
def test_several_tiles_and_planes(path, rows, device):
    """More rows and columns than a tile of either path, the last ones not full."""
    t = dora_operands((rows, 300, 290, 8), (torch.bfloat16, torch.float32), device)
    with backend(path):
        ours = run(dora_linear, leaves(inputs_of(t)), t["dout"])
    eager = run(eager_dora, leaves(inputs_of(t)), t["dout"])
    assert_close(ours, eager, run(eager_dora, leaves(inputs_of(t), torch.float64), t["dout"]))


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_norm(path, dtypes, device):
    t = dora_operands((1, 700, 300, 40), dtypes, device)
    W, A, B = (t[key].detach() for key in ("W", "A", "B"))

    def eager(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.linalg.norm(W.to(A.dtype) + 0.7 * (B @ A), dim=1)

    with backend(path):
        ours = dora_norm(W, A, B, 0.7)
    assert ours.dtype == torch.float32
    exact = eager(W.double(), A.double(), B.double())
    assert_as_close_as_torch("norm", ours, eager(W, A.to(torch.float32), B.to(torch.float32)), exact)


@pytest.mark.parametrize("path", BACKENDS)
def test_norm_of_rows_that_the_update_all_but_undoes(path, device):
    """W ≈ -s B A: ‖W‖² + 2s (W Aᵀ) · B + s² B (A Aᵀ) · B would be the difference of two large numbers."""
    A, B = torch.randn(4, 64, device=device), torch.randn(48, 4, device=device)
    W = (-(0.7 * B.double() @ A.double()) + 1e-4 * torch.randn(48, 64, device=device)).float()
    exact = torch.linalg.norm(W.double() + 0.7 * B.double() @ A.double(), dim=1)
    factored = (W.square().sum(1) + 1.4 * ((W @ A.t()) * B).sum(1) + 0.49 * ((B @ (A @ A.t())) * B).sum(1)).sqrt()
    with backend(path):
        ours = dora_norm(W, A, B, 0.7)
    error = ((ours.double() - exact) / exact).abs().max()
    assert error < 2e-2  # an entry of W carries 1e-7 of its size, the sum is 1e-4 of it
    assert not ((factored.double() - exact) / exact).abs().max() < 10 * error


@pytest.mark.parametrize("path", BACKENDS)
def test_a_row_of_zeros_stays_one(path, device):
    """Such as the rows that pad a vocabulary: the magnitude is 0, and the norm."""
    t = dora_operands((9, 24, 20, 4), (torch.float32, torch.float32), device)
    for key in ("W", "B", "magnitude"):
        t[key].data[3] = 0.0
    with backend(path):
        ours = run(dora_linear, inputs_of(t), t["dout"])
    assert all(value.isfinite().all() for value in ours.values())
    assert torch.equal(ours["out"][:, 3], t["bias"].detach()[3].expand(9))


@pytest.mark.parametrize("path", BACKENDS)
def test_expanded_gradient_and_batch_dimensions(path, device):
    t = dora_operands((12, 40, 36, 8), (torch.float32, torch.float32), device)
    x = t["x"].detach().view(3, 4, 40).requires_grad_()
    with backend(path):
        dora_linear(x, t["W"], None, t["A"], t["B"], t["magnitude"], 0.7).sum().backward()
    exact = leaves((t["x"], t["W"], None, t["A"], t["B"], t["magnitude"], 0.7), torch.float64)
    eager_dora(*exact).sum().backward()
    torch.testing.assert_close(x.grad.view(12, 40).double(), exact[0].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(t["magnitude"].grad.double(), exact[5].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_rows(path, p, device):
    t = dora_operands((0, 40, 36, 8), (torch.bfloat16, torch.float32), device)
    with backend(path):
        ours = run(dora_linear, (*inputs_of(t), p), t["dout"])
    assert ours["out"].shape == (0, 36)
    for key in ("A", "B", "magnitude"):
        assert not t[key].grad.any()


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=str)
def test_dropout_uses_one_mask_in_forward_and_backward(path, dtypes, device, monkeypatch):
    """With the mask known, output and gradients are those of eager torch with that mask.

    Eager takes the product of W in x's dtype, as PEFT does without dropout: that is the accuracy of the magnitude's
    gradient here. (With dropout, PEFT widens x and W to the adapter's dtype for this product.)
    """
    t = dora_operands((66, 70, 36, 8), dtypes, device)
    mask = draw_mask(66, 70, 0.4, torch.device(device))
    keep = apply_mask(torch.ones(66, 70, device=device), mask)
    monkeypatch.setattr(dora, "draw_mask", lambda x, p: mask)

    def masked(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, s: float) -> Tensor:
        g = magnitude / torch.linalg.norm(W.to(A.dtype) + s * (B @ A), dim=1).detach()
        dropped = x * keep.to(x.dtype) * torch.tensor(1 / 0.6, dtype=x.dtype, device=device)
        low_rank = F.linear(F.linear(dropped.to(A.dtype), A), B) * s
        return (F.linear(x, W, bias) + (g - 1) * F.linear(dropped, W) + g * low_rank).to(x.dtype)

    with backend(path):
        ours = run(dora_linear, (*leaves(inputs_of(t)), 0.4), t["dout"])
    eager, exact = (
        run(masked, leaves(inputs_of(t)), t["dout"]),
        run(masked, leaves(inputs_of(t), torch.float64), t["dout"]),
    )
    for key in eager:
        allowed = eager[key].double() + 2e-5 * exact[key].abs().max()  # 1 - p is rounded to a multiple of 2^-16
        assert_as_close_as_torch(key, ours[key], allowed, exact[key], eager[key].dtype)


@pytest.mark.parametrize("path", BACKENDS)
def test_same_seed_same_bits(path, device):
    t = dora_operands((70, 64, 36, 8), (torch.bfloat16, torch.float32), device)

    def once(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        with backend(path):
            return run(dora_linear, (*leaves(inputs_of(t)), 0.1), t["dout"])

    first, again, other = once(3), once(3), once(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["out"], other["out"])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_bytes(p, device):
    """Beside x and the parameters: the product in x's dtype, S, the norm, and one bit an element for dropout."""
    M, K, N, r = 256, 512, 384, 16
    t = dora_operands((M, K, N, r), (torch.bfloat16, torch.float32), device)
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        dora_linear(*inputs_of(t), p)
    for known in ("x", "W", "A", "B", "magnitude"):
        assert kept.pop(t[known].untyped_storage().data_ptr())
    assert sum(kept.values()) == 2 * M * N + 4 * M * r + 4 * N + (M * K // 8 if p else 0)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_untrained_parts_cost_nothing(path, p, device):
    """No gradient for x, and none at all without grad mode."""
    t = dora_operands((9, 24, 20, 4), (torch.float32, torch.float32), device)
    inputs = (t["x"].detach(), *inputs_of(t)[1:], p)
    with backend(path):
        dora_linear(*inputs).sum().backward()
        assert inputs[0].grad is None
        assert t["magnitude"].grad is not None
        with torch.no_grad():
            assert not dora_linear(*inputs).requires_grad


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dx_of_a_frozen_adapter_is_as_close_to_fp64_as_torch(path, shape, dtypes, device):
    t = dora_operands(shape, dtypes, device)
    frozen = (t["x"], *(v.detach() if isinstance(v, Tensor) else v for v in inputs_of(t)[1:]))
    with backend(path):
        ours = run(dora_linear, leaves(frozen), t["dout"])
    eager = run(eager_dora, leaves(frozen), t["dout"])
    assert_close(ours, eager, run(eager_dora, leaves(frozen, torch.float64), t["dout"]))


def test_nothing_is_summed_over_rows_for_a_frozen_adapter_on_a_cpu(monkeypatch):
    for function in ("outer", "output_pass", "_column_pass"):
        monkeypatch.setattr(f"fastpeft_kernels.reference_dora.{function}", None)
    t = dora_operands((70, 40, 36, 8), (torch.bfloat16, torch.float32), "cpu")
    with backend("torch"):
        dora_linear(t["x"], *(v.detach() if isinstance(v, Tensor) else v for v in inputs_of(t)[1:])).sum().backward()
    assert t["x"].grad is not None


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("trained", [("x",), ("bias",), ("x", "A"), ("magnitude",)], ids="-".join)
def test_gradients_of_parts_are_those_of_training_all(path, trained, device):
    t = dora_operands((70, 40, 36, 8), (torch.float32, torch.float32), device)
    names = ("x", "W", "bias", "A", "B", "magnitude")

    def gradients(*trained: str) -> dict[str, Tensor]:
        inputs = [t[name].detach().requires_grad_(name in trained) for name in names]
        torch.manual_seed(5)
        dora_linear(*inputs, 0.7, 0.3).backward(t["dout"])
        return {name: tensor.grad for name, tensor in zip(names, inputs, strict=True) if tensor.grad is not None}

    with backend(path):
        ours, all_of_them = gradients(*trained), gradients("x", "bias", "A", "B", "magnitude")
    assert set(ours) == set(trained)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, all_of_them[name])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_autocast_computes_as_torch_does(dtypes, device):
    t = dora_operands((33, 64, 48, 8), dtypes, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = run(dora_linear, leaves(inputs_of(t)), t["dout"])
        eager = run(lambda *args: eager_dora(*args).bfloat16(), leaves(inputs_of(t)), t["dout"])
    assert_close(ours, eager, run(eager_dora, leaves(inputs_of(t), torch.float64), t["dout"]))


def test_backward_inside_autocast_stays_accurate(device):
    t = dora_operands((33, 64, 48, 8), (torch.float32, torch.float32), device)
    inputs = leaves(inputs_of(t))
    out = dora_linear(*inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        out.backward(t["dout"])
    exact = run(eager_dora, leaves(inputs_of(t), torch.float64), t["dout"])
    for key, gradient in exact.items():
        if key != "out":
            ours = inputs[int(key.removeprefix("grad "))].grad.double()
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "dropout"])
def test_opcheck(path, masked, device):
    t = dora_operands((6, 40, 36, 4), (torch.float32, torch.float32), device)
    mask = draw_mask(6, 40, 0.3, torch.device(device)) if masked else None
    x, W, A, B, magnitude, dout, y = (t[key].detach() for key in ("x", "W", "A", "B", "magnitude", "dout", "out"))
    S, norm, scales = torch.randn(6, 4, device=device), torch.rand(36, device=device) + 1, (0.7, 1.5 if masked else 1.0)
    trained = (t["x"], W, t["bias"], t["A"], t["B"], t["magnitude"])
    with backend(path):
        torch.library.opcheck(dora._dora_linear, (*trained, mask, *scales), test_utils=_CHECKS)
        torch.library.opcheck(dora._dora_norm, (W, A, B, 0.7))
        for needs in ((True, True), (False, True), (True, False)):
            saved = (dout, x, W, A, B, magnitude, S, y, norm, mask)
            torch.library.opcheck(dora._dora_linear_backward, (*saved, *scales, *needs))


# As for LoRA: S, y and norm are outputs for backward alone.
_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": lambda t: t["A"][:, :-1]}, r"lora_A must be \(r, K\) = \(r, 24\)"),
        ({"W": lambda t: t["W"].clone().requires_grad_()}, "freeze it"),
        ({"magnitude": lambda t: t["magnitude"][:-1]}, r"magnitude must be \(N,\) = \(20,\)"),
        ({"magnitude": lambda t: t["magnitude"].half()}, "of float32 or lora_A's dtype torch.float32; got .*float16"),
        ({"p": lambda t: 1.0}, "0 <= p < 1"),
        ({"p": lambda t: float("nan")}, "0 <= p < 1"),
    ],
)
def test_errors(change, message, device):
    t = dora_operands((9, 24, 20, 4), (torch.float32, torch.float32), device) | {"p": 0.0}
    t |= {key: make(t) for key, make in change.items()}
    with pytest.raises(ValueError, match=message):
        dora_linear(*inputs_of(t), t["p"])


@pytest.mark.parametrize("path", BACKENDS)
def test_our_own_product_is_refused(path, device):
    t = dora_operands((9, 24, 20, 4), (torch.float32, torch.float32), device)
    with backend(path), product("own"), pytest.raises(RuntimeError, match='not product "own"'):
        dora_linear(*inputs_of(t))


def test_errors_of_the_norm(device):
    t = dora_operands((9, 24, 20, 4), (torch.float32, torch.float32), device)
    with pytest.raises(
        ValueError, match=r"must be \(N, K\), \(r, K\) and \(N, r\); got \(20, 24\), \(4, 23\), \(20, 4\)"
    ):
        dora_norm(t["W"], t["A"][:, :-1], t["B"], 0.7)


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compiles_to_one_graph(path, p, device):
    t = dora_operands((16, 24, 20, 4), (torch.float32, torch.float32), device)

    def block(x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
        out = dora_linear(x, t["W"], t["bias"].detach(), A, B, magnitude, 0.7, p).square()
        return out * dora_norm(t["W"], A, B, 0.7)

    def grads(fn: Callable[..., Tensor]) -> list[Tensor]:
        inputs = leaves((t["x"], t["A"], t["B"], t["magnitude"]))
        torch.manual_seed(5)
        out = fn(*inputs)
        out.sum().backward()
        return [out.detach(), *(i.grad for i in inputs)]

    torch._dynamo.reset()
    with backend(path):
        for ours, eager in zip(grads(torch.compile(block, fullgraph=True)), grads(block), strict=True):
            torch.testing.assert_close(ours, eager)
