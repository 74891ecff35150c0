"""As formulas.py, of the routed ops: each function is the backward of its autograd.Function, context and all."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.formulas import drop, widest
from fastpeft_kernels.routed_passes import Pass, passes_of


def shrink_gradients(ctx: Any, dS: Tensor) -> tuple[Any, ...]:
    x, rows, starts, weights, mask, *factors = ctx.saved_tensors
    need_dx = ctx.needs_input_grad[0]
    dx, grads = _shrink_backward(dS, x, factors, ctx.scales, passes_of(rows, starts), weights, mask, need_dx)
    return dx, None, None, None, None, None, *grads


def expand_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    S, rows, starts, *factors = ctx.saved_tensors
    dS, grads = _expand_backward(dout, S, factors, passes_of(rows, starts))
    return dout, dS, None, None, *grads


def lora_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, rows, starts, weights, mask, *factors = ctx.saved_tensors  # S behind the factors
    scales, passes, need_dx = ctx.scales, passes_of(rows, starts), ctx.needs_input_grad[1]
    slots = len(scales)
    As, Bs = factors[:slots], factors[slots : 2 * slots]
    S = _shrink(x, As, scales, passes, weights, mask)
    dS, dBs = _expand_backward(dout, S, Bs, passes)
    dx, dAs = _shrink_backward(dS, x, As, scales, passes, weights, mask, need_dx)
    return dout, dx, None, None, None, None, None, *dAs, *dBs


def gather_gradients(ctx: Any, dS: Tensor) -> tuple[Any, ...]:
    ids, rows, starts, weights, *factors = ctx.saved_tensors
    grads = [torch.zeros_like(A) for A in factors]
    for dS_lines, taken in zip(_weighted(dS, weights), passes_of(rows, starts), strict=True):
        for segment, part in zip(taken.segments, taken.take(ids), strict=True):
            assert part is not None
            slot, r = segment.slot, len(factors[segment.slot])
            d = ctx.scales[slot] * dS_lines[segment.begin : segment.end, :r]
            grads[slot] = grads[slot].index_add(1, part, d.t())
    return None, None, None, None, None, *grads


def scale_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    y, rows, starts, weights, bias, *vectors = ctx.saved_tensors
    dtype = torch.promote_types(torch.float32, widest(y, *(vector for vector in vectors if vector is not None)))
    flat = [None if vector is None else vector.reshape(-1).to(dtype) for vector in vectors]
    product = dout.to(dtype) * (y.to(dtype) if bias is None else y.to(dtype) - bias.to(dtype))
    unscaled = torch.ones((len(y), 1), dtype=dtype, device=y.device)  # 1 - Σ w
    scaled = torch.zeros(y.shape, dtype=dtype, device=y.device)  # Σ w · l
    grads = [None if vector is None else torch.zeros_like(vector) for vector in flat]
    for p, taken in enumerate(passes_of(rows, starts)):
        for slot, begin, end in taken.segments:
            vector, grad = flat[slot], grads[slot]
            if vector is None or grad is None:
                continue
            index = taken.index[begin:end]
            w = unscaled.new_ones((end - begin, 1)) if weights is None else weights[p, begin:end, None].to(dtype)
            unscaled = unscaled.index_add(0, index, -w)
            scaled = scaled.index_add(0, index, w * vector)
            grads[slot] = grad + (w * product.index_select(0, index)).sum(0)
    dy = (dout * (unscaled + scaled)).to(y.dtype)
    pairs = zip(grads, vectors, strict=True)
    return dy, None, None, None, None, *(None if g is None else g.to(v.dtype).view(v.shape) for g, v in pairs)


def _shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    passes: Sequence[Pass],
    weights: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """S of `reference_routed.shrink`."""
    dropped, R = drop(x, mask).to(factors[0].dtype), max(map(len, factors))
    S = []
    for taken in passes:
        parts = zip(taken.segments, taken.split(dropped.index_select(0, taken.index)), strict=True)
        S.append(_padded([scales[slot] * (part @ factors[slot].t()) for (slot, _, _), part in parts], (len(x), R), x))
    return _weighted(torch.stack(S).to(factors[0].dtype), weights)


def _shrink_backward(
    dS: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    passes: Sequence[Pass],
    weights: Tensor | None,
    mask: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """(dx, [dA_j])."""
    dropped, dAs = drop(x, mask).to(dS.dtype), [torch.zeros_like(A) for A in factors]
    dx = torch.zeros(x.shape, dtype=widest(x, dS), device=x.device)
    for dS_lines, taken in zip(_weighted(dS, weights), passes, strict=True):
        dx_parts = [dx.new_zeros((0, dx.shape[1]))]
        parts = taken.split(dropped.index_select(0, taken.index))
        for (slot, begin, end), part in zip(taken.segments, parts, strict=True):
            A = factors[slot]
            d = scales[slot] * dS_lines[begin:end, : len(A)]
            dAs[slot] = dAs[slot] + d.t() @ part
            dx_parts.append((d @ A).to(dx.dtype))
        if need_dx:
            dx = dx.index_add(0, taken.index, torch.cat(dx_parts))
    return drop(dx, mask).to(x.dtype) if need_dx else None, dAs


def _expand_backward(
    dout: Tensor, S: Tensor, factors: Sequence[Tensor], passes: Sequence[Pass]
) -> tuple[Tensor, list[Tensor]]:
    """(dS, [dB_j])."""
    dtype = widest(dout, S)
    dS, dBs = [], [torch.zeros_like(B, dtype=dtype) for B in factors]
    for S_lines, taken in zip(S, passes, strict=True):
        dS_parts = []
        parts = taken.split(dout.index_select(0, taken.index).to(dtype))
        for (slot, begin, end), part in zip(taken.segments, parts, strict=True):
            B = factors[slot].to(dtype)
            dS_parts.append(part @ B)
            dBs[slot] = dBs[slot] + part.t() @ S_lines[begin:end, : B.shape[1]].to(dtype)
        dS.append(_padded(dS_parts, (S.shape[1], S.shape[2]), S))
    return torch.stack(dS).to(S.dtype), [dB.to(B.dtype) for B, dB in zip(factors, dBs, strict=True)]


def _padded(parts: Sequence[Tensor], shape: tuple[int, int], like: Tensor) -> Tensor:
    """The parts one below the other, with zeros to the right of each and below all: of this shape."""
    M, R = shape
    lines = torch.cat([F.pad(part, (0, R - part.shape[1])) for part in parts]) if parts else like.new_zeros((0, R))
    return F.pad(lines, (0, 0, 0, M - len(lines)))


def _weighted(S: Tensor, weights: Tensor | None) -> Tensor:
    return S if weights is None else (S * weights.unsqueeze(2)).to(S.dtype)
