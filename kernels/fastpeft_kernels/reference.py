"""Every op in plain torch: the specification, and the path on a CPU.

    S    = scale · drop(x) Aᵀ          (M, r)   `shrink`
    out  = x Wᵀ + bias + S Bᵀ          (M, N)   `expand`
    dS   = scale · dout B              (M, r)   `shrink`
    dB   = doutᵀ S                     (N, r)   `outer`
    dA   = dSᵀ drop(x)                 (r, K)   `outer`
    dx   = dout W + drop'(dS A)        (M, K)   `expand`

drop zeroes what the mask drops and no more: its factor 1 / (1 - p) is part of `scale`. LoRA: arXiv:2106.09685,
section 4.1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.dispatch import FEW_ROWS
from fastpeft_kernels.low_rank import expand_, outer, output_pass, row_chunks, shrink
from fastpeft_kernels.masks import apply_mask


def dropout(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """scale · drop(x): (M, K) in x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in row_chunks(*x.shape):
        apply_mask(x[rows], mask[rows], out=out[rows]).mul_(scale)
    return out


# The ops: a LoRA linear that owns the base product, and the LoRA part added onto somebody's output.


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, S): (M, N) in x's dtype and (M, r) in A's."""
    out = F.linear(x, W, bias)
    S = shrink(x, A, mask, scale)
    return expand_(out, S, B), S


def lora_linear_of_few(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`lora_linear` without dropout, for inference on x of shape (..., K): with as few of torch's operators as go."""
    S = F.linear(x if x.dtype == A.dtype else x.to(A.dtype), A)
    return F.linear(x, W, bias).add_(F.linear(S, B), alpha=scale)


def lora_add_of_few(out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float) -> Tensor:
    """out + scale · drop(x) Aᵀ Bᵀ in out's dtype, x of shape (..., K), with torch's own gradients. S is the least to
    scale."""
    dropped = x if x.dtype == A.dtype else x.to(A.dtype)
    if dropout_p:
        dropped = F.dropout(dropped, dropout_p)
    return (out + F.linear(F.linear(dropped, A) * scale, B)).to(out.dtype)


def lora_linear_backward(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB); what is not needed is empty, of shape (0,)."""
    dS, dA, dB = _factor_pass(dout, x, B, S, mask, scale, need_factors)
    dx = add_dx_(torch.mm(dout, W), dS, A, mask) if need_dx else x.new_empty(0)
    return dx, dA, dB


def _factor_pass(
    dout: Tensor, x: Tensor, B: Tensor, S: Tensor, mask: Tensor | None, scale: float, need_factors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dS, dA, dB); dA and dB are empty where they are not needed."""
    if not need_factors:
        return shrink(dout, B.t(), None, scale), B.new_empty(0), B.new_empty(0)
    dS, dB = output_pass(dout, B, S, scale)
    return dS, outer(x, dS, mask), dB


def lora_group(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
) -> list[Tensor]:
    """[out_1, out_2, ..., S]: (M, N_i) in x's dtype and S = [S_1 S_2 ...] in that of the A's."""
    S = _shrink_each(x, As, masks, scales)
    outs = [F.linear(x, W, bias) for W, bias in zip(Ws, biases, strict=True)]
    for out, S_i, B in zip(outs, _by_rank(S, As), Bs, strict=True):
        expand_(out, S_i, B)
    return [*outs, S]


def lora_group_backward(
    douts: Sequence[Tensor],
    x: Tensor,
    Ws: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    S: Tensor,
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
    need_dx: bool,
    need_factors: bool,
) -> list[Tensor]:
    """[dx, dA_1, dA_2, ..., dB_1, dB_2, ...], [dx] without `need_factors`; a dx that is not needed is empty: (0,)."""
    dSs: Sequence[Tensor]
    dBs: Sequence[Tensor]
    if need_factors:
        parts = zip(douts, Bs, _by_rank(S, As), scales, strict=True)
        dSs, dBs = zip(*(output_pass(dout, B, S_i, scale) for dout, B, S_i, scale in parts), strict=True)
    else:
        dSs, dBs = [shrink(dout, B.t(), None, scale) for dout, B, scale in zip(douts, Bs, scales, strict=True)], []
    together = all(mask is None for mask in masks)
    if together:
        dSs, masks = [torch.cat(list(dSs), dim=1)], [None]
    dAs = [outer(x, dS, mask) for dS, mask in zip(dSs, masks, strict=True)] if need_factors else []
    if together and need_factors:
        dAs = [dA.clone() for dA in _by_rank(dAs[0], As, dim=0)]  # an op's outputs share no memory
    if not need_dx:
        return [x.new_empty(0), *dAs, *dBs]
    dx = torch.mm(douts[0], Ws[0])
    for dout, W in zip(douts[1:], Ws[1:], strict=True):
        dx.addmm_(dout, W)
    for dS, A, mask in zip(dSs, [torch.cat(list(As))] if together else As, masks, strict=True):
        add_dx_(dx, dS, A, mask)
    return [dx, *dAs, *dBs]


def _shrink_each(x: Tensor, As: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Sequence[float]) -> Tensor:
    """[S_1 S_2 ...], by one product where the members see the same x."""
    if len(x) <= FEW_ROWS or any(mask is not None for mask in masks):
        return torch.cat([shrink(x, A, mask, s) for A, mask, s in zip(As, masks, scales, strict=True)], dim=1)
    S = shrink(x, torch.cat(list(As)), None, 1.0)
    for S_i, scale in zip(_by_rank(S, As), scales, strict=True):
        S_i.mul_(scale)
    return S


def _by_rank(t: Tensor, As: Sequence[Tensor], dim: int = 1) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = torch.split_with_sizes(t, [A.shape[0] for A in As], dim)
    return parts


def lora_add(out: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out + S Bᵀ, S): (M, N) in out's dtype and (M, r) in A's."""
    S = shrink(x, A, mask, scale)
    return expand_(out.clone(memory_format=torch.contiguous_format), S, B), S


def lora_add_backward(
    dout: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) of the low-rank part alone; what is not needed is empty, of shape (0,)."""
    dS, dA, dB = _factor_pass(dout, x, B, S, mask, scale, need_factors)
    dx = add_dx_(torch.zeros(x.shape, dtype=x.dtype, device=x.device), dS, A, mask) if need_dx else x.new_empty(0)
    return dx, dA, dB


def add_dx_(dx: Tensor, dS: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """dx += drop'(dS A) in place. Eager torch rounds this product to bf16 before it adds it: bf16 factors will do."""
    if dx.dtype == torch.bfloat16:
        dS, A = dS.to(dx.dtype), A.to(dx.dtype)
    return expand_(dx, dS, A.t(), mask)
