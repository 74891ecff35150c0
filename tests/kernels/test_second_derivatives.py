"""Gradients of gradients: those of the plain formula, of every op in all its forms."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from lora_operands import BACKENDS, eager_add, eager_linear, known_mask, operands
from numerics import assert_as_close_as_torch
from routed_operands import Entries, by_row_add, factors, one_each, routing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpeft_kernels as kernels
from fastpeft_kernels import LoraOperands, backend
from fastpeft_kernels.dropout import dropout_scale
from fastpeft_kernels.masks import apply_mask, draw_mask

SHAPE = (7, 33, 18, 3)  # M, K, N, r
P = 0.3
Op = Callable[..., Any]


class Case(NamedTuple):
    """An op of ours, the same by plain operators, and inputs that all want gradients."""

    ours: Op
    plain: Op
    inputs: tuple[Tensor, ...]


def derivatives(op: Op, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of a scalar that bends: once, once recorded, twice and three times, 0 for what nothing depends on."""
    generator = torch.Generator(inputs[0].device).manual_seed(11)

    def bent(tensors: Any) -> Tensor:
        """Every entry with a weight of its own, which finds what a sum would hide; the inputs have another way to it,
        without which autograd may notice by itself that there is none through the op."""
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        terms = [torch.sin(t).sum() for t in inputs]
        for t in tensors:
            weights = torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float64).to(t.dtype)
            terms.append((weights * torch.tanh(t)).sum() + t.square().mean() if t.numel() else t.sum())
        return torch.stack(terms).sum()

    state = generator.get_state()
    torch.manual_seed(5)
    once = torch.autograd.grad(bent(op(*inputs)), inputs, allow_unused=True, materialize_grads=True)
    generator.set_state(state)
    found = {"once": once}
    torch.manual_seed(5)
    values = op(*inputs)
    for order in ("recorded", "twice", "three times"):
        values = torch.autograd.grad(bent(values), inputs, create_graph=True, allow_unused=True, materialize_grads=True)
        found[order] = values
    return {f"{order}, input {i}": t.detach() for order, grads in found.items() for i, t in enumerate(grads)}


def check(case: Case) -> None:
    ours, plain = (derivatives(op, case.inputs) for op in (case.ours, case.plain))
    for key, wanted in plain.items():
        assert ours[key].dtype == wanted.dtype
        error = (ours[key] - wanted).abs().sum() / wanted.abs().sum().clamp_min(1e-30)
        assert error < 1e-12, f"{key}: off by {error:.1e}"


# The cases. Dropout's mask comes from the generator, which `derivatives` sets before each call.


def lora_case(device: str, p: float = 0.0, with_bias: bool = True, add: bool = False, shape: Any = SHAPE) -> Case:
    t = operands(shape, (torch.float64, torch.float64), device)
    x, W, bias, A, B, out = (t[name] for name in ("x", "W", "bias", "A", "B", "out"))
    kept = known_mask(x, p, "torch").double() * dropout_scale(p) if p else torch.ones((), device=device)
    if add:
        ours = lambda out, x, A, B: kernels.lora_add(out, x, A, B, 0.7, p)  # noqa: E731
        plain = lambda out, x, A, B: eager_add(out, x * kept, A, B, 0.7)  # noqa: E731
        return Case(ours, plain, (out, x, A, B))
    if with_bias:
        ours = lambda x, bias, A, B: kernels.lora_linear(x, W, bias, A, B, 0.7, p)  # noqa: E731
        plain = lambda x, bias, A, B: eager_add(F.linear(x, W, bias), x * kept, A, B, 0.7)  # noqa: E731
        return Case(ours, plain, (x, bias, A, B))
    ours = lambda x, A, B: kernels.lora_linear(x, W, None, A, B, 0.7, p)  # noqa: E731
    return Case(ours, lambda x, A, B: eager_add(F.linear(x, W), x * kept, A, B, 0.7), (x, A, B))


def group_case(device: str, ps: Sequence[float], unused: int | None = None) -> Case:
    """Three members of different widths and ranks, the second one without a bias."""
    M, K, _, _ = SHAPE
    made = [operands((M, K, N, r), (torch.float64, torch.float64), device) for N, r in ((18, 3), (9, 1), (40, 5))]
    x, scalings = made[0]["x"], (0.7, 1.3, 0.4)
    biases = [made[0]["bias"], None, made[2]["bias"]]
    inputs = (x, biases[0], biases[2], *(t["A"] for t in made), *(t["B"] for t in made))

    def parts(given: tuple[Tensor, ...]) -> Any:
        return zip((t["W"] for t in made), (given[1], None, given[2]), given[3:6], given[6:], scalings, ps, strict=True)

    def ours(*given: Tensor) -> list[Tensor]:
        outs = kernels.lora_group(given[0], [LoraOperands(*part) for part in parts(given)])
        return [out for i, out in enumerate(outs) if i != unused]

    torch.manual_seed(5)
    masks: dict[int, Tensor] = {}
    for p in dict.fromkeys(ps):
        takers = [i for i, other in enumerate(ps) if other == p]
        drawn = draw_mask(len(takers) * M, K, p, x.device).view(len(takers), M, -1) if p else [None] * len(takers)
        for i, mask in zip(takers, drawn, strict=True):
            ones = torch.ones_like(x, requires_grad=False)
            masks[i] = ones if mask is None else apply_mask(ones, mask) * dropout_scale(p)

    def plain(*given: Tensor) -> list[Tensor]:
        return [
            eager_add(F.linear(given[0], W, bias), given[0] * masks[i], A, B, scaling)
            for i, (W, bias, A, B, scaling, _) in enumerate(parts(given))
            if i != unused
        ]

    return Case(ours, plain, inputs)


def dora_case(device: str, p: float = 0.0) -> Case:
    t = operands(SHAPE, (torch.float64, torch.float64), device)
    x, W, bias, A, B = (t[name] for name in ("x", "W", "bias", "A", "B"))
    magnitude = (torch.rand(len(W), device=device, dtype=torch.float64) + 0.5).requires_grad_()
    kept = known_mask(x, p, "torch").double() * dropout_scale(p) if p else torch.ones((), device=device)

    def plain(x: Tensor, bias: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
        """PEFT's: the norm is detached."""
        g = magnitude / torch.linalg.vector_norm(W + 0.7 * B @ A, dim=1).detach()
        dropped = x * kept
        return F.linear(x, W, bias) + (g - 1) * F.linear(dropped, W) + 0.7 * g * F.linear(F.linear(dropped, A), B)

    def ours(x: Tensor, bias: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
        return kernels.dora_linear(x, W, bias, A, B, magnitude, 0.7, p)

    return Case(ours, plain, (x, bias, A, B, magnitude))


def scale_case(device: str, linear: bool, with_bias: bool = True, column: bool = False) -> Case:
    t = operands(SHAPE, (torch.float64, torch.float64), device)
    K = SHAPE[1]
    vector = torch.randn((K, 1) if column else K, device=device, dtype=torch.float64).requires_grad_()
    if not linear:
        return Case(kernels.scale_columns, lambda x, scale: x * scale.reshape(-1), (t["x"], vector))
    ours = lambda x, scale, *bias: kernels.scale_linear(x, scale, t["W"], *bias)  # noqa: E731
    plain = lambda x, scale, *bias: F.linear(x * scale.reshape(-1), t["W"], *bias)  # noqa: E731
    return Case(ours, plain, (t["x"], vector, *[t["bias"]][:with_bias]))


def dropout_case(device: str) -> Case:
    x = torch.randn(7, 70, device=device, dtype=torch.float64).requires_grad_()
    kept = known_mask(x, P, "torch").double() * dropout_scale(P)
    return Case(lambda x: kernels.dropout(x, P).square(), lambda x: (x * kept).square(), (x,))


MIXED = one_each([0, 2, -1, 1, 0, -1, 2])
ALIKE = one_each([0, 0, 0, 1, 1, 1])  # what goes through batched products
WEIGHTED: Entries = [[(0, 0.5), (2, 2.0)], [], [(1, 1.0)], [(2, -0.25)], [(0, 1.5), (1, 0.5)], [(3, 1.0)], []]
RANKS, SCALES = (3, 5, 1, 4), (0.7, 1.3, 0.4, 2.0)


def routed_case(device: str, entries: Entries, masked: bool = False) -> Case:
    """`lora_routed`, and that of shrink and expand by themselves. Slot 3 may be empty."""
    (_, K, N, _), M, slots = SHAPE, len(entries), len(RANKS)
    base, x = (torch.randn(M, n, device=device, dtype=torch.float64).requires_grad_() for n in (N, K))
    As = factors(RANKS, K, torch.float64, device)
    Bs = factors(RANKS, N, torch.float64, device, transposed=True)
    route = routing(entries, slots, device)
    mask = draw_mask(M, K, P, x.device) if masked else None
    kept = apply_mask(torch.ones_like(x, requires_grad=False), mask) if masked else torch.ones((), device=device)

    def ours(base: Tensor, x: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        As, Bs = factors[:slots], factors[slots:]
        S = kernels.shrink_routed(x, As, SCALES, *route, mask)
        parted = kernels.expand_routed(base, S, Bs, route.rows, route.starts)
        return kernels.lora_routed(base, x, As, Bs, SCALES, *route, mask), parted

    def plain(base: Tensor, x: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        out = by_row_add(base, x * kept, factors[:slots], factors[slots:], SCALES, entries)
        return out, out

    return Case(ours, plain, (base, x, *As, *Bs))


def gather_case(device: str, entries: Entries) -> Case:
    """Behind it a product of factors: a gather alone has no second derivative."""
    M, N, V, slots = len(entries), SHAPE[2], 11, len(RANKS)
    base = torch.randn(M, N, device=device, dtype=torch.float64).requires_grad_()
    ids = torch.randint(V, (M,), device=device)
    As = factors(RANKS, V, torch.float64, device)
    Bs = factors(RANKS, N, torch.float64, device, transposed=True)
    route = routing(entries, slots, device)

    def ours(base: Tensor, *factors: Tensor) -> Tensor:
        S = kernels.gather_routed(ids, factors[:slots], SCALES, *route)
        return kernels.expand_routed(base, S, factors[slots:], route.rows, route.starts)

    def plain(base: Tensor, *factors: Tensor) -> Tensor:
        chosen = F.one_hot(ids, V).to(base.dtype)
        return by_row_add(base, chosen, factors[:slots], factors[slots:], SCALES, entries)

    return Case(ours, plain, (base, *As, *Bs))


def scale_routed_case(device: str, entries: Entries, with_bias: bool = False) -> Case:
    """Slot 1 has no vector."""
    M, C = len(entries), SHAPE[2]
    y, *vectors = (torch.randn(n, C, device=device, dtype=torch.float64).requires_grad_() for n in (M, 1, 1, 1))
    bias = torch.randn(C, device=device, dtype=torch.float64) if with_bias else None
    route = routing(entries, 4, device)

    def slots(vectors: Sequence[Tensor]) -> list[Tensor | None]:
        return [vectors[0], None, *vectors[1:]]

    def plain(y: Tensor, *vectors: Tensor) -> Tensor:
        shift = 0.0 if bias is None else bias
        outs = []
        for line, taken in zip(y, entries, strict=True):
            given = [(slots(vectors)[slot], weight) for slot, weight in taken]
            factor = 1 + sum(weight * (vector[0] - 1) for vector, weight in given if vector is not None)
            outs.append((line - shift) * factor + shift)
        return torch.stack(outs)

    return Case(lambda y, *vectors: kernels.scale_routed(y, slots(vectors), *route, bias), plain, (y, *vectors))


CASES: dict[str, Callable[[str], Case]] = {
    "lora_linear": lora_case,
    "lora_linear, dropout": lambda device: lora_case(device, P),
    "lora_linear, no bias": lambda device: lora_case(device, with_bias=False),
    "lora_linear, many rows": lambda device: lora_case(device, P, shape=(130, 200, 96, 16)),
    "lora_linear, no rows": lambda device: lora_case(device, P, shape=(0, 33, 18, 3)),
    "lora_add": lambda device: lora_case(device, add=True),
    "lora_add, dropout": lambda device: lora_case(device, P, add=True),
    "lora_group": lambda device: group_case(device, (0.0, 0.0, 0.0)),
    "lora_group, dropout": lambda device: group_case(device, (P, 0.0, P)),
    "lora_group, an output unused": lambda device: group_case(device, (0.1, P, 0.0), unused=1),
    "dora_linear": dora_case,
    "dora_linear, dropout": lambda device: dora_case(device, P),
    "scale_columns": lambda device: scale_case(device, linear=False, column=True),
    "scale_linear": lambda device: scale_case(device, linear=True),
    "scale_linear, no bias": lambda device: scale_case(device, linear=True, with_bias=False, column=True),
    "dropout": dropout_case,
    "routed": lambda device: routed_case(device, MIXED),
    "routed, dropout": lambda device: routed_case(device, MIXED, masked=True),
    "routed, alike": lambda device: routed_case(device, ALIKE, masked=True),
    "routed, weighted": lambda device: routed_case(device, WEIGHTED, masked=True),
    "routed, base alone": lambda device: routed_case(device, one_each([-1, -1])),
    "gather_routed": lambda device: gather_case(device, MIXED),
    "gather_routed, weighted": lambda device: gather_case(device, WEIGHTED),
    "scale_routed": lambda device: scale_routed_case(device, MIXED),
    "scale_routed, weighted, bias": lambda device: scale_routed_case(device, WEIGHTED, with_bias=True),
    "scale_routed, base alone": lambda device: scale_routed_case(device, one_each([-1, 1])),
}


@pytest.mark.parametrize("name", CASES)
def test_all_inputs(name, device):
    check(CASES[name](device))


@pytest.mark.parametrize("name", CASES)
def test_one_input(name, device):
    """The others want no gradient, which leaves out what is kept and computed for theirs."""
    case = CASES[name](device)
    constants = [t.detach() for t in case.inputs]
    for wanted in range(min(len(case.inputs), 5)):

        def alone(op: Op, wanted: int = wanted) -> Op:
            return lambda given: op(*constants[:wanted], given, *constants[wanted + 1 :])

        check(Case(alone(case.ours), alone(case.plain), (case.inputs[wanted],)))


def test_inputs_that_depend_on_one_another(device):
    """Each gradient is that of its own input, whatever the input was made of."""
    _, _, (_, x, A, B) = lora_case(device, add=True)
    square = torch.randn(x.shape[1], B.shape[1], device=device, dtype=torch.float64).requires_grad_()

    def wired(op: Op) -> Op:
        def out(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            inner = torch.tanh(x + A.sum(0))
            return op(inner, inner, A * inner.mean(), B, 0.7)

        return out

    check(Case(wired(kernels.lora_add), wired(eager_add), (x, A, square)))


def test_under_a_checkpoint(device):
    """It makes what was saved again, dropout included, and hands it out once."""
    for name in ("lora_linear, dropout", "lora_group, dropout", "dora_linear, dropout", "scale_linear", "routed"):
        case = CASES[name](device)
        check(Case(lambda *t, op=case.ours: checkpoint(op, *t, use_reentrant=False), case.plain, case.inputs))


@pytest.mark.parametrize("path", BACKENDS)
def test_behind_the_kernels(path, device):
    """What a kernel's forward kept, and the mask that it drew. As close to fp64 as eager torch is."""
    t = operands(SHAPE, (torch.float32, torch.float32), device)
    x, W, bias, A, B = (t[name] for name in ("x", "W", "bias", "A", "B"))
    kept = known_mask(x, P, path) * dropout_scale(P)
    inputs = (x, bias, A, B)

    def plain(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return eager_add(F.linear(x, W.to(x.dtype), bias), x * kept.to(x.dtype), A, B, 0.7)

    with backend(path):
        ours = derivatives(lambda x, bias, A, B: kernels.lora_linear(x, W, bias, A, B, 0.7, P), inputs)
    eager = derivatives(plain, inputs)
    exact = derivatives(plain, [t.detach().double().requires_grad_() for t in inputs])
    for key in eager:
        if not key.startswith("three times"):  # of which fp32 leaves too little to compare
            assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision(factor_dtype, device):
    """bf16 x: gradients of gradients in their inputs' dtypes, and as close as eager torch's."""
    t = operands((64, 48, 40, 4), (torch.bfloat16, factor_dtype), device)
    W, inputs = t["W"], tuple(t[name] for name in ("x", "bias", "A", "B"))

    def penalty(op: Op, x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        inputs = (x, bias, A, B)
        first = torch.autograd.grad(op(x, W.to(x.dtype), bias, A, B, 0.7).square().mean(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return {str(i): g.detach() for i, g in enumerate((*first, *second))}

    ours, eager = penalty(kernels.lora_linear, *inputs), penalty(eager_linear, *inputs)
    exact = penalty(eager_linear, *(t.detach().double().requires_grad_() for t in inputs))
    for key in eager:
        assert ours[key].dtype == eager[key].dtype
        assert_as_close_as_torch(key, ours[key], eager[key], exact[key])


def test_a_backward_within_autocast(device):
    """It changes nothing: what is recorded there was cast before."""
    case = lora_case(device, P)
    inputs = [t.detach().float().requires_grad_() for t in case.inputs]
    W = torch.randn(SHAPE[2], SHAPE[1], device=device)

    def first(within: bool) -> Any:
        torch.manual_seed(5)
        out = kernels.lora_linear(inputs[0], W, *inputs[1:], 0.7, P)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=within):
            return torch.autograd.grad(out.square().sum(), inputs, create_graph=True)

    assert all(torch.equal(a, b) for a, b in zip(first(True), first(False), strict=True))


def test_hessian(device):
    case = routed_case(device, WEIGHTED, masked=True)
    base, x, *rest = (t.detach() for t in case.inputs)

    def hessian(op: Op) -> Tensor:
        bent = lambda x: torch.tanh(op(base, x, *rest)[0]).sum() + x.square().sum()  # noqa: E731
        return torch.autograd.functional.hessian(bent, x)

    torch.testing.assert_close(hessian(case.ours), hessian(case.plain))


def test_no_function_is_left_out():
    """`once_differentiable` would leave out an op's part of a second derivative, in silence."""
    paths = [path for path in Path(kernels.__file__).parent.glob("*.py") if path.name != "twice.py"]
    text = "\n".join(path.read_text() for path in paths)
    assert "once_differentiable" not in text
    assert text.count("(torch.autograd.Function):") == text.count("    @differentiable(") == 12


def test_a_penalty_trains_the_factors(device):
    """On the gradient's norm: one backward fills every .grad, as with the plain formula."""
    t = operands((40, 33, 18, 3), (torch.float64, torch.float64), device)
    found = []
    for op in (kernels.lora_linear, eager_linear):
        for name in ("x", "A", "B"):
            t[name].grad = None
        loss = op(t["x"], t["W"], None, t["A"], t["B"], 0.7).square().mean()
        grads = torch.autograd.grad(loss, (t["A"], t["B"]), create_graph=True)
        (loss + sum(g.square().sum() for g in grads)).backward()
        found.append([t[name].grad.clone() for name in ("x", "A", "B")])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
