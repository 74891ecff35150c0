"""The bank of a routed batch: a table on the device of where each slot's own tensors lie, and how kernels read it.

A line of the table is one slot, the last line belongs to the rows without an entry (rank 0). Nothing is copied or
padded: ranks, strides and scales may differ from slot to slot. The table is made of Python numbers and kept by them, so
that it can never be stale: other addresses are another table.
"""

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TABLES = 4096  # kept at once, a few hundred bytes each: one for each factor of each layer

# Fields of a line, all int64. The scale is the bits of an fp32; FIRST is the sum of the ranks of the slots before.
ADDRESS, RANK, STRIDE_R, STRIDE_C, SCALE, FIRST = (tl.constexpr(i) for i in range(6))
FIELDS = tl.constexpr(6)

# How all factors of a table lie in memory: (r, C) row by row, (C, r) row by row, or each as its strides say.
BY_RANK, BY_COLUMN, BY_STRIDES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

BLOCK_A = tl.constexpr(128)  # slots that are looked at together


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, eq=False)
class Bank:
    """A table, and what launchers must know of it.

    Attributes:
        table: (slots + 1, FIELDS) int64.
        dtype: the factors', as Triton calls it.
        layout: BY_RANK, BY_COLUMN or BY_STRIDES.
        aligned: rows of every factor begin at multiples of 16 bytes as far as addresses and ranks decide it.
        largest: R, the largest rank.
        total: the sum of all ranks.
        host: what the table is copied from, at its leisure.
        ready: on a GPU, recorded behind that copy.
        streams: those that have waited for it.
    """

    table: Tensor
    dtype: tl.dtype
    layout: int
    aligned: bool
    largest: int
    total: int
    host: Tensor
    ready: torch.cuda.Event | None
    streams: set[int] = field(default_factory=set)

    @property
    def slots(self) -> int:
        return len(self.table) - 1


Line = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, shape and strides of a slot's tensor


def factor_bank(factors: Sequence[Tensor], rank_dim: int, scales: Sequence[float] | None = None) -> Bank:
    """The bank of matrices whose dimension `rank_dim` is the rank: 0 for lora_A (r, C), 1 for lora_B (C, r)."""
    # On the way of every call: as few attribute reads a slot as go.
    lines = tuple([(factor.data_ptr(), factor.shape, factor.stride()) for factor in factors])
    return _kept(factors[0], lines, None if scales is None else tuple(scales), rank_dim)


def vector_bank(vectors: Sequence[Tensor | None]) -> Bank:
    """The bank of (C,), (1, C) or (C, 1) vectors: of rank 1, or 0 at address 0 where a slot has none."""
    like = next(vector for vector in vectors if vector is not None)
    C, lines = like.numel(), list[Line]()
    for vector in vectors:
        if vector is None:
            lines.append((0, (0, C), (0, 0)))
        else:
            lines.append((vector.data_ptr(), (1, C), (C, vector.view(-1).stride(0))))
    return _kept(like, tuple(lines), None, 0)


def _kept(like: Tensor, lines: tuple[Line, ...], scales: tuple[float, ...] | None, rank_dim: int) -> Bank:
    bank = _bank(like.device, like.dtype, lines, scales, rank_dim)
    order(bank)
    return bank


@functools.lru_cache(MOST_TABLES)
def _bank(
    device: torch.device, dtype: torch.dtype, lines: tuple[Line, ...], scales: tuple[float, ...] | None, rank_dim: int
) -> Bank:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "this CUDA graph would be captured with adapters that were never used before: run the step once, as a "
            "warm-up, with the very parameters that it is captured with"
        )
    C = lines[0][1][1 - rank_dim]
    entries = [(address, shape[rank_dim], step[rank_dim], step[1 - rank_dim]) for address, shape, step in lines]
    by_rank = all(stride_r == C and stride_c == 1 for _, r, stride_r, stride_c in entries if r)
    by_column = all(stride_r == 1 and stride_c == r for _, r, stride_r, stride_c in entries if r)
    aligned = all(address % 16 == 0 and (by_rank or r % 8 == 0) for address, r, *_ in entries)
    table, first = [], 0
    for entry, scale in zip([*entries, (0, 0, 0, 0)], [*(scales or [1.0] * len(lines)), 0.0], strict=True):
        table += [*entry, *struct.unpack("<i", struct.pack("<f", scale)), first]
        first += entry[1]
    with torch.inference_mode(False):
        host = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda").view(-1, FIELDS.value)
        moved = host.to(device, non_blocking=True)
    ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    layout = BY_RANK if by_rank else BY_COLUMN if by_column else BY_STRIDES
    largest = max(r for _, r, *_ in entries)
    return Bank(moved, TRITON_DTYPES[dtype], layout.value, aligned, largest, first, host, ready)


_captured: set[Bank] = set()  # CUDA graphs hold addresses of these tables, and nobody tells when a graph is gone


def order(bank: Bank) -> None:
    """Let the current stream wait until the table is there. Before a capture everything is."""
    if bank.ready is None:
        return
    if torch.cuda.is_current_stream_capturing():
        _captured.add(bank)
        return
    stream = torch.cuda.current_stream(bank.table.device)
    if stream.cuda_stream not in bank.streams:
        stream.wait_event(bank.ready)
        bank.table.record_stream(stream)
        bank.streams.add(stream.cuda_stream)


# What kernels do with it.


@triton.jit
def find_tile(starts_ptr, tile, M, A, rows):
    """(slot, first line, the slot's last line + 1) of a tile, where every slot's lines are cut into tiles of `rows`.

    Slot j has the tiles from number starts[j] // rows + j on: never fewer than it needs, some of them empty. Slot A is
    that of the lines without an entry. Numbers reach to M // rows + A: they depend on shapes alone.
    """
    before = tile * 0
    for first in range(0, A + 1, BLOCK_A):
        slots = first + tl.arange(0, BLOCK_A)
        starts = tl.load(starts_ptr + slots, mask=slots <= A, other=0)
        before += tl.sum(((slots <= A) & (starts // rows + slots <= tile)).to(tl.int32), 0)
    slot = before - 1
    start = tl.load(starts_ptr + slot)
    end = tl.load(starts_ptr + slot + 1, mask=slot < A, other=M)
    return slot, start + (tile - start // rows - slot) * rows, end


@triton.jit
def slots_of(starts_ptr, lines, A, BLOCK_S: tl.constexpr):
    """The slot of each line; A where it has no entry."""
    slots = lines * 0
    for first in range(1, A + 1, BLOCK_S):
        offs = first + tl.arange(0, BLOCK_S)
        starts = tl.load(starts_ptr + offs, mask=offs <= A, other=0)
        slots += tl.sum(((starts[None, :] <= lines[:, None]) & (offs <= A)[None, :]).to(tl.int32), 1)
    return slots


@triton.jit
def load_factor(table_ptr, slot, dtype: tl.constexpr, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr):
    """(pointer, rank) of a slot's factor."""
    line = table_ptr + slot * FIELDS
    factor_ptr = tl.load(line + ADDRESS).to(tl.pointer_type(dtype))
    r = tl.load(line + RANK).to(tl.int32)
    if ALIGNED:  # a hint on the address before the cast is lost
        factor_ptr = tl.multiple_of(factor_ptr, 16)
        if LAYOUT != BY_RANK:
            r = tl.multiple_of(r, 8)
    return factor_ptr, r


@triton.jit
def factor_ptrs(table_ptr, slot, factor_ptr, r, i_r, i_c, C, LAYOUT: tl.constexpr):
    """Pointers to the entries (i_r, i_c): indices of rank and column, shaped so that they broadcast."""
    if LAYOUT == BY_RANK:
        return factor_ptr + i_r.to(tl.int64) * C + i_c
    elif LAYOUT == BY_COLUMN:
        return factor_ptr + i_c.to(tl.int64) * r + i_r
    else:
        line = table_ptr + slot * FIELDS
        return factor_ptr + i_r * tl.load(line + STRIDE_R) + i_c * tl.load(line + STRIDE_C)


@triton.jit
def load_scale(table_ptr, slot):
    return tl.load(table_ptr + slot * FIELDS + SCALE).to(tl.int32).to(tl.float32, bitcast=True)
