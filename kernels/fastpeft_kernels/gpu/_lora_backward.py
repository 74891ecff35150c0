"""Kernels of fastpeft_kernels.lora that sum over rows: the passes of the backward.

    output pass   dS = scale · dout B, dB = doutᵀ S                      one pass over dout
    input pass    dA = dSᵀ drop(x), and dx's low-rank part drop'(dS A)   one pass over x
    outer         Sᵀ drop(x)                                             dA alone, or dB where the output pass is two

A program owns a band of rows and a strip of columns. It keeps the strip's rows of dB (or dA) in registers down the band
and leaves them as one fp32 plane; dS of its strip alone goes to a plane as well, row block by row block.

Bytes of planes, written and read, for bands of R rows and strips of C columns: 8r MN / C of dS and 8r MN / R of dB in
the output pass, 8r MK / R of dA in the input pass. With whole rows in one program dS would need no planes, but then a
band can be no longer than a block of registers (R = 64) and dB costs 8r MN / 64; with the strip alone, dS costs
8r MN / C once and R is as long as the GPU can do with. At M = 8192, K = N = 4096, r = 16 (C = 128, R = 512) that is
34 + 8 MB, and 8 MB or less for dA, beside the 470 MB of 8MK + 6MN: 11 %.

Ranks over 16 read dout twice, by shrink and by outer: 8MK + 8MN (tests/kernels/test_budget.py). One pass saves 2MN and
costs 8r MN / C of planes, so it takes strips of more than 4r columns. At r = 32 and C = 256 it would move 1MN less, 6 %
at K = N. Such a kernel, 64 x 256 with 8 warps, compiles without spills for 9.0 and 10.0 (250 registers), and spills on
8.0. But with fp32 adapters its six bf16 products are 384 FLOP for each element of dout: on an H200 (790 TFLOP/s, 4.3
TB/s) it would have to run at 70 % of the dense rate to be even with the two passes. At r = 64, C = 512 spills
everywhere (16 warps: 870 local loads and stores on 9.0), and C = 256 moves as much as the second read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._lora_forward import expand, shrink
from fastpeft_kernels.gpu._numerics import exact_product, kept, product_for, round_to
from fastpeft_kernels.gpu._planes import store_plane, sum_planes
from fastpeft_kernels.tiles import fused_tile, row_bands, tile

PIECE = tl.constexpr(64)  # columns of one product: `exact_product` sums no more of them at once


@triton.jit
def _load_factor(b_ptr, offs_n, offs_r, stride_bn, N, r):
    mask = (offs_n < N)[:, None] & (offs_r < r)[None, :]
    return tl.load(b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :], mask=mask, other=0.0)


@triton.jit
def _piece(dout_ptr, offs_m, offs_n, stride_dm, inside, b, s, ds, db):
    """dS and dB with the part of one piece of columns added: (BLOCK_M, BLOCK_R), (PIECE, BLOCK_R)."""
    dout = tl.load(dout_ptr + offs_m[:, None] * stride_dm + offs_n[None, :], mask=inside, other=0.0)
    return exact_product(dout, b, ds), exact_product(tl.trans(dout), s, db)


@triton.jit
def _output_pass_kernel(
    dout_ptr, b_ptr, s_ptr, ds_ptr, db_ptr,
    # (M, N), (N, r), (M, r), (strips, M, r), (bands, N, r); rows of dout, B and S contiguous
    M, N, r, rows, scale,
    stride_dm, stride_bn, stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    strip, band = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    left = strip * BLOCK_C + tl.arange(0, PIECE)
    right = left + PIECE
    b_left = _load_factor(b_ptr, left, offs_r, stride_bn, N, r)
    db_left = tl.zeros((PIECE, BLOCK_R), tl.float32)
    if BLOCK_C > PIECE:
        b_right = _load_factor(b_ptr, right, offs_r, stride_bn, N, r)
        db_right = tl.zeros((PIECE, BLOCK_R), tl.float32)
    end = tl.minimum(M, (band + 1) * rows)
    for start in range(band * rows, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < end)[:, None]
        mask_s = mask_m & (offs_r < r)[None, :]
        s = tl.load(s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], mask=mask_s, other=0.0)
        ds = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        ds, db_left = _piece(dout_ptr, offs_m, left, stride_dm, mask_m & (left < N)[None, :], b_left, s, ds, db_left)
        if BLOCK_C > PIECE:
            inside = mask_m & (right < N)[None, :]
            ds, db_right = _piece(dout_ptr, offs_m, right, stride_dm, inside, b_right, s, ds, db_right)
        ds_ptrs = ds_ptr + (strip * M + offs_m)[:, None] * r + offs_r[None, :]
        tl.store(ds_ptrs, round_to(ds * scale, ds_ptr.dtype.element_ty), mask=mask_s)
    db_ptr += band * N * r
    store_plane(db_ptr, db_left, left, offs_r, N, r, r, 1)
    if BLOCK_C > PIECE:
        store_plane(db_ptr, db_right, right, offs_r, N, r, r, 1)


def output_planes(dout: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Planes of dS = scale · dout B: (strips, M, r), and of dB = doutᵀ S: (bands, N, r); fp32 where more than one.

    One pass over dout where the rows of both are contiguous and a tile is listed, else one for each. Rows of S are
    contiguous; it may be a slice of columns.
    """
    (M, N), r = dout.shape, B.shape[1]
    t = fused_tile("output_pass", dout.dtype, S.dtype, r)
    if t is None or dout.stride(1) != 1 or B.stride(1) != 1:
        return shrink(dout, B.t(), None, scale).unsqueeze(0), outer_planes(dout, S, None, wide_first=True)
    strips = triton.cdiv(N, t.BLOCK_C)
    bands, rows = row_bands(M, strips, t.BLOCK_M)
    planes = torch.empty((strips, M, r), dtype=S.dtype if strips == 1 else torch.float32, device=S.device)
    dB = torch.empty((bands, N, r), dtype=S.dtype if bands == 1 else torch.float32, device=S.device)
    if dB.numel():
        with torch.cuda.device_of(dout):
            _output_pass_kernel[(strips, bands)](
                dout, B, S, planes, dB, M, N, r, rows, scale, dout.stride(0), B.stride(0), S.stride(0),
                t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return planes, dB


def output_pass(dout: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`output_planes` with dS summed up: (M, r) in S's dtype."""
    dS, dB = output_planes(dout, B, S, scale)
    return sum_planes(dS, dtype=S.dtype)[0], dB


@triton.jit
def _input_pass_kernel(
    x_ptr, s_ptr, a_ptr, mask_ptr, plane_ptr, dx_ptr,
    # (M, K), (M, r), (r, K), (M, ⌈K / 32⌉), (bands, r, K), (M, K); x's and A's rows contiguous
    M, K, r, rows,
    stride_xm, stride_ar, stride_mask,
    HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = dx_ptr.dtype.element_ty
    strip, band = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_k = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < r
    a_ptrs = a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :]
    a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    end = tl.minimum(M, (band + 1) * rows)
    for start in range(band * rows, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < end)[:, None]
        inside = mask_m & mask_k[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=inside, other=0.0)
        s = tl.load(s_ptr + offs_m[:, None] * r + offs_r[None, :], mask=mask_m & mask_r[None, :], other=0.0)
        dx = product_for(s, a, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), dtype)
        if HAS_MASK:
            bits = kept(mask_ptr, stride_mask, offs_m, offs_k, inside)
            x = tl.where(bits, x, tl.zeros_like(x))
            dx = tl.where(bits, dx, 0.0)
        acc = exact_product(tl.trans(x), s, acc)
        tl.store(dx_ptr + offs_m[:, None] * K + offs_k[None, :], round_to(dx, dtype), mask=inside)
    store_plane(plane_ptr + band * K * r, acc, offs_k, offs_r, K, r, 1, K)


def input_pass(x: Tensor, dS: Tensor, A: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """drop'(dS A): (M, K) in x's dtype, and planes of dA = dSᵀ drop(x): (bands, r, K), fp32 where more than one.

    One pass over x and the mask where the rows of x and A are contiguous and a tile is listed, else one for each.
    """
    (M, K), r = x.shape, A.shape[0]
    t = fused_tile("input_pass", x.dtype, dS.dtype, r)
    if t is None or x.stride(1) != 1 or A.stride(1) != 1:
        return expand(dS, A.t(), x.dtype, mask=mask), outer_planes(x, dS, mask)
    strips = triton.cdiv(K, t.BLOCK_C)
    bands, rows = row_bands(M, strips, t.BLOCK_M)
    planes = torch.empty((bands, r, K), dtype=dS.dtype if bands == 1 else torch.float32, device=x.device)
    dx = torch.empty((M, K), dtype=x.dtype, device=x.device)
    if planes.numel():
        with torch.cuda.device_of(x):
            _input_pass_kernel[(strips, bands)](
                x, dS, A, x if mask is None else mask, planes, dx, M, K, r, rows,
                x.stride(0), A.stride(0), 0 if mask is None else mask.stride(0),
                mask is not None, t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return dx, planes


@triton.jit
def _outer_kernel(
    x_ptr, s_ptr, mask_ptr, plane_ptr,  # (M, K), (M, r), (M, ⌈K / 32⌉), (bands, r, K) by strides; S's rows contiguous
    M, K, r, rows,
    stride_xm, stride_xk, stride_sm, stride_mask, stride_pp, stride_pr, stride_pk,
    HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    strip, band = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_k = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < r
    end = tl.minimum(M, (band + 1) * rows)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for start in range(band * rows, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < end)[:, None]
        inside = mask_m & mask_k[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=inside, other=0.0)
        if HAS_MASK:
            x = tl.where(kept(mask_ptr, stride_mask, offs_m, offs_k, inside), x, tl.zeros_like(x))
        s = tl.load(s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], mask=mask_m & mask_r[None, :], other=0.0)
        acc = exact_product(tl.trans(x), s, acc)
    store_plane(plane_ptr + band * stride_pp, acc, offs_k, offs_r, K, r, stride_pk, stride_pr)


def outer_planes(x: Tensor, S: Tensor, mask: Tensor | None, wide_first: bool = False) -> Tensor:
    """Planes of Sᵀ drop(x): (bands, r, K), fp32 where more than one; of its transpose (K, r) with `wide_first`."""
    (M, K), r = x.shape, S.shape[1]
    t = tile("outer", r)
    strips = triton.cdiv(K, t.BLOCK_C)
    bands, rows = row_bands(M, strips, t.BLOCK_M)
    shape = (bands, K, r) if wide_first else (bands, r, K)
    planes = torch.empty(shape, dtype=S.dtype if bands == 1 else torch.float32, device=x.device)
    stride_pp, stride_pr, stride_pk = (K * r, 1, r) if wide_first else (K * r, K, 1)
    if planes.numel():
        with torch.cuda.device_of(x):
            _outer_kernel[(strips, bands, triton.cdiv(r, t.BLOCK_R))](
                x, S, x if mask is None else mask, planes, M, K, r, rows,
                *x.stride(), S.stride(0), 0 if mask is None else mask.stride(0), stride_pp, stride_pr, stride_pk,
                mask is not None, t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return planes


def outer(x: Tensor, S: Tensor, mask: Tensor | None, wide_first: bool = False) -> Tensor:
    """Sᵀ drop(x): (r, K) in S's dtype, or its transpose (K, r) with `wide_first`. The same bits on every run."""
    return sum_planes(outer_planes(x, S, mask, wide_first), dtype=S.dtype)[0]
