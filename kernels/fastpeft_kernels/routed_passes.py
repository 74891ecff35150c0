"""Who sits where in a batch of mixed adapters: the tables of fastpeft_kernels.routed, read once for plain torch."""

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT_ROWS = 4096  # up to so many, a pass is looked up faster than it is made
KEPT_LAYOUTS = 16  # of a pass: most layers of a model have the same one


class Segment(NamedTuple):
    """Lines begin to end of a pass, all of one slot."""

    slot: int
    begin: int
    end: int


class Layout(NamedTuple):
    """Lines for a batched product: place after place, as many lines each as the largest slot has rows."""

    row_of: Tensor | slice | None  # (lines,) the row of each, where a line has none any row; None: line i is row i
    used: Tensor | None  # (entries,) the lines that have a row; None: all of them
    rows: Tensor  # (entries,) the rows of these

    def part(self, begin: int, end: int) -> "Layout":
        """Some of the lines, of a layout all of whose lines have a row."""
        lines = slice(begin, end)
        return Layout(lines if self.row_of is None else self.row_of[lines], None, self.rows[lines])  # type: ignore[index]


class Pass:
    """The rows of one pass, segment by segment."""

    def __init__(self, order: Sequence[int], starts: Sequence[int], device: torch.device) -> None:
        """
        Args:
            order: a line of `rows`.
            starts: a line of `starts`.
        """
        self._order = order
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._parts: dict[tuple[int, ...], list[Pass]] = {}
        bounds = enumerate(pairwise(starts))
        self.segments = segments = [Segment(slot, begin, end) for slot, (begin, end) in bounds if end > begin]
        self.entries = starts[-1]
        self.most = max([end - begin for _, begin, end in segments], default=0)  # rows of a slot
        self.index = _kept_index(order[: self.entries], device)
        self.are_slices = all(_follow_one_another(order[s.begin : s.end]) for s in segments)
        self.slices = [slice(order[s.begin], order[s.begin] + s.end - s.begin) for s in segments]
        self.in_order = self.are_slices and all(i == row for i, row in enumerate(order[: self.entries]))
        whole = self.in_order and self.entries == len(order)
        self.is_even = whole and len({end - begin for _, begin, end in segments}) == 1

    def take(self, t: Tensor | None) -> Iterator[Tensor | None]:
        """The rows of t that each segment has, until the next segment is asked for."""
        for segment, rows in zip(self.segments, self.slices, strict=True):
            if t is None:
                yield None
            elif self.are_slices:
                yield t[rows]
            else:
                yield t.index_select(0, self.index[segment.begin : segment.end])

    def give_back_(self, out: Tensor, segment: Segment, part: Tensor) -> None:
        """Store what `take(out)` gave for this segment, changed in place since."""
        if not self.are_slices:
            put_rows_(out, self.index[segment.begin : segment.end], part)

    def split(self, lines: Tensor) -> Sequence[Tensor]:
        """Lines in the order of the pass, by segment."""
        parts: Sequence[Tensor] = torch.split_with_sizes(lines, [s.end - s.begin for s in self.segments])
        return parts

    def parted(self, keys: tuple[int, ...]) -> "list[Pass]":
        """A pass for the segments of each key, keys[i] being that of segment i."""
        parts = self._parts.get(keys)
        if parts is None:
            _make_room(self._parts)
            parts = self._parts[keys] = [self._part([k == key for k in keys]) for key in dict.fromkeys(keys)]
        return parts

    def _part(self, chosen: Sequence[bool]) -> "Pass":
        of_slot = {segment.slot: segment for segment, is_in in zip(self.segments, chosen, strict=True) if is_in}
        order: list[int] = []
        starts = [0]
        for slot in range(max(of_slot) + 1):
            if slot in of_slot:
                order += self._order[of_slot[slot].begin : of_slot[slot].end]
            starts.append(len(order))
        others = set(self._order).difference(order)
        return Pass([*order, *others], starts, self.index.device)

    def laid_out(self, places: tuple[int, ...]) -> Layout:
        """The lines of all segments, segment i being at places[i], all different."""
        layout = self._layouts.get(places)
        if layout is None:
            _make_room(self._layouts)
            layout = self._layouts[places] = self._lay_out(places)
        return layout

    def _lay_out(self, places: tuple[int, ...]) -> Layout:
        most = self.most
        row_of = [-1] * (most * (max(places) + 1))
        for place, (_, begin, end) in zip(places, self.segments, strict=True):
            row_of[place * most : place * most + end - begin] = self._order[begin:end]
        if row_of == list(range(len(self._order))):
            return Layout(None, None, self.index)
        used = [line for line, row in enumerate(row_of) if row >= 0]
        device = self.index.device
        return Layout(
            _kept_index([max(row, 0) for row in row_of], device),
            None if len(used) == len(row_of) else _kept_index(used, device),
            _kept_index([row_of[line] for line in used], device),
        )


def put_rows_(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index[i]] = rows[i], matrices of one dtype: by sixteen bytes, where index_copy_ takes element by element."""
    count = 16 // out.element_size()
    if out.device.type == "cpu" and all(
        t.stride(1) == 1 and t.shape[1] % count == t.stride(0) % count == t.storage_offset() % count == 0
        for t in (out, rows)
    ):
        out, rows = out.view(torch.complex128), rows.view(torch.complex128)
    out.index_copy_(0, index, rows)


def _make_room(kept: dict[tuple[int, ...], Any]) -> None:
    if len(kept) >= KEPT_LAYOUTS:
        kept.clear()


def _kept_index(numbers: Sequence[int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be kept for a forward with gradients
        return torch.tensor(numbers, dtype=torch.int64, device=device)


def _follow_one_another(rows: Sequence[int]) -> bool:
    return all(after == row + 1 for row, after in pairwise(rows))


def passes_of(rows: Tensor, starts: Tensor) -> list[Pass]:
    lines = zip(rows.tolist(), starts.tolist(), strict=True)
    if rows.shape[1] > KEPT_ROWS:
        return [Pass(order, line, rows.device) for order, line in lines]
    return [_kept_pass(tuple(order), tuple(line), rows.device) for order, line in lines]


_kept_pass = functools.lru_cache(64)(Pass)  # decoding asks for the same one in every layer
