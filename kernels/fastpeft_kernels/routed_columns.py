"""Ops that pick or scale columns in batches whose rows take different adapters; the routing is that of routed.py.

    gather_routed   S = weight · scale · A_j[:, id]ᵀ: LoRA on embeddings, before `expand_routed`
    scale_routed    out = (y - bias) · f + bias, f = 1 - Σ w + Σ w · l_j over a row's entries: IA³ (arXiv:2205.05638
                    section 3.3), and DoRA's magnitude / norm (arXiv:2402.09353 section 4.1)

Traffic in 16 bits: `scale_routed` reads and writes y once (4MC bytes); backward reads dout and y, writes dy (6MC).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels import formulas_routed
from fastpeft_kernels import reference_routed as reference
from fastpeft_kernels.dispatch import no_autocast, use_triton
from fastpeft_kernels.routes import UNSAFE_TAGS, check_factors, check_routing, check_scales, joined, parted
from fastpeft_kernels.twice import differentiable


def gather_routed(
    ids: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """S = weight · scale · A_j[:, id] for every entry.

    Args:
        ids: (M,) int64 or int32, columns of the factors.
        factors: one (r_j, V) a slot, of one float dtype, any strides; a slot without an adapter has r_j = 0.
        scales: one factor a slot.
        rows, starts, weights: the routing.

    Returns:
        (P, M, R) in the factors' dtype, R the largest r_j. Columns past a slot's rank and lines without an entry are
        zeros. Differentiable in every factor.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"ids must be (M,) of int64 or int32: flatten the batch; got {tuple(ids.shape)} of {ids.dtype}"
        )
    check_factors(factors, "factors", 1, factors[0].shape[-1] if factors else 0)
    check_routing(ids, len(factors), rows, starts, weights)
    check_scales(scales, factors)
    S: Tensor
    if torch.compiler.is_compiling():
        S = _gather_routed(ids, factors, scales, rows, starts, weights)
    elif torch.is_grad_enabled():
        S = _GatherRouted.apply(ids, scales, rows, starts, weights, *factors)  # type: ignore[no-untyped-call]
    else:
        S = _run_gather(ids, factors, scales, rows, starts, weights)
    return S


def scale_routed(
    y: Tensor,
    vectors: Sequence[Tensor | None],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """(y - bias) · f + bias with a column factor of each row's own: f = 1 - Σ w + Σ w · l_j over its entries.

    Args:
        y: (M, C), any strides; any float dtype of 16, 32 or 64 bits.
        vectors: for each slot (C,), (1, C) or (C, 1), of one float dtype, not necessarily y's; or None: its entries
            change nothing.
        rows, starts, weights: the routing.
        bias: (C,), what is not scaled; without a gradient.

    Returns:
        (M, C) in y's dtype, contiguous, computed in fp32 or wider and rounded once; rows without an entry whose slot
        has a vector have the very bits of y. Differentiable in y and every vector.

    Raises:
        ValueError: shapes or dtypes do not fit, or bias wants a gradient.
    """
    _check_vectors(y, vectors, bias)
    check_routing(y, len(vectors), rows, starts, weights)
    given = [vector for vector in vectors if vector is not None]
    if not given:
        return y.clone(memory_format=torch.contiguous_format)
    out: Tensor
    if torch.compiler.is_compiling():
        stand_ins = [y.new_empty(0) if vector is None else vector for vector in vectors]
        out = _scale_routed(y, stand_ins, rows, starts, weights, bias)
    elif torch.is_grad_enabled():
        out = _ScaleRouted.apply(y, rows, starts, weights, bias, *vectors)  # type: ignore[no-untyped-call]
    else:
        out = _run_scale(y, vectors, rows, starts, weights, bias)
    return out


def _check_vectors(y: Tensor, vectors: Sequence[Tensor | None], bias: Tensor | None) -> None:
    if y.ndim != 2:
        raise ValueError(f"y must be (M, C): flatten the batch first; got {tuple(y.shape)}")
    C = y.shape[1]
    dtype = next((vector.dtype for vector in vectors if vector is not None), None)
    for slot, vector in enumerate(vectors):
        if vector is None:
            continue
        if vector.shape not in ((C,), (1, C), (C, 1)) or vector.dtype != dtype:
            raise ValueError(
                f"vectors[{slot}] must be ({C},), (1, {C}) or ({C}, 1), and all of one dtype, {dtype}; got "
                f"{tuple(vector.shape)} of {vector.dtype}"
            )
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias must be ({C},); got {tuple(bias.shape)}")
    if bias is not None and bias.requires_grad:
        raise ValueError("scale_routed has no gradient for bias: detach it")


# gather_routed: what runs, the op for the compiler, the function for eager.


def _run_gather(
    ids: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
) -> Tensor:
    with no_autocast(factors[0]):
        if use_triton(ids, factors[0]):
            from fastpeft_kernels.gpu import routed_columns as gpu  # triton is imported when first needed

            return gpu.gather(ids, factors, scales, rows, starts, weights)
        return reference.gather(ids, factors, scales, rows, starts, weights)


def _run_gather_backward(
    dS: Tensor,
    ids: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
) -> list[Tensor]:
    with no_autocast(dS):
        if use_triton(ids, factors[0]):
            from fastpeft_kernels.gpu import routed_columns as gpu

            return gpu.gather_backward(dS, ids, factors, scales, rows, starts, weights)
        return reference.gather_backward(dS, ids, factors, scales, rows, starts, weights)


@torch.library.custom_op("fastpeft::gather_routed", mutates_args=(), tags=UNSAFE_TAGS)
def _gather_routed(
    ids: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
) -> Tensor:
    return _run_gather(ids, factors, scales, rows, starts, weights)


@torch.library.custom_op("fastpeft::gather_routed_backward", mutates_args=(), tags=UNSAFE_TAGS)
def _gather_routed_backward(
    dS: Tensor,
    ids: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
) -> Tensor:
    return joined(_run_gather_backward(dS, ids, factors, scales, rows, starts, weights))


@_gather_routed.register_fake
def _(ids: Tensor, factors: Sequence[Tensor], scales: Sequence[float], rows: Tensor, *_: Any) -> Tensor:
    return factors[0].new_empty((*rows.shape, max(factor.shape[0] for factor in factors)))


@_gather_routed_backward.register_fake
def _(dS: Tensor, ids: Tensor, factors: Sequence[Tensor], *_: Any) -> Tensor:
    return factors[0].new_empty(sum(factor.numel() for factor in factors))


def _setup_traced_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, factors, scales, rows, starts, weights = inputs
    ctx.save_for_backward(ids, rows, starts, weights, *factors)
    ctx.scales = scales


def _traced_gather_backward(ctx: Any, dS: Tensor) -> tuple[Any, ...]:
    ids, rows, starts, weights, *factors = ctx.saved_tensors
    flat = _gather_routed_backward(dS, ids, factors, ctx.scales, rows, starts, weights)
    return None, parted(flat, factors), None, None, None, None


_gather_routed.register_autograd(_traced_gather_backward, setup_context=_setup_traced_gather)


class _GatherRouted(torch.autograd.Function):
    """The same op where nothing is compiled: an autograd.Function costs the host a fraction of a custom op."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        scales: Sequence[float],
        rows: Tensor,
        starts: Tensor,
        weights: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(ids, rows, starts, weights, *factors)
        ctx.scales = scales
        return _run_gather(ids, factors, scales, rows, starts, weights)

    @staticmethod
    @differentiable(formulas_routed.gather_gradients)
    def backward(ctx: Any, dS: Tensor) -> tuple[Any, ...]:
        ids, rows, starts, weights, *factors = ctx.saved_tensors
        grads = _run_gather_backward(dS, ids, factors, ctx.scales, rows, starts, weights)
        return None, None, None, None, None, *grads


# scale_routed: the same three. Autograd takes no lists with None in them: an empty tensor stands for a missing vector.


def _run_scale(
    y: Tensor,
    vectors: Sequence[Tensor | None],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    with no_autocast(y):
        if use_triton(y, _first(vectors)):
            from fastpeft_kernels.gpu import routed_columns as gpu

            return gpu.scale(y, vectors, rows, starts, weights, bias)
        return reference.scale(y, _flat(vectors), rows, starts, weights, bias)


def _run_scale_backward(
    dout: Tensor,
    y: Tensor,
    vectors: Sequence[Tensor | None],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """(dy, [dl_j]) in the vectors' shapes; of a slot without one an empty tensor."""
    with no_autocast(y):
        if use_triton(y, _first(vectors)):
            from fastpeft_kernels.gpu import routed_columns as gpu

            return gpu.scale_backward(dout, y, vectors, rows, starts, weights, bias)
        dy, grads = reference.scale_backward(dout, y, _flat(vectors), rows, starts, weights, bias)
        return dy, [g if v is None else g.view(v.shape) for g, v in zip(grads, vectors, strict=True)]


def _first(vectors: Sequence[Tensor | None]) -> Tensor | None:
    return next((vector for vector in vectors if vector is not None), None)


def _flat(vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if vector is None else vector.reshape(-1) for vector in vectors]


def _given(vectors: Sequence[Tensor]) -> list[Tensor | None]:
    return [vector if vector.numel() else None for vector in vectors]


@torch.library.custom_op("fastpeft::scale_routed", mutates_args=(), tags=UNSAFE_TAGS)
def _scale_routed(
    y: Tensor, vectors: Sequence[Tensor], rows: Tensor, starts: Tensor, weights: Tensor | None, bias: Tensor | None
) -> Tensor:
    return _run_scale(y, _given(vectors), rows, starts, weights, bias)


@torch.library.custom_op("fastpeft::scale_routed_backward", mutates_args=(), tags=UNSAFE_TAGS)
def _scale_routed_backward(
    dout: Tensor,
    y: Tensor,
    vectors: Sequence[Tensor],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The second result is empty where no slot has a vector."""
    dy, grads = _run_scale_backward(dout, y, _given(vectors), rows, starts, weights, bias)
    return dy, joined([grad for grad, vector in zip(grads, vectors, strict=True) if vector.numel()])


@_scale_routed.register_fake
def _(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


@_scale_routed_backward.register_fake
def _(dout: Tensor, y: Tensor, vectors: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    given = [vector for vector in vectors if vector.numel()]
    return y.new_empty(y.shape), given[0].new_empty(sum(vector.numel() for vector in given))


def _setup_traced_scale(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, vectors, rows, starts, weights, bias = inputs
    ctx.save_for_backward(y, rows, starts, weights, bias, *vectors)


def _traced_scale_backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    y, rows, starts, weights, bias, *vectors = ctx.saved_tensors
    dy, flat = _scale_routed_backward(dout, y, vectors, rows, starts, weights, bias)
    grads = parted(flat, [vector for vector in vectors if vector.numel()])
    by_slot = [grads.pop(0) if vector.numel() else None for vector in vectors]
    return dy, by_slot, None, None, None, None


_scale_routed.register_autograd(_traced_scale_backward, setup_context=_setup_traced_scale)


class _ScaleRouted(torch.autograd.Function):
    """`scale_routed` where nothing is compiled."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        rows: Tensor,
        starts: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        *vectors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(y, rows, starts, weights, bias, *vectors)
        return _run_scale(y, vectors, rows, starts, weights, bias)

    @staticmethod
    @differentiable(formulas_routed.scale_gradients)
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        y, rows, starts, weights, bias, *vectors = ctx.saved_tensors
        dy, grads = _run_scale_backward(dout, y, vectors, rows, starts, weights, bias)
        by_slot = [None if vector is None else grad for grad, vector in zip(grads, vectors, strict=True)]
        return dy, None, None, None, None, *by_slot
