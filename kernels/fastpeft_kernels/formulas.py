"""The gradients of the ops by plain operators, each with torch's own gradient: for gradients of gradients (twice.py).

What was saved and is no input of its op (S, z) is computed anew, since it depends on inputs. Arguments are those of the
fused backward passes in reference.py, reference_dora.py and reference_scale.py, where the formulas are explained;
what is not needed comes back as None.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft_kernels.masks import apply_mask


def widest(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors])


def drop(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where the mask keeps, else 0: (M, K)."""
    if mask is None:
        return x
    return x.masked_fill(apply_mask(x.new_ones(x.shape), mask) == 0, 0.0)


def dropout(dout: Tensor, mask: Tensor, scale: float) -> Tensor:
    return drop(dout, mask) * scale


# LoRA.


def _low_rank_backward(
    dout: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, scale: float, need_dx: bool, need_factors: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB) of scale · drop(x) Aᵀ Bᵀ; dx is yet to be rounded to x's dtype."""
    dtype = widest(dout, x, A)
    dout, wide_A, wide_B = (t.to(dtype) for t in (dout, A, B))
    dS = scale * (dout @ wide_B)
    dx = drop(dS @ wide_A, mask) if need_dx else None
    if not need_factors:
        return dx, None, None
    dropped = drop(x, mask).to(dtype)
    S = scale * (dropped @ wide_A.t())
    return dx, (dS.t() @ dropped).to(A.dtype), (dout.t() @ S).to(B.dtype)


def lora_linear_backward(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    _S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor | None, ...]:
    dx, dA, dB = _low_rank_backward(dout, x, A, B, mask, scale, need_dx, need_factors)
    return None if dx is None else (dout @ W + dx).to(x.dtype), dA, dB


def lora_add_backward(
    dout: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    _S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor | None, ...]:
    dx, dA, dB = _low_rank_backward(dout, x, A, B, mask, scale, need_dx, need_factors)
    return None if dx is None else dx.to(x.dtype), dA, dB


def lora_group_backward(
    douts: Sequence[Tensor],
    x: Tensor,
    Ws: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    _S: Tensor,
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
    need_dx: bool,
    need_factors: bool,
) -> list[Tensor | None]:
    members = zip(douts, As, Bs, masks, scales, strict=True)
    found = [_low_rank_backward(dout, x, A, B, mask, s, need_dx, need_factors) for dout, A, B, mask, s in members]
    dx = None
    for dout, W, (part, _, _) in zip(douts, Ws, found, strict=True):
        if part is not None:
            dx = dout @ W + part if dx is None else dx + dout @ W + part
    factors = [*(dA for _, dA, _ in found), *(dB for _, _, dB in found)] if need_factors else []
    return [None if dx is None else dx.to(x.dtype), *factors]


# DoRA. The norm has no gradient, of no order.


def dora_linear_backward(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    _S: Tensor,
    _z: Tensor,
    norm: Tensor,
    mask: Tensor | None,
    scaling: float,
    keep_scale: float,
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor | None, ...]:
    factor = magnitude.to(norm.dtype) / norm * keep_scale
    weighted = dout * factor  # the gradient of z + S Bᵀ
    dx, dA, dB = _low_rank_backward(weighted, x, A, B, mask, scaling, need_dx, need_factors)
    if dx is not None and mask is None:
        dx = weighted.to(W.dtype) @ W + dx
    elif dx is not None:
        dx = dout @ W + drop((weighted - keep_scale * dout).to(W.dtype) @ W, mask) + dx
    if dx is not None:
        dx = dx.to(x.dtype)
    if not need_factors:
        return dx, None, None, None
    dropped = drop(x, mask)
    dtype = widest(x, A)
    low_rank = scaling * (dropped.to(dtype) @ A.t().to(dtype)) @ B.t().to(dtype)
    total = (dout.to(norm.dtype) * (dropped @ W.t() + low_rank)).sum(0)
    return dx, dA, dB, (total * keep_scale / norm).to(magnitude.dtype)


# IA³.


def scale_columns_backward(
    dout: Tensor, x: Tensor | None, scale: Tensor, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    wide = torch.promote_types(widest(dout, scale), torch.float32)
    dx = (dout * scale.reshape(-1).to(wide)).to(dout.dtype) if need_dx else None
    if x is None:
        return dx, None
    return dx, (dout.to(wide) * x).sum(0).to(scale.dtype).view(scale.shape)


def scale_linear_backward(
    dout: Tensor, x: Tensor | None, scale: Tensor, W: Tensor, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    return scale_columns_backward(dout @ W, x, scale, need_dx)
