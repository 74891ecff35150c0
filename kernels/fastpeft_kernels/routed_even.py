"""Routed LoRA in plain torch where all slots have as many rows, one slot after the other: batched products.

Such are the batches of joint training. A few products for all slots together, padded to the largest rank, where slot by
slot takes some thirty operators a slot. `reference_routed` has the specification, and says which batches come here.

x is (n L, K): slot i of n has rows i L to (i + 1) L.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft_kernels.masks import apply_mask
from fastpeft_kernels.side_by_side import side_by_side

MOST_ELEMENTS = 1 << 21  # of x or out: they are held in fp32 as a whole, 8 MB
MOST_PADDING = 2.0  # times the ranks' sum


def is_worth_it(rows: int, columns: int, ranks: Sequence[int]) -> bool:
    """Whether (rows, columns) tensors of slots with these ranks are small and alike enough."""
    padded = len(ranks) * max(ranks)
    return len(ranks) > 1 and rows * columns <= MOST_ELEMENTS and padded <= MOST_PADDING * sum(ranks)


def shrink(x: Tensor, factors: Sequence[Tensor], scales: Sequence[float], mask: Tensor | None) -> Tensor:
    """S = scale · drop(x) Aᵀ: (n L, R) in the factors' dtype, zeros past a slot's rank; factors (r_i, K)."""
    A = _stacked(factors, 0)
    S = torch.bmm(_by_slot(_dropped(x, mask), A), A.mT)
    return S.mul_(_column(scales, S)).flatten(0, 1)


def shrink_backward(
    dS: Tensor, x: Tensor, factors: Sequence[Tensor], scales: Sequence[float], mask: Tensor | None, need_dx: bool
) -> tuple[Tensor, list[Tensor]]:
    """(dx, [dA_i]); dx is empty where it is not needed."""
    A = _stacked(factors, 0)
    scaled = _by_slot(dS, A) * _column(scales, A)
    dA = torch.bmm(scaled.mT, _by_slot(_dropped(x, mask), A))
    dx = x.new_empty(0)
    if need_dx:
        dx = torch.bmm(scaled, A).flatten(0, 1).to(x.dtype)
        dx = dx if mask is None else apply_mask(dx, mask, out=dx)
    return dx, [part[: len(factor)] for part, factor in zip(dA.unbind(), factors, strict=True)]


def expand_(out: Tensor, S: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """out += S Bᵀ in place, rounded once: out (n L, N) contiguous, S (n L, R), factors (N, r_i)."""
    B = _stacked(factors, 1)
    total = _by_slot(out, B)  # out itself where it has the factors' dtype
    total.baddbmm_(_by_slot(S, B), B.mT)
    return out if total.dtype == out.dtype else out.copy_(total.flatten(0, 1))


def expand_backward(dout: Tensor, S: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(dS, [dB_i])."""
    B = _stacked(factors, 1)
    wide = _by_slot(dout, B)
    dB = torch.bmm(wide.mT, _by_slot(S, B))
    parts = zip(dB.unbind(), factors, strict=True)
    return torch.bmm(wide, B).flatten(0, 1), [part[:, : factor.shape[1]].contiguous() for part, factor in parts]


def _stacked(factors: Sequence[Tensor], rank_dim: int) -> Tensor:
    """Factors side by side along their ranks, each padded with zeros to the largest: A (n, R, K), B (n, N, R).

    Those that lie side by side in memory are not copied.
    """
    together = side_by_side(factors)
    if together is not None and together.places == tuple(range(len(factors))):
        return together.stack
    ranks = [factor.shape[rank_dim] for factor in factors]
    n, R, width = len(factors), max(ranks), factors[0].shape[1 - rank_dim]
    parts = factors
    if min(ranks) < R:  # one concatenation with the padding in it: pad_sequence takes eight times as long
        zeros = factors[0].new_zeros((R, width) if rank_dim == 0 else (width, R))
        pairs = zip(factors, ranks, strict=True)
        parts = [part for factor, r in pairs for part in (factor, zeros.narrow(rank_dim, 0, R - r)) if part.numel()]
    joined = torch.cat(list(parts), dim=rank_dim)
    return joined.view(n, R, width) if rank_dim == 0 else joined.view(width, n, R).transpose(0, 1)


def _by_slot(rows: Tensor, stacked: Tensor) -> Tensor:
    """(n L, columns) -> (n, L, columns) in the factors' dtype."""
    return rows.to(stacked.dtype).contiguous().view(len(stacked), -1, rows.shape[1])


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else apply_mask(x, mask)


def _column(scales: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(scales, dtype=like.dtype, device=like.device).view(-1, 1, 1)
