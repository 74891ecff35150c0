"""Operands of routed ops, and the same results row by row: shared by the tests of those ops."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft_kernels.side_by_side import Shelf

Entries = Sequence[Sequence[tuple[int, float]]]  # for each row its (slot, weight) pairs


class Routing(NamedTuple):
    """The three tensors of a routing, in the order in which the ops take them."""

    rows: Tensor
    starts: Tensor
    weights: Tensor | None


def routing(entries: Entries, slots: int, device: str, weighted: bool = False) -> Routing:
    """What fastpeft_kernels.routed describes, by its definition; `weighted`: with weights even where all are 1."""
    weighted = weighted or any(weight != 1.0 for row in entries for _, weight in row)
    rows, starts, weights = [], [], []
    for p in range(max([1, *map(len, entries)])):
        taken = sorted((row[p][0], m, row[p][1]) for m, row in enumerate(entries) if len(row) > p)
        rows.append([m for _, m, _ in taken] + [m for m, row in enumerate(entries) if len(row) <= p])
        starts.append([sum(slot < j for slot, _, _ in taken) for j in range(slots + 1)])
        weights.append([weight for *_, weight in taken] + [0.0] * (len(entries) - len(taken)))
    kinds = ((rows, torch.int32), (starts, torch.int32), (weights, torch.float32))
    tensors = [torch.tensor(lines, dtype=dtype, device=device) for lines, dtype in kinds]
    return Routing(tensors[0], tensors[1], tensors[2] if weighted else None)


def one_each(slots: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Entries of rows that take one slot each, or none: -1."""
    return [[] if slot < 0 else [(slot, 1.0)] for slot in slots]


def by_row_add(
    base: Tensor, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], entries: Entries
) -> Tensor:
    """Each row by itself, in PEFT's order of operations."""
    outs = []
    for row, line, taken in zip(base, x, entries, strict=True):
        for slot, weight in taken:
            low = line.to(As[slot].dtype) @ As[slot].t()
            row = row + low @ Bs[slot].t() * (scales[slot] * weight)
        outs.append(row.to(base.dtype))
    return torch.stack(outs) if outs else base.clone()


def factors(
    ranks: Sequence[int], columns: int, dtype: torch.dtype, device: str, transposed: bool = False
) -> list[Tensor]:
    """A (r_j, columns) for each rank, or (columns, r_j)."""
    made = [(torch.randn(r, columns, device=device) * columns**-0.5).to(dtype) for r in ranks]
    return [(t.t().contiguous() if transposed else t).requires_grad_() for t in made]


def laid_side_by_side(tensors: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """The same tensors on one shelf for each shape, whose other places hold NaN."""
    alike: dict[torch.Size, list[int]] = {}
    for slot, t in enumerate(tensors):
        alike.setdefault(t.shape, []).append(slot)
    moved = list(tensors)
    for shape, slots in alike.items():
        shelf = Shelf(max(places[slot] for slot in slots) + 1, shape, tensors[0].dtype)
        shelf.stack.fill_(float("nan"))
        for slot in slots:
            moved[slot] = shelf.tensor(places[slot]).copy_(tensors[slot].detach())
        _shelves.append(shelf)
    return moved


_shelves: list[Shelf] = []  # a shelf that nobody keeps is not found any more


def grads(tensors: Sequence[Any]) -> list[Tensor]:
    return [t.grad for t in tensors if isinstance(t, Tensor) and t.requires_grad]
