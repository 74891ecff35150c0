"""Adapters that are frozen while what comes before them is trained: the right dx, and no work for dA and dB."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_operands import BACKENDS, DTYPES, LAYOUTS, SHAPES, eager_add, eager_linear, leaves, operands, run
from numerics import assert_as_close_as_torch
from torch import Tensor

from fastpeft.benchmark.budget import by_kind, count_op
from fastpeft_kernels import LoraOperands, backend, lora_add, lora_group, lora_linear, product
from fastpeft_kernels.dispatch import interpreting

counts = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")

OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...]]] = {
    "linear": (lora_linear, eager_linear, ("x", "W", "bias", "A", "B")),
    "add": (lora_add, eager_add, ("out", "x", "A", "B")),
}


def frozen(t: dict[str, Any], trained: tuple[str, ...] = ("x",)) -> dict[str, Any]:
    return {key: value.detach().requires_grad_(key in trained) for key, value in t.items()}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dx_is_as_close_to_fp64_as_torch(name, path, shape, dtypes, device):
    op, eager_op, keys = OPS[name]
    t = frozen(operands(shape, dtypes, device))
    inputs = (*(t[key] for key in keys), 0.7)
    with backend(path):
        ours = run(op, leaves(inputs), t["dout"])
    eager, exact = run(eager_op, leaves(inputs), t["dout"]), run(eager_op, leaves(inputs, torch.float64), t["dout"])
    assert ours.keys() == eager.keys()
    for key in eager:
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("trained", [("x",), ("x", "A"), ("x", "B"), ("A",), ("B",)], ids="-".join)
def test_the_gradients_are_those_of_training_all(name, path, trained, device):
    """With dropout, and where one factor alone is trained."""
    op, _, keys = OPS[name]
    t = operands((70, 40, 36, 8), (torch.float32, torch.float32), device)

    def gradients(*trained: str) -> dict[str, Tensor]:
        fresh = frozen(t, trained)
        torch.manual_seed(5)
        op(*(fresh[key] for key in keys), 0.7, 0.3).backward(fresh["dout"])
        return {key: fresh[key].grad for key in keys if fresh[key].grad is not None}

    with backend(path):
        ours, all_of_them = gradients(*trained), gradients("x", "A", "B")
    assert set(ours) == set(trained)
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, all_of_them[key])


@pytest.mark.parametrize("name", OPS)
def test_nothing_is_summed_over_rows_on_a_cpu(name, monkeypatch):
    """Neither by `outer` nor in the output pass; and nothing at all runs where only the bias or `out` is trained."""
    op, _, keys = OPS[name]
    for function in ("outer", "output_pass"):
        monkeypatch.setattr(f"fastpeft_kernels.reference.{function}", None)
    t = operands((70, 40, 36, 8), (torch.bfloat16, torch.float32), "cpu")
    with backend("torch"):
        for trained in ("x", "bias" if name == "linear" else "out"):
            fresh = frozen(t, (trained,))
            if trained != "x":
                monkeypatch.setattr("fastpeft_kernels.reference._factor_pass", None)
            op(*(fresh[key] for key in keys), 0.7).backward(fresh["dout"])
            assert fresh[trained].grad is not None


def group_of(
    M: int, K: int, dtypes: tuple[torch.dtype, torch.dtype], device: str, Ns: Any = (65, 40, 96), r: int = 7
) -> tuple[Tensor, list[Any], list[Tensor]]:
    """x to be trained, members that are not, and a gradient for each of their outputs."""
    parts = [frozen(operands((M, K, N, r), dtypes, device)) for N in Ns]
    members = [LoraOperands(t["W"], t["bias"], t["A"], t["B"], 0.5 + i) for i, t in enumerate(parts)]
    return parts[0]["x"], members, [t["dout"] for t in parts]


def group_run(op: Any, x: Tensor, members: Any, douts: Any, dtype: torch.dtype | None = None) -> Tensor:
    """dx."""
    x, members = x.detach().to(dtype).requires_grad_(), [leaves(member, dtype) for member in members]
    outs = op(x, [LoraOperands(*member) for member in members])
    torch.autograd.backward(outs, [dout.to(out.dtype) for out, dout in zip(outs, douts, strict=True)])
    return x.grad


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 40), (7, 33), (130, 72)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dx_of_a_group_is_as_close_to_fp64_as_torch(path, shape, dtypes, layout, device):
    """Factors that are not dense go by the kernels of one layer."""
    x, members, douts = group_of(*shape, dtypes, device)
    members = [m._replace(lora_A=LAYOUTS[layout](m.lora_A), lora_B=LAYOUTS[layout](m.lora_B)) for m in members]

    def eager_group(x: Tensor, members: Any) -> list[Tensor]:
        return [eager_linear(x, *member[:5]) for member in members]

    with backend(path):
        ours = group_run(lora_group, x, members, douts)
    eager = group_run(eager_group, x, members, douts)
    assert_as_close_as_torch("dx", ours, eager, group_run(eager_group, x, members, douts, torch.float64))


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_a_group_are_those_of_training_all(path, p, device):
    """Nothing but x is trained, nothing but a bias, or one factor of one member."""
    x, members, douts = group_of(70, 40, (torch.float32, torch.float32), device)
    members = [m._replace(dropout_p=p) for m in members]

    def gradients(*trained: tuple[int, str]) -> dict[Any, Tensor | None]:
        fresh = [
            m._replace(**{k: getattr(m, k).detach().requires_grad_((i, k) in trained) for k in ("bias", "lora_A")})
            for i, m in enumerate(members)
        ]
        leaf = x.detach().requires_grad_((0, "x") in trained)
        torch.manual_seed(5)
        with backend(path):
            torch.autograd.backward(lora_group(leaf, fresh), douts)
        return {
            (0, "x"): leaf.grad,
            **{(i, k): getattr(m, k).grad for i, m in enumerate(fresh) for k in ("bias", "lora_A")},
        }

    expected = gradients((0, "x"), *((i, k) for i in range(3) for k in ("bias", "lora_A")))
    for trained in ([(0, "x")], [(1, "bias")], [(0, "x"), (1, "lora_A")], [(2, "lora_A")]):
        ours = gradients(*trained)
        for key, gradient in ours.items():
            if key in trained:
                torch.testing.assert_close(gradient, expected[key])
            else:
                assert gradient is None


M, K, N = 146, 96, 160


def counted(p: float, r: int = 16, product_by: Any = "library") -> Any:
    t = frozen(operands((M, K, N, r), (torch.bfloat16, torch.float32), "cpu"))
    with product(product_by):
        return count_op(lambda: [lora_linear(*(t[k] for k in OPS["linear"][2]), 0.7, p)], [t["dout"]], [t["W"]])


@counts
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("r", [16, 64])
def test_bytes_and_launches(p, r):
    """Backward: dout for dS, and the C operand of dx, written and read. Training all reads x and writes planes, too."""
    _, backward = counted(p, r)
    assert [launch.name for launch in backward.beside_base()] == ["_shrink_kernel", "_expand_kernel"]
    assert by_kind(backward).wide == 2 * M * N + 4 * M * K + (M * K // 8 if p else 0)


@counts
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_and_launches_with_our_own_product(p):
    _, backward = counted(p, product_by="own")
    names = [launch.name for launch in backward.beside_base()]
    assert names == ["_shrink_kernel", "_sum_planes_kernel"]  # N of 160 is split
    assert by_kind(backward).wide == 2 * M * N + (M * K // 8 if p else 0)


@counts
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_and_launches_of_a_group(p):
    """The input pass of all members writes dx and reads their masks, not x. No plane is left to be summed but of dS."""
    Ns = (160, 64, 64)
    x, members, douts = group_of(M, K, (torch.bfloat16, torch.float32), "cpu", Ns, r=16)
    members = [m._replace(dropout_p=p) for m in members]
    _, backward = count_op(lambda: lora_group(x, members), douts, [m.W for m in members])
    names = [launch.name for launch in backward.beside_base()]
    assert names == ["_shrink_kernel"] * 3 + ["_sum_planes_kernel"] + ["_group_input_kernel"]
    assert not backward.arguments()["_group_input_kernel.x_ptr"]
    base_products = 2 * M * K * 3  # each reads what is in dx already, and all but the last write it for the next
    assert by_kind(backward).wide == 2 * M * sum(Ns) + 2 * M * K + base_products + (3 * M * K // 8 if p else 0)


@pytest.mark.parametrize("path", BACKENDS)
def test_compiles_to_one_graph(path, device):
    t = operands((16, 24, 20, 4), (torch.float32, torch.float32), device)

    def block(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        first, second = lora_group(x, [LoraOperands(t["W"], None, A, B, scaling) for scaling in (0.7, 0.2)])
        return lora_add(lora_linear(x, t["W"], None, A, B, 0.7) + first * second, x, A, B, 0.3).square()

    def dx(fn: Callable[..., Tensor]) -> Tensor:
        fresh = frozen(t)
        fn(fresh["x"], fresh["A"], fresh["B"]).sum().backward()
        assert fresh["A"].grad is None
        return fresh["x"].grad

    torch._dynamo.reset()
    with backend(path):
        torch.testing.assert_close(dx(torch.compile(block, fullgraph=True)), dx(block))
