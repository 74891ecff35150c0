"""Routed LoRA of a few rows in plain torch, as in decoding: bound by Python and by torch's operators, not by products.

Adapters whose factors lie side by side are two batched products, whatever their number; others take two operators each.
`reference_routed` has the specification.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.routed_passes import Layout, Pass, passes_of, put_rows_
from fastpeft_kernels.routes import ranks_of
from fastpeft_kernels.side_by_side import SideBySide, side_by_side

FEW_ROWS = 256  # of a batch: always here, whatever its slots
FEW_OF_A_SLOT = 128  # in larger batches, rows that every slot has
PIECE = 1 << 18  # elements of x or out, copied and widened at a time: they stay in the cache
FEW_OF_A_RANK = 4  # slots of one rank: those of fewer are not taken together
MOST_PADDING = 2  # times the rows: what batched products may take for slots of unequal rows, and for places of no slot


class Products:
    """Slots of one rank whose factors lie side by side, and the rows they have: two batched products, used repeatedly.

    What it was made of must stay as it is: the memory of the factors, the scales, who has which row.
    """

    def __init__(self, A: SideBySide, B: SideBySide, scales: Sequence[float], layout: Layout) -> None:
        self._A, self._B, self._layout = A.stack, B.stack, layout
        self._alpha, self._scales = scales[0], None
        if scales.count(scales[0]) < len(scales):
            by_place = dict(zip(A.places, scales, strict=True))
            of_places = [by_place.get(place, 0.0) for place in range(len(A.stack))]
            self._alpha, self._scales = 1.0, A.stack.new_tensor(of_places).view(-1, 1, 1)

    def add_to_(self, out: Tensor, x: Tensor) -> None:
        """out (M, N) += scale · x Aᵀ Bᵀ for x (M, K), in the factors' dtype, rounded to out's once.

        Rows without a slot keep their bits; lines without a row compute something that nobody reads.
        """
        A, B, layout, alpha = self._A, self._B, self._layout, self._alpha
        lines = self._by_place(x)
        if lines.shape[1] <= 2:  # of a row or two MKL makes twice as quick work so
            S = torch.bmm(A, lines.mT).mT.contiguous()
        else:
            S = torch.bmm(lines, A.mT)
        if self._scales is not None:
            S.mul_(self._scales)
        if not isinstance(layout.row_of, Tensor):
            total = self._by_place(out).baddbmm_(S, B.mT, alpha=alpha)
            if total.dtype != out.dtype:
                _lines(out, layout).copy_(total.flatten(0, 1))
        elif out.dtype == A.dtype and out.element_size() >= 4:  # narrow ones would be rounded twice, and torch's
            # index_add_ rewrites NaNs in rows that it is not given
            out.index_add_(0, layout.rows, _used(torch.bmm(S, B.mT), layout), alpha=alpha)
        else:
            total = _used(self._by_place(out).baddbmm_(S, B.mT, alpha=alpha), layout)
            put_rows_(out, layout.rows, total.to(out.dtype))

    def _by_place(self, t: Tensor) -> Tensor:
        """Rows of t as the lines of each place, (places, lines, columns) in the factors' dtype."""
        lines, places = _lines(t, self._layout), len(self._A)
        return lines.to(self._A.dtype).reshape(places, len(lines) // places, t.shape[1])


def _lines(t: Tensor, layout: Layout) -> Tensor:
    row_of = layout.row_of
    if row_of is None:
        return t
    return t[row_of] if isinstance(row_of, slice) else t.index_select(0, row_of)


def _used(by_place: Tensor, layout: Layout) -> Tensor:
    """The lines that have a row: (entries, columns)."""
    lines = by_place.flatten(0, 1)
    return lines if layout.used is None else lines.index_select(0, layout.used)


def products_of_few(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], rows: Tensor, starts: Tensor
) -> list[Products] | None:
    """What adds all adapters to the few rows that have one; None where batched products are not all of it.

    Args are those of `lora_routed`, without weights or a mask.
    """
    passes = passes_of(rows, starts)
    if len(passes) != 1 or passes[0].entries > FEW_ROWS:
        return None
    found: list[Products] = []
    for part in _parts_of_one_rank(As, passes[0]):
        together = _products(As, Bs, scales, part, MOST_PADDING)
        if together is None:
            return None
        found += together
    return found


def add_to_few_(
    out: Tensor, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], taken: Pass
) -> bool:
    """out += scale · x Aᵀ Bᵀ, each row with its slot's factors, rounded once; As are of out's dtype or wider.

    Returns:
        Whether it was done. Larger batches of unequal slots, or whose factors lie apart, are not for here.
    """
    few = taken.entries <= FEW_ROWS
    if not few and (taken.most > FEW_OF_A_SLOT or taken.most * len(taken.segments) != taken.entries):
        return False
    for part in _parts_of_one_rank(As, taken) if few else [taken]:
        together = _products(As, Bs, scales, part, MOST_PADDING if few else 1)
        if together is None and not few:
            return False
        if together is None:
            _slot_by_slot_(out, x, As, Bs, scales, part)
        for products in together or ():
            products.add_to_(out, x)
    return True


def _parts_of_one_rank(As: Sequence[Tensor], taken: Pass) -> list[Pass]:
    """The pass by ranks, where enough slots have the same one; no part where there are no slots."""
    ranks = ranks_of([As[segment.slot] for segment in taken.segments], 0)
    if 1 < len(set(ranks)) <= len(ranks) // FEW_OF_A_RANK:
        return taken.parted(tuple(ranks))
    return [taken] if ranks else []


def _products(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], taken: Pass, most_padding: int
) -> list[Products] | None:
    """All slots of a pass together, where that is possible and takes no more lines than so many times the rows."""
    slots = [segment.slot for segment in taken.segments]
    A, B = _as_one([As[slot] for slot in slots]), _as_one([Bs[slot] for slot in slots])
    if A is None or B is None or A.places != B.places or taken.most * len(A.stack) > taken.entries * most_padding:
        return None
    scales = [scales[slot] for slot in slots]
    layout, places = taken.laid_out(A.places), len(A.stack)
    at_once = max(1, PIECE // max(1, taken.most * max(A.stack.shape[2], B.stack.shape[1])))
    if places <= at_once or layout.used is not None:
        return [Products(A, B, scales, layout)]
    of_place = dict(zip(A.places, scales, strict=True))
    return [
        _piece(A, B, of_place, layout, taken.most, begin, min(begin + at_once, places))
        for begin in range(0, places, at_once)
    ]


def _piece(
    A: SideBySide, B: SideBySide, scales: Mapping[int, float], layout: Layout, lines: int, begin: int, end: int
) -> Products:
    """The products of some places, of so many lines each."""
    places = tuple(range(end - begin))
    part = layout.part(begin * lines, end * lines)
    its_scales = [scales[place] for place in range(begin, end)]
    return Products(SideBySide(A.stack[begin:end], places), SideBySide(B.stack[begin:end], places), its_scales, part)


def _as_one(factors: Sequence[Tensor]) -> SideBySide | None:
    return SideBySide(factors[0].detach().unsqueeze(0), (0,)) if len(factors) == 1 else side_by_side(factors)


def _slot_by_slot_(
    out: Tensor, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], taken: Pass
) -> None:
    """With two operators a slot: all rows are gathered and widened at once."""
    slots = [segment.slot for segment in taken.segments]
    As, Bs, scales = [As[slot] for slot in slots], [Bs[slot] for slot in slots], [scales[slot] for slot in slots]
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
        put_rows_(out, taken.index, sums.to(out.dtype))
    elif sums is not total:
        total.copy_(sums)
