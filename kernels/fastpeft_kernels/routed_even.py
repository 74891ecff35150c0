"""Routed LoRA in plain torch where all slots have as many rows, one slot after the other: batched products.

Such are the batches of joint training, which runs on routed_pairs wherever no compiler is at work. A few products for
all slots of a rank together, or for all slots padded to the largest rank where factors do not lie side by side; slot by
slot takes some thirty operators a slot. `reference_routed` has the specification, and says which batches come here.

x is (n L, K): slot i of n has rows i L to (i + 1) L.
"""

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastpeft_kernels.masks import apply_mask
from fastpeft_kernels.routes import ranks_of
from fastpeft_kernels.side_by_side import side_by_side

FEW_OF_A_RANK = 2  # slots of one rank on the average: fewer are padded to the largest
MOST_ELEMENTS = 1 << 21  # of x or out: they are held in fp32 as a whole, 8 MB
MOST_PADDING = 2.0  # times the ranks' sum


def is_worth_it(rows: int, columns: int, ranks: Sequence[int]) -> bool:
    """Whether (rows, columns) tensors of slots with these ranks are small and alike enough."""
    padded = len(ranks) * max(ranks)
    return len(ranks) > 1 and rows * columns <= MOST_ELEMENTS and 0 < padded <= MOST_PADDING * sum(ranks)


def shrink(x: Tensor, factors: Sequence[Tensor], scales: Sequence[float], mask: Tensor | None) -> Tensor:
    """S = scale · drop(x) Aᵀ: (n L, R) in the factors' dtype, zeros past a slot's rank; factors (r_i, K)."""
    runs, R = _runs(factors, 0), max(ranks_of(factors, 0))
    x = _dropped(x, mask)
    S = x.new_zeros((x.shape[0], R), dtype=factors[0].dtype)
    for lines, A in _with_lines(runs, x, factors):
        S[lines, : A.shape[1]] = torch.bmm(_by_slot(x[lines], A), A.mT).flatten(0, 1)
    return S.mul_(_of_lines(scales, S))


def shrink_backward(
    dS: Tensor, x: Tensor, factors: Sequence[Tensor], scales: Sequence[float], mask: Tensor | None, need_dx: bool
) -> tuple[Tensor, list[Tensor]]:
    """(dx, [dA_i]); dx is empty where it is not needed."""
    scaled = dS.to(factors[0].dtype) * _of_lines(scales, dS)
    dropped = _dropped(x, mask)
    wide = scaled.new_empty(x.shape if need_dx else 0)
    dAs: list[Tensor] = []
    for lines, A in _with_lines(_runs(factors, 0), x, factors):
        part = _by_slot(scaled[lines, : A.shape[1]], A)
        dAs += torch.bmm(part.mT, _by_slot(dropped[lines], A)).unbind()
        if need_dx:
            torch.bmm(part, A, out=_by_slot(wide[lines], A))
    dx = wide.to(x.dtype)
    if need_dx and mask is not None:
        dx = apply_mask(dx, mask, out=dx)
    return dx, [dA[: factor.shape[0]] for dA, factor in zip(dAs, factors, strict=True)]


def expand_(out: Tensor, S: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """out += S Bᵀ in place, rounded once: out (n L, N) contiguous, S (n L, R), factors (N, r_i)."""
    total = out.to(factors[0].dtype)
    for lines, B in _with_lines(_runs(factors, 1), out, factors):
        _by_slot(total[lines], B).baddbmm_(_by_slot(S[lines, : B.shape[2]], B), B.mT)
    return out if total is out else out.copy_(total)


def expand_backward(dout: Tensor, S: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(dS, [dB_i])."""
    wide = dout.to(factors[0].dtype)
    dS = S.new_zeros((S.shape[0], max(ranks_of(factors, 1))))
    dBs: list[Tensor] = []
    for lines, B in _with_lines(_runs(factors, 1), dout, factors):
        part = _by_slot(wide[lines], B)
        dS[lines, : B.shape[2]] = torch.bmm(part, B).flatten(0, 1)
        dBs += torch.bmm(part.mT, _by_slot(S[lines, : B.shape[2]], B)).unbind()
    return dS, [dB[:, : factor.shape[1]].contiguous() for dB, factor in zip(dBs, factors, strict=True)]


def _runs(factors: Sequence[Tensor], rank_dim: int) -> list[tuple[int, Tensor]]:
    """(number of slots, their factors as one tensor), one after the other: A (n, R, K), B (n, N, R).

    Slots of one rank whose factors lie side by side in memory, or else copies of all, padded to the largest rank.
    """
    ranks = ranks_of(factors, rank_dim)
    changes = [i for i in range(1, len(ranks)) if ranks[i] != ranks[i - 1]]
    runs = []
    if len(changes) < len(ranks) // FEW_OF_A_RANK:
        for begin, end in pairwise([0, *changes, len(ranks)]):
            together = side_by_side(factors[begin:end])
            if together is None or together.places != tuple(range(end - begin)):
                break
            runs.append((end - begin, together.stack))
    return runs if len(runs) == len(changes) + 1 else [(len(ranks), padded(factors, rank_dim))]


def padded(factors: Sequence[Tensor], rank_dim: int) -> Tensor:
    """Copies of all as one tensor, padded to the largest rank."""
    ranks = ranks_of(factors, rank_dim)
    n, R, width = len(factors), max(ranks), factors[0].shape[1 - rank_dim]
    parts = factors
    if min(ranks) < R:  # one concatenation with the padding in it: pad_sequence takes eight times as long
        zeros = factors[0].new_zeros((R, width) if rank_dim == 0 else (width, R))
        pairs = zip(factors, ranks, strict=True)
        parts = [part for factor, r in pairs for part in (factor, zeros.narrow(rank_dim, 0, R - r)) if part.numel()]
    joined = torch.cat(list(parts), dim=rank_dim)
    return joined.view(n, R, width) if rank_dim == 0 else joined.view(width, n, R).transpose(0, 1)


def _with_lines(
    runs: Sequence[tuple[int, Tensor]], rows: Tensor, factors: Sequence[Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each run, and its factors."""
    each, begin = rows.shape[0] // len(factors), 0
    for slots, stack in runs:
        yield slice(begin, begin + slots * each), stack
        begin += slots * each


def _by_slot(rows: Tensor, stacked: Tensor) -> Tensor:
    """(n L, columns) -> (n, L, columns) in the factors' dtype; a view of rows that are contiguous and of that dtype."""
    return rows.to(stacked.dtype).contiguous().view(stacked.shape[0], -1, rows.shape[1])


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else apply_mask(x, mask)


def _of_lines(scales: Sequence[float], lines: Tensor) -> Tensor:
    """The scale of each line: (n L, 1)."""
    each = lines.shape[0] // len(scales)
    return _kept_scales(tuple(scales), each, lines.dtype, lines.device)


@functools.lru_cache(64)  # every layer of a model asks for the same
def _kept_scales(scales: tuple[float, ...], each: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(scales, dtype=dtype, device=device).repeat_interleave(each).unsqueeze(1)
