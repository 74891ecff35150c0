"""Kernels of fastpeft_kernels.routed.

    shrink   S = weight · scale · drop(x) A_jᵀ          one pass over x; few rows split K over planes of partial sums;
                                                        one launch for all layers that share x
    expand   out = base + drop(factor · S B_jᵀ)         one pass over out for each pass of the routing
    outer    S_jᵀ drop(x) for every slot j              one pass over x: planes of bands of a slot's rows, and their sum

A program serves rows of one slot, a tile of the lines that `find_tile` gives it: how many there are depends on shapes
alone. Every slot's own rank is gone through in blocks of one size, so that neither tiles nor sums, and so no bit of a
row's result, depend on what other rows carry, on the largest rank, or on the slot's number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._bank import (
    FIELDS,
    FIRST,
    RANK,
    TRITON_DTYPES,
    Bank,
    factor_ptrs,
    find_tile,
    load_factor,
    load_scale,
)
from fastpeft_kernels.gpu._numerics import exact_product, keep, product_for, round_to
from fastpeft_kernels.gpu._planes import store_plane
from fastpeft_kernels.tiles import routed_tile, row_bands, split_columns

SUM_BLOCK = 1024  # elements of a gradient that a program sums over planes


@triton.jit
def _routed_shrink_kernel(
    x_ptr, table_ptr, rows_ptr, starts_ptr, weights_ptr, mask_ptr, s_ptr,
    # (M, K), a bank of (r_j, K), (P, M), (P, A + 1), (P, M), (M, ⌈K / 32⌉), (splits, members, P, M, R)
    M, K, R, A, P, members, rank_blocks, k_per_split,
    stride_xm, stride_xk, stride_mask,
    DTYPE: tl.constexpr, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The bank holds the slots of one member after the other, each of them A."""
    blocks = members * rank_blocks
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks  # those of a tile run together: caches hold x
    member, first_r = block // rank_blocks, block % rank_blocks * BLOCK_R
    p, split = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot, begin, end = find_tile(starts_ptr + p * (A + 1), tile, M, A, BLOCK_M)
    if begin >= end:
        return
    slot = tl.where(slot < A, member * A + slot, members * A)
    a_ptr, r = load_factor(table_ptr, slot, DTYPE, LAYOUT, ALIGNED)
    lines = begin + tl.arange(0, BLOCK_M)
    mask_m = lines < end
    offs_m = tl.load(rows_ptr + p * M + lines, mask=mask_m, other=0).to(tl.int64)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    start_k = split * k_per_split
    end_k = tl.minimum(K, start_k + k_per_split)
    stop = tl.where(first_r < r, end_k, start_k)  # past the slot's rank there is nothing to sum
    for start in range(start_k, stop, BLOCK_C):
        offs_k = start + tl.arange(0, BLOCK_C)
        inside = mask_m[:, None] & (offs_k < end_k)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=inside, other=0.0)
        if HAS_MASK:
            x = keep(x, mask_ptr, stride_mask, offs_m, offs_k, inside)
        a_ptrs = factor_ptrs(table_ptr, slot, a_ptr, r, offs_r[None, :], offs_k[:, None], K, LAYOUT)
        a = tl.load(a_ptrs, mask=(offs_r < r)[None, :] & (offs_k < end_k)[:, None], other=0.0)  # (BLOCK_C, BLOCK_R)
        acc = exact_product(x, a, acc)
    acc *= load_scale(table_ptr, slot)
    if HAS_WEIGHTS:
        acc *= tl.load(weights_ptr + p * M + lines, mask=mask_m, other=0.0)[:, None]
    s_ptrs = s_ptr + (((split * members + member) * P + p) * M + lines)[:, None] * R + offs_r[None, :]
    tl.store(s_ptrs, round_to(acc, s_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_r < R)[None, :])


def routed_shrink_planes(
    x: Tensor,
    bank: Bank,
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    members: int = 1,
) -> Tensor:
    """S by entry: (1, members · P, M, R) in `dtype`, or fp32 planes (splits, members · P, M, R) whose sum is S; R is at
    least the largest rank.

    Few rows split K, so that the whole GPU reads the factors. The bank has the slots of all members, one after the
    other; each member's S has the bits that it has alone.
    """
    (P, M), K, R = rows.shape, x.shape[1], bank.largest
    slots = bank.slots // members
    if members > 1:  # each one's part begins at a multiple of 16 bytes, so that all take the same compiled kernels
        R = triton.cdiv(R, 8) * 8
    t = routed_tile("shrink", M)
    _, splits, k_per_split = split_columns(M, K, t)
    dtype = dtype if splits == 1 else torch.float32
    S = torch.empty((splits, members * P, M, R), dtype=dtype, device=x.device)
    if S.numel():
        rank_blocks = triton.cdiv(R, t.BLOCK_R)
        with torch.cuda.device_of(x):
            _routed_shrink_kernel[(_tiles(M, slots, t.BLOCK_M) * members * rank_blocks, P, splits)](
                x, bank.table, rows, starts, x if weights is None else weights, x if mask is None else mask, S,
                M, K, R, slots, P, members, rank_blocks, k_per_split,
                *x.stride(), 0 if mask is None else mask.stride(0),
                bank.dtype, bank.layout, bank.aligned, weights is not None, mask is not None,
                t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return S


def _tiles(M: int, slots: int, rows: int) -> int:
    """How many numbers `find_tile` may be asked for."""
    return M // rows + slots + 1


@triton.jit
def _routed_expand_kernel(
    base_ptr, s_ptr, table_ptr, rows_ptr, starts_ptr, weights_ptr, mask_ptr, out_ptr,
    # (M, N), (splits, M, R), a bank of (r_j, N), (M,), (A + 1,), (M,), (M, ⌈N / 32⌉), (M, N): of one pass
    M, N, R, A, splits,
    stride_basem, stride_basen, stride_sp, stride_mask,
    DTYPE: tl.constexpr, RESULT: tl.constexpr, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_PLANES: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """RESULT is what the last pass rounds to: passes before it leave fp32, and multiply as exactly as it does."""
    slot, begin, end = find_tile(starts_ptr, tl.program_id(0), M, A, BLOCK_M)
    if begin >= end:
        return
    b_ptr, r = load_factor(table_ptr, slot, DTYPE, LAYOUT, ALIGNED)
    lines = begin + tl.arange(0, BLOCK_M)
    mask_m = lines < end
    offs_m = tl.load(rows_ptr + lines, mask=mask_m, other=0).to(tl.int64)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = mask_m[:, None] & (offs_n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, r, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        s_ptrs = s_ptr + lines.to(tl.int64)[:, None] * R + offs_r[None, :]
        mask_s = mask_m[:, None] & (offs_r < r)[None, :]
        s = tl.load(s_ptrs, mask=mask_s, other=0.0)
        if HAS_PLANES:
            for split in range(1, splits):
                s += tl.load(s_ptrs + split * stride_sp, mask=mask_s, other=0.0)
            s = round_to(s, DTYPE)
        b_ptrs = factor_ptrs(table_ptr, slot, b_ptr, r, offs_r[:, None], offs_n[None, :], N, LAYOUT)
        b = tl.load(b_ptrs, mask=(offs_r < r)[:, None] & (offs_n < N)[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)
        acc = product_for(s, b, acc, RESULT)
    if HAS_SCALE:
        acc *= load_scale(table_ptr, slot)
    if HAS_WEIGHTS:
        acc *= tl.load(weights_ptr + lines, mask=mask_m, other=0.0)[:, None]
    if HAS_MASK:
        acc = keep(acc, mask_ptr, stride_mask, offs_m, offs_n, inside)
    if HAS_BASE:
        base_ptrs = base_ptr + offs_m[:, None] * stride_basem + offs_n[None, :] * stride_basen
        base = tl.load(base_ptrs, mask=inside, other=0.0).to(tl.float32)
        acc = tl.where(r > 0, acc + base, base)  # nothing is added to the rows of nobody: -0 stays -0
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], round_to(acc, out_ptr.dtype.element_ty), mask=inside)


def routed_expand(
    base: Tensor | None,
    S: Tensor,
    bank: Bank,
    rows: Tensor,
    starts: Tensor,
    dtype: torch.dtype,
    N: int,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    scaled: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """base + Σ drop(weight · scale · S B_jᵀ), each where given: (M, N) in `dtype`, added in fp32 and rounded once.

    S is (splits, P, M, R), planes to be summed where there are several; `scaled`: with the bank's scales. One launch a
    pass; all but the last leave fp32. The result is written to `out` where it is given, (M, N) in `dtype` and
    contiguous; it may be the base itself.
    """
    splits, P, M, R = S.shape
    t = routed_tile("expand", M)
    if out is None:
        out = torch.empty((M, N), dtype=dtype, device=S.device)
    if not out.numel():
        return out
    total = out if P == 1 or dtype == torch.float32 else torch.empty((M, N), dtype=torch.float32, device=S.device)
    grid = (_tiles(M, bank.slots, t.BLOCK_M), triton.cdiv(N, t.BLOCK_C))
    for p in range(P):
        written = out if p == P - 1 else total
        with torch.cuda.device_of(S):
            _routed_expand_kernel[grid](
                S if base is None else base, S[:, p], bank.table, rows[p], starts[p],
                S if weights is None else weights[p], S if mask is None else mask, written,
                M, N, R, bank.slots, splits,
                *((0, 0) if base is None else base.stride()), S.stride(0), 0 if mask is None else mask.stride(0),
                bank.dtype, TRITON_DTYPES[dtype], bank.layout, bank.aligned,
                base is not None, splits > 1, scaled, weights is not None, mask is not None,
                t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
        base = written
    return out


@triton.jit
def _routed_outer_kernel(
    x_ptr, s_ptr, table_ptr, rows_ptr, starts_ptr, weights_ptr, mask_ptr, plane_ptr,
    # (M, C), (P, M, R), a bank of (r_j, C), (P, M), (P, A + 1), (P, M), (M, ⌈C / 32⌉), (P, bands, R C)
    M, C, R, A, band, bands, rank_blocks,
    stride_xm, stride_xc, stride_mask,
    HAS_WEIGHTS: tl.constexpr, HAS_MASK: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A plane holds one band of one slot: r_j x C numbers, or its transpose with TRANSPOSED."""
    strip = (tl.program_id(0) // rank_blocks).to(tl.int64)
    first_r = tl.program_id(0) % rank_blocks * BLOCK_R  # blocks of one strip run together: caches hold its tile of x
    number, p = tl.program_id(1), tl.program_id(2)
    slot, begin, end = find_tile(starts_ptr + p * (A + 1), number, M, A, band)
    end = tl.minimum(end, begin + band)
    r = tl.load(table_ptr + slot * FIELDS + RANK).to(tl.int32)
    if begin >= end or first_r >= r:
        return
    offs_c = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_M):
        lines = start + tl.arange(0, BLOCK_M)
        mask_m = lines < end
        offs_m = tl.load(rows_ptr + p * M + lines, mask=mask_m, other=0).to(tl.int64)
        inside = mask_m[:, None] & (offs_c < C)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :] * stride_xc, mask=inside, other=0.0)
        if HAS_MASK:
            x = keep(x, mask_ptr, stride_mask, offs_m, offs_c, inside)
        s_ptrs = s_ptr + (p * M + lines).to(tl.int64)[:, None] * R + offs_r[None, :]
        s = tl.load(s_ptrs, mask=mask_m[:, None] & (offs_r < r)[None, :], other=0.0)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + p * M + lines, mask=mask_m, other=0.0)
            s = round_to(s.to(tl.float32) * weight[:, None], s_ptr.dtype.element_ty)
        acc = exact_product(tl.trans(x), s, acc)
    plane_ptr += (p * bands + number).to(tl.int64) * C * R
    if TRANSPOSED:
        store_plane(plane_ptr, acc, offs_c, offs_r, C, r, r, 1)
    else:
        store_plane(plane_ptr, acc, offs_c, offs_r, C, r, 1, C)


@triton.jit
def _routed_sum_kernel(
    plane_ptr, table_ptr, starts_ptr, out_ptr,  # (P, bands, R C), a bank of (r_j, C), (P, A + 1), (Σ r_j C,)
    size, C, A, P, band, bands,
    SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """A slot's gradient is scale · the sum of its planes; zeros where it has none."""
    block, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    elements = tl.load(table_ptr + slot * FIELDS + RANK) * C
    if block * SUM_BLOCK >= elements:
        return
    offs = block * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    mask = offs < elements
    acc = tl.zeros((SUM_BLOCK,), tl.float32)
    for p in range(P):
        start = tl.load(starts_ptr + p * (A + 1) + slot)
        end = tl.load(starts_ptr + p * (A + 1) + slot + 1)
        first = (start // band + slot).to(tl.int64) + p * bands
        for plane in range(tl.cdiv(end - start, band)):
            acc += tl.load(plane_ptr + (first + plane) * size + offs, mask=mask, other=0.0)
    acc *= load_scale(table_ptr, slot)
    out_ptr += tl.load(table_ptr + slot * FIELDS + FIRST) * C
    tl.store(out_ptr + offs, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


def routed_outer(
    x: Tensor,
    S: Tensor,
    bank: Bank,
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    transposed: bool,
) -> Tensor:
    """The gradients of a bank's factors, scale · Σ weight · S_jᵀ drop(x) over each slot's lines, one after the other in
    S's dtype: (r_1, C), (r_2, C), ..., or their transposes `transposed`. The same bits on every run: no atomics.
    """
    (P, M), C, R = rows.shape, x.shape[1], bank.largest
    t = routed_tile("outer", M)
    strips, rank_blocks = triton.cdiv(C, t.BLOCK_C), triton.cdiv(R, t.BLOCK_R)
    _, band = row_bands(M, strips * rank_blocks, t.BLOCK_M)
    bands = _tiles(M, bank.slots, band)
    planes = torch.empty((P, bands, R * C), dtype=torch.float32, device=x.device)
    if planes.numel():
        with torch.cuda.device_of(x):
            _routed_outer_kernel[(strips * rank_blocks, bands, P)](
                x, S, bank.table, rows, starts, x if weights is None else weights, x if mask is None else mask, planes,
                M, C, R, bank.slots, band, bands, rank_blocks, *x.stride(), 0 if mask is None else mask.stride(0),
                weights is not None, mask is not None, transposed,
                t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return routed_sum(planes, bank, starts, S.dtype, C, band)


def routed_sum(planes: Tensor, bank: Bank, starts: Tensor, dtype: torch.dtype, C: int, band: int) -> Tensor:
    """The sums of planes (P, bands, size) of each slot, at the slot's own size r_j C: (Σ r_j C,) in `dtype`."""
    P, bands, size = planes.shape
    out = torch.empty(bank.total * C, dtype=dtype, device=planes.device)
    if out.numel():
        with torch.cuda.device_of(planes):
            _routed_sum_kernel[(triton.cdiv(size, SUM_BLOCK), bank.slots)](
                planes, bank.table, starts, out, size, C, bank.slots, P, band, bands, SUM_BLOCK
            )
    return out
