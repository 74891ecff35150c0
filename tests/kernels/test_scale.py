"""scale_columns and scale_linear: both backends against eager torch, measured by their distance from fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_close_as_torch
from torch import Tensor

from fastpeft.benchmark.memory import saved_bytes
from fastpeft_kernels import backend, reference_scale, scale, scale_columns, scale_linear

BACKENDS = ["torch", "triton"]
SHAPES = [(1, 1), (7, 33), (3, 5, 129), (64, 128), (129, 1000)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "every-second-column": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
}


def eager_columns(x: Tensor, scale: Tensor) -> Tensor:
    """PEFT's formula and order of roundings, in the wider of both dtypes."""
    return (x * scale.flatten()).to(x.dtype)


def eager_linear(x: Tensor, scale: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(eager_columns(x, scale), W, bias)


OPS = {"columns": (scale_columns, eager_columns), "linear": (scale_linear, eager_linear)}


def operands(
    name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], device: str, bias: bool = True
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(inputs of the op, dout): random, since ones hide a swapped row."""
    (*batch, K), (wide, narrow) = shape, dtypes
    N = K + 3
    x = torch.randn(shape, device=device).to(wide).requires_grad_()
    inputs = [x, torch.randn(K, device=device).to(narrow).requires_grad_()]
    if name == "linear":
        inputs.append((torch.randn(N, K, device=device) * K**-0.5).to(wide))
        inputs += [torch.randn(N, device=device).to(wide).requires_grad_()] * bias
    dout = torch.randn(*batch, N if name == "linear" else K, device=device).to(wide)
    return tuple(inputs), dout


def leaves(inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Fresh leaves of the same values and strides; in `dtype` where given."""
    return tuple(t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in inputs)


def run(op: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> dict[str, Tensor]:
    out = op(*inputs)
    out.backward(dout.to(out.dtype))
    return {"out": out.detach(), **{f"grad {i}": t.grad for i, t in enumerate(inputs) if t.requires_grad}}


def assert_close(name: str, inputs: tuple[Tensor, ...], dout: Tensor, path: str) -> None:
    op, eager_op = OPS[name]
    with backend(path):
        ours = run(op, leaves(inputs), dout)
    eager, exact = run(eager_op, leaves(inputs), dout), run(eager_op, leaves(inputs, torch.float64), dout)
    for key in eager:
        assert ours[key].dtype == eager[key].dtype
        assert ours[key].shape == eager[key].shape
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_close_to_fp64_as_torch(name, path, shape, dtypes, device):
    assert_close(name, *operands(name, shape, dtypes, device), path)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_strides(name, path, layout, dtypes, device):
    """Every operand and the gradient may have any strides; the output is contiguous."""
    inputs, dout = operands(name, (33, 40), dtypes, device)
    inputs = tuple(LAYOUTS[layout](t.detach()).requires_grad_(t.requires_grad) for t in inputs)
    assert_close(name, inputs, LAYOUTS[layout](dout), path)
    with backend(path):
        assert OPS[name][0](*inputs).is_contiguous()


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("shape", [(24,), (1, 24), (24, 1)], ids=str)
def test_a_parameter_needs_no_reshaping(path, shape, device):
    x = torch.randn(5, 24, device=device, requires_grad=True)
    vector, dout = torch.randn(shape, device=device, requires_grad=True), torch.randn(5, 24, device=device)
    with backend(path):
        scale_columns(x, vector).backward(dout)
    assert vector.grad.shape == shape
    torch.testing.assert_close(vector.grad.flatten(), (dout * x.detach()).sum(0))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_many_rows(name, path, dtypes, device):
    """More rows than one tile, one block of a base product and one plane take, the last of each not full."""
    assert_close(name, *operands(name, (2500, 40), dtypes, device, bias=False), path)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_wide_tiles(name, dtypes, device):
    """More columns than a tile of the most rows holds."""
    assert_close(name, *operands(name, (300, 3000), dtypes, device), "torch")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
def test_expanded_gradient(name, path, device):
    inputs, dout = operands(name, (3, 4, 40), DTYPES[0], device)
    with backend(path):
        OPS[name][0](*inputs).sum().backward()  # the gradient of a sum has stride 0
    exact = run(OPS[name][1], leaves(inputs, torch.float64), torch.ones_like(dout))
    for i, t in enumerate(inputs):
        if t.requires_grad:
            torch.testing.assert_close(t.grad.double(), exact[f"grad {i}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_no_rows(name, path, dtypes, device):
    inputs, dout = operands(name, (0, 24), dtypes, device)
    with backend(path):
        ours = run(OPS[name][0], inputs, dout)
    assert ours["out"].shape == dout.shape
    assert ours["grad 0"].shape == (0, 24)
    assert torch.equal(ours["grad 1"], torch.zeros_like(inputs[1]))


def test_float64_is_exact(device):
    """No kernel computes it, and no mix with it loses bits on the way."""
    for dtypes in ((torch.float64, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.float64)):
        inputs, dout = operands("columns", (9, 24), dtypes, device)
        ours, eager = run(scale_columns, leaves(inputs), dout), run(eager_columns, leaves(inputs), dout)
        assert all(torch.equal(ours[key], eager[key]) for key in ("out", "grad 0"))
        torch.testing.assert_close(ours["grad 1"], eager["grad 1"])
    inputs, dout = operands("linear", (9, 24), (torch.float64, torch.float64), device)
    x, scale, W, bias = inputs
    assert torch.autograd.gradcheck(lambda x, scale, bias: scale_linear(x, scale, W, bias), (x, scale, bias))
    with backend("triton"), pytest.raises(RuntimeError, match="no kernels for float64"):
        scale_columns(x, scale)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
def test_same_bits_every_time(name, path, device):
    inputs, dout = operands(name, (700, 40), DTYPES[1], device)
    with backend(path):
        first, again = (run(OPS[name][0], leaves(inputs), dout) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "scale"])
def test_what_nobody_asked_for_is_neither_kept_nor_computed(name, path, wanted, device, monkeypatch):
    inputs, dout = operands(name, (33, 40), DTYPES[1], device)
    inputs = (*(t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=False)), *leaves(inputs)[2:])
    asked: list[tuple[bool, bool]] = []
    backward = f"_run_{name}_backward"
    real = getattr(scale, backward)

    def spy(dout: Tensor, x: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        dx, dscale = real(dout, x, *rest)
        asked.append((dx.numel() > 0, dscale.numel() > 0))
        return dx, dscale

    monkeypatch.setattr(scale, backward, spy)
    with backend(path):
        saved = saved_bytes(lambda: OPS[name][0](*inputs), inputs=inputs[:1], parameters=inputs[1:])
        run(OPS[name][0], inputs, dout)
    assert asked == [wanted]
    assert saved.own == 0
    assert saved.by_reference == (inputs[0].nbytes if wanted[1] else 0)
    exact = run(OPS[name][1], leaves(inputs, torch.float64), dout)
    torch.testing.assert_close(inputs[wanted.index(True)].grad.double(), exact[f"grad {wanted.index(True)}"],
                               rtol=2e-2, atol=2e-2)  # fmt: skip


@pytest.mark.parametrize("path", BACKENDS)
def test_no_grad_mode(path, device):
    inputs, _ = operands("columns", (9, 24), DTYPES[1], device)
    with backend(path), torch.no_grad():
        out = scale_columns(*inputs)
    assert not out.requires_grad
    assert torch.equal(out, eager_columns(*inputs))


@pytest.mark.parametrize("name", OPS)
def test_inside_autocast_it_stays_what_it_is(name, device):
    """Both compute in x's dtype, forward and backward, wherever they are called."""
    inputs, dout = operands(name, (33, 64), DTYPES[0], device)
    expected = run(OPS[name][0], leaves(inputs), dout)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = run(OPS[name][0], leaves(inputs), dout)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("path", BACKENDS)
def test_opcheck(path, device):
    for bias in (True, False):
        inputs, dout = operands("linear", (6, 40), DTYPES[0], device, bias)
        x, vector, W = (t.detach() for t in inputs[:3])
        with backend(path):
            torch.library.opcheck(scale._scale_linear, (*inputs, *[None] * (not bias)))
            for need_dx, given in ((True, x), (True, None), (False, x)):
                torch.library.opcheck(scale._scale_linear_backward, (dout, given, vector, W, need_dx))
    inputs, dout = operands("columns", (6, 40), DTYPES[0], device)
    with backend(path):
        torch.library.opcheck(scale._scale_columns, inputs)
        for need_dx, given in ((True, x), (True, None), (False, x)):
            torch.library.opcheck(scale._scale_columns_backward, (dout, given, vector, need_dx))


@pytest.mark.parametrize("name", OPS)
def test_scale_of_another_size(name, device):
    inputs, _ = operands(name, (4, 24), DTYPES[0], device)
    for shape in ((23,), (1,), (2, 12), (1, 24, 1)):
        with pytest.raises(
            ValueError, match=r"expected shape \(24,\), \(1, 24\) or \(24, 1\), got .* of shape \(4, 24"
        ):
            OPS[name][0](inputs[0], torch.ones(shape, device=device), *inputs[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: lambda W: W[:, :-1]}, r"W must be \(N, K\) = \(N, 24\)"),
        ({2: lambda W: W.half()}, "W must be .* of x's dtype"),
        ({2: lambda W: W.clone().requires_grad_()}, "freeze it"),
        ({3: lambda bias: bias[:-1]}, r"bias must be \(27,\)"),
        ({3: lambda bias: bias.half()}, "bias must be .* of torch.float32"),
    ],
)
def test_errors_of_linear(change, message, device):
    inputs, _ = operands("linear", (4, 24), DTYPES[0], device)
    changed = [change[i](t) if i in change else t for i, t in enumerate(inputs)]
    with pytest.raises(ValueError, match=message):
        scale_linear(*changed)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
def test_compiles_to_one_graph(name, path, device):
    inputs, _ = operands(name, (16, 24), DTYPES[0], device)

    def block(x: Tensor, vector: Tensor) -> Tensor:
        return OPS[name][0](x.sin(), vector, *(t.detach() for t in inputs[2:])).square()

    def grads(fn: Callable[..., Tensor]) -> list[Tensor]:
        x, vector = leaves(inputs[:2])
        out = fn(x, vector)
        out.sum().backward()
        return [out.detach(), x.grad, vector.grad]

    torch._dynamo.reset()
    with backend(path):
        for ours, eager in zip(grads(torch.compile(block, fullgraph=True)), grads(block), strict=True):
            torch.testing.assert_close(ours, eager)


def test_nothing_of_the_inputs_size_is_widened(device):
    """16-bit rows are widened by the tile: no tensor on the way is as large as x in fp32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor) and t.dtype == torch.float32:
                    largest = max(largest, t.nbytes)
            return out

    M, K = 4096, 256
    x, dout = (torch.randn(M, K, device=device).bfloat16() for _ in range(2))
    vector, W = torch.randn(K, device=device), torch.randn(64, K, device=device).bfloat16()
    with Watch(), backend("torch"):
        reference_scale.scale_columns(x, vector)
        reference_scale.scale_columns_backward(dout, x, vector, True)
        reference_scale.scale_linear(x, vector, W, None)
        reference_scale.scale_linear_backward(dout[:, :64], x, vector, W, True)
    assert 0 < largest <= 2 * 4 * reference_scale.TILE < 4 * M * K
