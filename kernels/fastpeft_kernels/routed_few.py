"""Routed LoRA of a few rows in plain torch, as in decoding: bound by Python and by torch's operators, not by products.

Adapters whose factors lie side by side are two batched products, whatever their number; others take two operators each.
`reference_routed` has the specification.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.routed_passes import Layout, Pass
from fastpeft_kernels.routes import ranks_of
from fastpeft_kernels.side_by_side import SideBySide, side_by_side

FEW_ROWS = 256  # of a batch: always here
FEW_OF_A_SLOT = 32  # in larger batches, rows that every slot has
MOST_ELEMENTS = 1 << 21  # of x or out in these, which are copied as a whole where rows are not in order
FEW_OF_A_RANK = 4  # slots of one rank: those of fewer are not taken together
MOST_PADDING = 2  # times the rows: what batched products may take for slots of unequal rows, and for places of no slot


def add_to_few_(
    out: Tensor, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], taken: Pass
) -> bool:
    """out += scale · x Aᵀ Bᵀ, each row with its slot's factors, rounded once; As are of out's dtype or wider.

    Returns:
        Whether it was done. Larger batches of unequal slots, or whose factors lie apart, are not for here.
    """
    few = taken.entries <= FEW_ROWS
    if not few and not _may_go_together(taken, max(x.shape[1], out.shape[1])):
        return False
    slots = [segment.slot for segment in taken.segments]
    if not slots:
        return True
    ranks = ranks_of([As[slot] for slot in slots], 0)
    if few and 1 < len(set(ranks)) <= len(slots) // FEW_OF_A_RANK:
        for part in taken.parted(tuple(ranks)):
            add_to_few_(out, x, As, Bs, scales, part)
        return True
    As, Bs, scales = [As[slot] for slot in slots], [Bs[slot] for slot in slots], [scales[slot] for slot in slots]
    if len(slots) > 1:
        A, B = side_by_side(As), side_by_side(Bs)
        most_lines = taken.entries * (MOST_PADDING if few else 1)
        if A and B and A.places == B.places and taken.most * len(A.stack) <= most_lines:
            _together_(out, x, A, B, scales, taken.laid_out(A.places))
            return True
    if few:
        _slot_by_slot_(out, x, As, Bs, scales, taken)
    return few


def _may_go_together(taken: Pass, columns: int) -> bool:
    equal = taken.most * len(taken.segments) == taken.entries
    return equal and taken.most <= FEW_OF_A_SLOT and taken.entries * columns <= MOST_ELEMENTS


def _together_(out: Tensor, x: Tensor, A: SideBySide, B: SideBySide, scales: Sequence[float], layout: Layout) -> None:
    """Two batched products; lines of no row compute something that nobody reads."""
    stack, dtype = A.stack, A.stack.dtype
    lines, sums = (
        (t if layout.row_of is None else t.index_select(0, layout.row_of)).to(dtype).reshape(len(stack), -1, t.shape[1])
        for t in (x, out)
    )
    if lines.shape[1] <= 2:  # of a row or two MKL makes twice as quick work so
        S = torch.bmm(stack, lines.mT).mT.contiguous()
    else:
        S = torch.bmm(lines, stack.mT)
    alpha = scales[0]
    if scales.count(alpha) < len(scales):
        by_place = dict(zip(A.places, scales, strict=True))
        alpha = 1.0
        S.mul_(S.new_tensor([by_place.get(place, 0.0) for place in range(len(stack))]).view(-1, 1, 1))
    total = sums.baddbmm_(S, B.stack.mT, alpha=alpha).view(-1, out.shape[1])
    if layout.row_of is not None:
        used = total if layout.used is None else total.index_select(0, layout.used)
        out.index_copy_(0, layout.rows, used.to(out.dtype))
    elif total.dtype != out.dtype:
        out.copy_(total)


def _slot_by_slot_(
    out: Tensor, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], taken: Pass
) -> None:
    """With two operators a slot: all rows are gathered and widened at once."""
    if taken.in_order:
        lines, total = x[: taken.entries], out[: taken.entries]
    else:
        lines, total = x.index_select(0, taken.index), out.index_select(0, taken.index)
    lines, sums = lines.to(As[0].dtype), total.to(As[0].dtype)
    adapters = zip(As, Bs, scales, strict=True)
    if len(As) == taken.entries:  # each row alone with its adapter
        for (A, B, scale), line, row in zip(adapters, lines.unbind(), sums.unbind(), strict=True):
            row.addmv_(B, torch.mv(A, line), alpha=scale)
    else:
        for (A, B, scale), line, part in zip(adapters, taken.split(lines), taken.split(sums), strict=True):
            part.addmm_(F.linear(line, A), B.t(), alpha=scale)
    if not taken.in_order:
        out.index_copy_(0, taken.index, sums.to(out.dtype))
    elif sums is not total:
        total.copy_(sums)
