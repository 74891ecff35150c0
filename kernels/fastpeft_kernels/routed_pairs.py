"""Routed LoRA in plain torch, both products of a pair at once: what joint training runs on, for batches of routed_even.

It is bound by the number of operators and by what Python does between them. So forward finds the factors' stacks for
both products and for backward, and S stays as the products give it: a tensor for each run of slots, transposed. Rows of
fewer than 16 numbers, as (L, r) and (N, r) have, cost the library up to four times what it takes for the same product
transposed (MKL on an EPYC, fp32, 4 slots of rank 8 with 32 rows, 192 and 512 columns).
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft_kernels.masks import apply_mask
from fastpeft_kernels.routed_even import FEW_OF_A_RANK, is_worth_it, padded
from fastpeft_kernels.routed_passes import passes_of
from fastpeft_kernels.side_by_side import side_by_side

SHORT = 16  # rows of fewer numbers are short


class Run(NamedTuple):
    """Slots begin to end, of one rank or padded to it."""

    begin: int
    end: int
    A: Tensor  # (n, R, K)
    B: Tensor  # (n, N, R)
    scales: Tensor  # (n, 1, 1)


class Pairs:
    """What a backward takes over from its forward."""

    def __init__(self, slots: Sequence[int], ranks: Sequence[int], scales: Sequence[float]) -> None:
        """
        Args:
            slots: those that have rows, in order.
            ranks, scales: of these.
        """
        self._slots, self._scales = slots, tuple(scales)
        changes = [i for i in range(1, len(ranks)) if ranks[i] != ranks[i - 1]]
        self._bounds = [0, *(changes if len(changes) < len(ranks) // FEW_OF_A_RANK else []), len(ranks)]
        self._runs: list[Run] = []  # views of the factors at these addresses
        self._addresses: list[int] = []

    def forward(
        self, base: Tensor, x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(base + scale · drop(x) Aᵀ Bᵀ, S of each run): (M, N) in base's dtype, rounded once, and (n, R, L)."""
        dtype = As[0].dtype
        lines = self._by_slot(x if mask is None else apply_mask(x, mask), dtype)
        total = base.to(dtype, copy=True, memory_format=torch.contiguous_format)
        sums = self._by_slot(total, dtype)
        Ss = []
        for begin, end, A, B, scales in self._runs_of(As, Bs):
            S = torch.bmm(A, lines[begin:end].mT).mul_(scales)
            sums[begin:end].baddbmm_(S.mT, B.mT)
            Ss.append(S)
        return total.to(base.dtype), Ss

    def backward(
        self,
        dout: Tensor,
        x: Tensor,
        Ss: Sequence[Tensor],
        As: Sequence[Tensor],
        Bs: Sequence[Tensor],
        mask: Tensor | None,
        need_dx: bool,
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """(dx, [dA_j], [dB_j]), of slots without rows zeros; no dx where it is not needed."""
        dtype = As[0].dtype
        douts = self._by_slot(dout, dtype)
        lines = self._by_slot(x if mask is None else apply_mask(x, mask), dtype)
        wide = torch.empty_like(lines) if need_dx else None
        dAs: list[Tensor] = []
        dBs: list[Tensor] = []
        for (begin, end, A, B, scales), S in zip(self._runs_of(As, Bs), Ss, strict=True):
            part = douts[begin:end]
            dS = torch.bmm(B.mT, part.mT).mul_(scales)  # (n, R, L)
            dAs += torch.bmm(dS, lines[begin:end]).unbind()
            dBs += (torch.bmm(S, part).mT.contiguous() if S.shape[1] < SHORT else torch.bmm(part.mT, S.mT)).unbind()
            if wide is not None:
                torch.bmm(dS.mT, A, out=wide[begin:end])
        dx = None if wide is None else wide.view(x.shape).to(x.dtype)
        if dx is not None and mask is not None:
            dx = apply_mask(dx, mask, out=dx)
        return dx, self._of_all(dAs, As), self._of_all(dBs, Bs)

    def _by_slot(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """(n L, columns) -> (n, L, columns), a view of rows that are contiguous and of that dtype."""
        return rows.to(dtype).contiguous().view(len(self._slots), -1, rows.shape[1])

    def _runs_of(self, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> list[Run]:
        """Those of the forward, unless the factors were moved, or hooks gave copies of what was saved for backward."""
        addresses = [*map(Tensor.data_ptr, As), *map(Tensor.data_ptr, Bs)]
        if addresses == self._addresses:
            return self._runs
        runs, are_views = [], True
        for begin, end in pairwise(self._bounds):
            own_As, own_Bs = ([factors[slot] for slot in self._slots[begin:end]] for factors in (As, Bs))
            A, B = _stack_in_place(own_As), _stack_in_place(own_Bs)
            are_views = are_views and A is not None and B is not None
            A, B = padded(own_As, 0) if A is None else A, padded(own_Bs, 1) if B is None else B
            runs.append(Run(begin, end, A, B, _kept_scales(self._scales[begin:end], A.dtype, A.device)))
        if are_views:  # copies would be a second set of factors
            self._runs, self._addresses = runs, addresses
        return runs

    def _of_all(self, found: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of all slots' factors, given those of ours, without their padding."""
        grads: list[Tensor | None] = [None] * len(factors)
        for slot, grad in zip(self._slots, found, strict=True):
            shape = factors[slot].shape
            grads[slot] = grad if grad.shape == shape else grad[: shape[0], : shape[1]].contiguous()
        return [f.new_zeros(f.shape) if grad is None else grad for f, grad in zip(factors, grads, strict=True)]


def pairs_for(
    base: Tensor,
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
) -> Pairs | None:
    """For a batch without weights; None where it is not one of routed_even's."""
    factors_dtype = As[0].dtype
    if len(rows) != 1 or torch.promote_types(base.dtype, factors_dtype) != factors_dtype:
        return None
    taken = passes_of(rows, starts)[0]
    if not taken.is_even:
        return None
    slots = [segment.slot for segment in taken.segments]
    ranks = [As[slot].shape[0] for slot in slots]
    if not is_worth_it(x.shape[0], max(x.shape[1], base.shape[1]), ranks):
        return None
    return Pairs(slots, ranks, [scales[slot] for slot in slots])


def _stack_in_place(factors: Sequence[Tensor]) -> Tensor | None:
    """Factors that lie side by side in memory, in order, as one tensor."""
    together = side_by_side(factors)
    in_order = together is not None and together.places == tuple(range(len(factors)))
    return together.stack if together is not None and in_order else None


@functools.lru_cache(64)  # every layer of a model asks for the same
def _kept_scales(scales: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(scales, dtype=dtype, device=device).view(-1, 1, 1)
