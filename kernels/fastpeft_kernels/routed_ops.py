"""What runs behind the routed ops of LoRA: a custom op for the compiler, an autograd.Function in eager, on one body.

Shapes, checks and what it all means are in routed.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels import formulas_routed
from fastpeft_kernels import reference_routed as reference
from fastpeft_kernels.dispatch import no_autocast, use_triton
from fastpeft_kernels.routed_pairs import pairs_for
from fastpeft_kernels.routes import UNSAFE_TAGS, joined, parted
from fastpeft_kernels.twice import differentiable

# shrink_routed.


def run_shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    with no_autocast(x):
        if use_triton(x, factors[0]):
            from fastpeft_kernels.gpu import routed as gpu  # triton is imported when first needed

            return gpu.shrink(x, factors, scales, rows, starts, weights, mask)
        return reference.shrink(x, factors, scales, rows, starts, weights, mask)


def run_shrink_backward(
    dS: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor]]:
    with no_autocast(x):
        if use_triton(x, factors[0]):
            from fastpeft_kernels.gpu import routed as gpu

            return gpu.shrink_backward(dS, x, factors, scales, rows, starts, weights, mask, need_dx)
        return reference.shrink_backward(dS, x, factors, scales, rows, starts, weights, mask, need_dx)


@torch.library.custom_op("fastpeft::shrink_routed", mutates_args=(), tags=UNSAFE_TAGS)
def _shrink_routed(
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    return run_shrink(x, factors, scales, rows, starts, weights, mask)


@torch.library.custom_op("fastpeft::shrink_routed_backward", mutates_args=(), tags=UNSAFE_TAGS)
def _shrink_routed_backward(
    dS: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    dx, grads = run_shrink_backward(dS, x, factors, scales, rows, starts, weights, mask, need_dx)
    return dx, joined(grads)


@_shrink_routed.register_fake
def _(x: Tensor, factors: Sequence[Tensor], scales: Sequence[float], rows: Tensor, *_: Any) -> Tensor:
    return factors[0].new_empty((*rows.shape, max(factor.shape[0] for factor in factors)))


@_shrink_routed_backward.register_fake
def _(dS: Tensor, x: Tensor, factors: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    need_dx = rest[-1]
    return x.new_empty(x.shape if need_dx else 0), factors[0].new_empty(sum(factor.numel() for factor in factors))


def _setup_traced_shrink(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, factors, scales, rows, starts, weights, mask = inputs
    ctx.save_for_backward(x, rows, starts, weights, mask, *factors)
    ctx.scales = scales


def _traced_shrink_backward(ctx: Any, dS: Tensor) -> tuple[Any, ...]:
    x, rows, starts, weights, mask, *factors = ctx.saved_tensors
    need_dx = ctx.needs_input_grad[0]
    dx, flat = _shrink_routed_backward(dS, x, factors, ctx.scales, rows, starts, weights, mask, need_dx)
    return dx if need_dx else None, parted(flat, factors), None, None, None, None, None


_shrink_routed.register_autograd(_traced_shrink_backward, setup_context=_setup_traced_shrink)


class ShrinkRouted(torch.autograd.Function):
    """The same op where nothing is compiled: an autograd.Function costs the host a fraction of a custom op."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Sequence[float],
        rows: Tensor,
        starts: Tensor,
        weights: Tensor | None,
        mask: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, rows, starts, weights, mask, *factors)
        ctx.scales = scales
        return run_shrink(x, factors, scales, rows, starts, weights, mask)

    @staticmethod
    @differentiable(formulas_routed.shrink_gradients)
    def backward(ctx: Any, dS: Tensor) -> tuple[Any, ...]:
        x, rows, starts, weights, mask, *factors = ctx.saved_tensors
        need_dx = ctx.needs_input_grad[0]
        dx, grads = run_shrink_backward(dS, x, factors, ctx.scales, rows, starts, weights, mask, need_dx)
        return dx if need_dx else None, None, None, None, None, None, *grads


# expand_routed.


def run_expand(base: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor) -> Tensor:
    with no_autocast(base):
        if use_triton(base, S):
            from fastpeft_kernels.gpu import routed as gpu

            return gpu.expand(base, S, factors, rows, starts)
        return reference.expand(base, S, factors, rows, starts)


def run_expand_backward(
    dout: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor
) -> tuple[Tensor, list[Tensor]]:
    with no_autocast(dout):
        if use_triton(dout, S):
            from fastpeft_kernels.gpu import routed as gpu

            return gpu.expand_backward(dout, S, factors, rows, starts)
        return reference.expand_backward(dout, S, factors, rows, starts)


@torch.library.custom_op("fastpeft::expand_routed", mutates_args=(), tags=UNSAFE_TAGS)
def _expand_routed(base: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor) -> Tensor:
    return run_expand(base, S, factors, rows, starts)


@torch.library.custom_op("fastpeft::expand_routed_backward", mutates_args=(), tags=UNSAFE_TAGS)
def _expand_routed_backward(
    dout: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    dS, grads = run_expand_backward(dout, S, factors, rows, starts)
    return dS, joined(grads)


@_expand_routed.register_fake
def _(base: Tensor, *_: Any) -> Tensor:
    return base.new_empty(base.shape)


@_expand_routed_backward.register_fake
def _(dout: Tensor, S: Tensor, factors: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return S.new_empty(S.shape), S.new_empty(sum(factor.numel() for factor in factors))


def _setup_traced_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, S, factors, rows, starts = inputs
    ctx.save_for_backward(S, rows, starts, *factors)


def _traced_expand_backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    S, rows, starts, *factors = ctx.saved_tensors
    dS, flat = _expand_routed_backward(dout, S, factors, rows, starts)
    return dout, dS, parted(flat, factors), None, None


_expand_routed.register_autograd(_traced_expand_backward, setup_context=_setup_traced_expand)


class ExpandRouted(torch.autograd.Function):
    """`expand_routed` where nothing is compiled."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, S: Tensor, rows: Tensor, starts: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(S, rows, starts, *factors)
        return run_expand(base, S, factors, rows, starts)

    @staticmethod
    @differentiable(formulas_routed.expand_gradients)
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        S, rows, starts, *factors = ctx.saved_tensors
        dS, grads = run_expand_backward(dout, S, factors, rows, starts)
        return dout, dS, None, None, *grads


# lora_routed: for a compiler it is the two above.


class LoraRouted(torch.autograd.Function):
    """Both in one, on the inputs of the first and the base: (M, N)."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        scales: Sequence[float],
        rows: Tensor,
        starts: Tensor,
        weights: Tensor | None,
        mask: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        As, Bs = factors[: len(scales)], factors[len(scales) :]
        pairs = None
        if weights is None and not (use_triton(base, As[0]) or use_triton(x)):
            pairs = pairs_for(base, x, As, Bs, scales, rows, starts)
        if pairs is not None:
            with no_autocast(base):
                out, Ss = pairs.forward(base, x, As, Bs, mask)
        else:
            Ss = [run_shrink(x, As, scales, rows, starts, weights, mask)]
            out = run_expand(base, Ss[0], Bs, rows, starts)
        ctx.save_for_backward(x, rows, starts, weights, mask, *factors, *Ss)
        ctx.scales, ctx.pairs = scales, pairs
        return out

    @staticmethod
    @differentiable(formulas_routed.lora_gradients)
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, rows, starts, weights, mask, *rest = ctx.saved_tensors
        scales, need_dx = ctx.scales, ctx.needs_input_grad[1]
        slots = len(scales)
        As, Bs, Ss = rest[:slots], rest[slots : 2 * slots], rest[2 * slots :]
        if ctx.pairs is not None:
            with no_autocast(dout):
                dx, dAs, dBs = ctx.pairs.backward(dout, x, Ss, As, Bs, mask, need_dx)
        else:
            dS, dBs = run_expand_backward(dout, Ss[0], Bs, rows, starts)
            dx, dAs = run_shrink_backward(dS, x, As, scales, rows, starts, weights, mask, need_dx)
        return dout, dx if need_dx else None, None, None, None, None, None, *dAs, *dBs


def run_lora(
    base: Tensor,
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    overwrite: bool = False,
) -> Tensor:
    with no_autocast(base):
        if use_triton(base, As[0]):
            from fastpeft_kernels.gpu import routed as gpu

            return gpu.lora(base, x, As, Bs, scales, rows, starts, weights, mask)
        out = base if overwrite else base.clone(memory_format=torch.contiguous_format)
        return reference.lora_(out, x, As, Bs, scales, rows, starts, weights, mask)


@torch.library.custom_op("fastpeft::lora_routed", mutates_args=(), tags=UNSAFE_TAGS)
def _lora_routed(
    base: Tensor,
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    return run_lora(base, x, As, Bs, scales, rows, starts, weights, mask)


@_lora_routed.register_fake
def _(base: Tensor, *_: Any) -> Tensor:
    return base.new_empty(base.shape)
