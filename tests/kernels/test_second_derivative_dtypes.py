"""Recorded gradients where dtypes differ: as of the fused backward, in their inputs' dtypes, with gradients again."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lora_operands import DTYPES
from routed_operands import Entries, one_each, routing
from torch import Tensor

import fastpeft_kernels as kernels
from fastpeft_kernels import LoraOperands
from fastpeft_kernels.masks import draw_mask

M, K, N = 9, 40, 24
P = 0.3
SCALES, RANKS = (0.1, 0.2, 0.3), (3, 4, 1)
ENTRIES: dict[str, Entries] = {
    "one-each": one_each([0, 1, -1, 2, 0, 0, 1, -1, 2]),
    "weighted": [[(0, 0.5), (1, 0.25)], [(1, 0.3)], [], [(2, 1.0)], [], [(0, 1.0)], [], [(2, 0.5), (0, 0.5)], []],
}
Op = Callable[..., Any]


def lora_ops(W: Tensor) -> dict[str, tuple[Op, tuple[str, ...]]]:
    """Each op, and which operands it takes."""

    def group(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Sequence[Tensor]:
        members = [(bias, A, B, 0.1, P), (None, A[:2], B[:, :2], 0.2, P)]
        return kernels.lora_group(x, [LoraOperands(W.to(x.dtype), *member) for member in members])

    return {
        "linear": (lambda x, b, A, B: kernels.lora_linear(x, W.to(x.dtype), b, A, B, 0.1, P), ("x", "bias", "A", "B")),
        "add": (lambda out, x, A, B: kernels.lora_add(out, x, A, B, 0.1, P), ("out", "x", "A", "B")),
        "group": (group, ("x", "bias", "A", "B")),
        "dora": (
            lambda x, b, A, B, m: kernels.dora_linear(x, W.to(x.dtype), b, A, B, m, 0.1, P),
            ("x", "bias", "A", "B", "vector_N"),
        ),
        "columns": (kernels.scale_columns, ("x", "vector_K")),
        "scale": (lambda x, s, b: kernels.scale_linear(x, s, W.to(x.dtype), b), ("x", "vector_K", "bias")),
        "dropout": (lambda x: kernels.dropout(x, P), ("x",)),
    }


def routed_ops(entries: Entries) -> dict[str, tuple[Op, tuple[str, ...]]]:
    route = routing(entries, 3, "cpu")
    mask, ids = draw_mask(M, K, P, torch.device("cpu")), torch.randint(K, (M,), dtype=torch.int32)

    def parts(A: Tensor, B: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [A[:r] for r in RANKS], [B[:, :r] for r in RANKS]

    def lora(out: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return kernels.lora_routed(out, x, *parts(A, B), SCALES, *route, mask)

    def shrink_expand(out: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        As, Bs = parts(A, B)
        S = kernels.shrink_routed(x, As, SCALES, *route, mask)
        return kernels.expand_routed(out, S, Bs, route.rows, route.starts)

    def gather(out: Tensor, A: Tensor, B: Tensor) -> Tensor:
        As, Bs = parts(A, B)
        return kernels.expand_routed(out, kernels.gather_routed(ids, As, SCALES, *route), Bs, route.rows, route.starts)

    def scale(x: Tensor, vector: Tensor) -> Tensor:
        return kernels.scale_routed(x, [vector, None, vector.unsqueeze(1)], *route, torch.ones(K, dtype=x.dtype))

    return {
        "lora": (lora, ("out", "x", "A", "B")),
        "shrink, expand": (shrink_expand, ("out", "x", "A", "B")),
        "gather": (gather, ("out", "A", "B")),
        "scale": (scale, ("x", "vector_K")),
    }


def gradients(op: Op, inputs: Sequence[Tensor], create_graph: bool) -> Any:
    torch.manual_seed(5)
    outs = op(*inputs)
    outs = [outs] if isinstance(outs, Tensor) else outs
    return torch.autograd.grad(sum(o.float().square().mean() for o in outs), inputs, create_graph=create_graph)


def check(name: str, op: Op, inputs: Sequence[Tensor]) -> None:
    fused, recorded = (gradients(op, inputs, create_graph) for create_graph in (False, True))
    second = torch.autograd.grad(sum(g.float().square().sum() for g in recorded), inputs)
    for i, t in enumerate(inputs):
        assert fused[i].dtype == recorded[i].dtype == second[i].dtype == t.dtype
        assert second[i].isfinite().all()
        # some roundings of what both are made of; the formula rounds where the fused backward does not
        eps = max(torch.finfo(u.dtype).eps for u in inputs)
        error = (recorded[i].double() - fused[i].double()).norm() / fused[i].double().norm()
        assert error < 4 * eps, f"{name}, input {i}: off by {error:.1e}"


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtypes", [*DTYPES, (torch.float64, torch.float32)], ids=str)
def test_dtypes(dtypes, other):
    """`other`: of what an op adds to, and of vectors."""
    wide, narrow = dtypes
    makes = {
        "x": (wide, (M, K)),
        "bias": (wide, (N,)),
        "A": (narrow, (4, K)),
        "B": (narrow, (N, 4)),
        "out": (other, (M, N)),
        "vector_K": (other, (K,)),
        "vector_N": (narrow, (N,)),
    }
    operands = {name: torch.randn(shape).to(dtype).requires_grad_() for name, (dtype, shape) in makes.items()}
    ops = lora_ops(torch.randn(N, K) * K**-0.5)
    for kind, entries in ENTRIES.items():
        ops |= {f"routed {name}, {kind}": op for name, op in routed_ops(entries).items()}
    for name, (op, takes) in ops.items():
        check(name, op, [operands[key] for key in takes])
