"""Kernels of fastpeft_kernels.lora that make an M-sized output or S: both passes of the forward.

shrink   S = scale · drop(x) Aᵀ      one pass over x, drawing the mask or reading it; few rows split K over planes
expand   out = base + drop(S Bᵀ)     one pass over out; sums the planes of S where there are any
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._numerics import exact_product, keep, product_for, round_to
from fastpeft_kernels.gpu._planes import sum_planes
from fastpeft_kernels.gpu.dropout import drawn
from fastpeft_kernels.masks import Draw, written
from fastpeft_kernels.tiles import split_columns, tile


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, mask_ptr, seed_ptr, s_ptr,  # (M, K), (r, K), (M, ⌈K / 32⌉), (1,) int64, (splits, M, r)
    M, K, r, k_per_split, level, scale,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_mask,
    HAS_MASK: tl.constexpr, DRAWS: tl.constexpr,  # DRAWS: the mask is drawn here and written
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = (offs_m < M)[:, None], offs_r < r
    end = tl.minimum(K, (split + 1) * k_per_split)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DRAWS:
        seed = tl.load(seed_ptr)
    for start in range(split * k_per_split, end, BLOCK_C):
        offs_k = start + tl.arange(0, BLOCK_C)
        inside = mask_m & (offs_k < end)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=inside, other=0.0)
        if DRAWS:
            bits = drawn(
                mask_ptr, stride_mask, seed, level, offs_m, start, mask_m, end, tl.program_id(2) == 0,
                BLOCK_M, BLOCK_C,
            )  # fmt: skip
            x = tl.where(bits, x, tl.zeros_like(x))
        elif HAS_MASK:
            x = keep(x, mask_ptr, stride_mask, offs_m, offs_k, inside)
        a_ptrs = a_ptr + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak
        a = tl.load(a_ptrs, mask=mask_r[None, :] & (offs_k < end)[:, None], other=0.0)  # (BLOCK_C, BLOCK_R)
        acc = exact_product(x, a, acc)
    s_ptrs = s_ptr + (split * M + offs_m)[:, None] * r + offs_r[None, :]
    tl.store(s_ptrs, round_to(acc * scale, s_ptr.dtype.element_ty), mask=mask_m & mask_r[None, :])


def shrink_planes(x: Tensor, A: Tensor, mask: Tensor | Draw | None, scale: float) -> Tensor:
    """S = scale · drop(x) Aᵀ: (1, M, r) in A's dtype, or fp32 planes (splits, M, r) whose sum is S.

    Few rows split K, so that the whole GPU reads x. A mask that is yet to be drawn is drawn and written in this pass.
    """
    (M, K), r = x.shape, A.shape[0]
    draws, bits = isinstance(mask, Draw), written(mask)
    seed, level = mask[1:] if isinstance(mask, Draw) else (x, 0)
    t = tile("drawing_shrink" if draws else "shrink", r)
    row_blocks, splits, k_per_split = split_columns(M, K, t)
    S = torch.empty((splits, M, r), dtype=A.dtype if splits == 1 else torch.float32, device=x.device)
    if S.numel():
        with torch.cuda.device_of(x):
            _shrink_kernel[(row_blocks, splits, triton.cdiv(r, t.BLOCK_R))](
                x, A, x if bits is None else bits, seed, S, M, K, r, k_per_split, level, scale,
                *x.stride(), *A.stride(), 0 if bits is None else bits.stride(0), bits is not None, draws,
                t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return S


def shrink(x: Tensor, A: Tensor, mask: Tensor | Draw | None, scale: float) -> Tensor:
    """S = scale · drop(x) Aᵀ: (M, r) in A's dtype."""
    return sum_planes(shrink_planes(x, A, mask, scale), dtype=A.dtype)[0]


@triton.jit
def _expand_kernel(
    base_ptr, bias_ptr, s_ptr, total_ptr, b_ptr, mask_ptr, out_ptr,
    # (M, N), (N,), (splits, M, r), (M, r), (N, r), (M, ⌈N / 32⌉), (M, N); rows of S and its total contiguous
    M, N, r, splits,
    stride_basem, stride_basen, stride_bias, stride_sp, stride_sm, stride_tm, stride_bn, stride_br, stride_mask,
    HAS_PLANES: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_n = (offs_m < M)[:, None], offs_n < N
    inside = mask_m & mask_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, r, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        offs_s, mask_s = offs_m[:, None] * stride_sm + offs_r[None, :], mask_m & (offs_r < r)[None, :]
        s = tl.load(s_ptr + offs_s, mask=mask_s, other=0.0)
        if HAS_PLANES:
            for split in range(1, splits):
                s += tl.load(s_ptr + split * stride_sp + offs_s, mask=mask_s, other=0.0)
            s = round_to(s, total_ptr.dtype.element_ty)
            total_ptrs = total_ptr + offs_m[:, None] * stride_tm + offs_r[None, :]
            tl.store(total_ptrs, s, mask=mask_s & (tl.program_id(1) == 0))
        b_ptrs = b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br
        b = tl.load(b_ptrs, mask=mask_n[None, :] & (offs_r < r)[:, None], other=0.0)  # (BLOCK_R, BLOCK_C)
        acc = product_for(s, b, acc, dtype)
    if HAS_MASK:
        acc = keep(acc, mask_ptr, stride_mask, offs_m, offs_n, inside)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BASE:
        base_ptrs = base_ptr + offs_m[:, None] * stride_basem + offs_n[None, :] * stride_basen
        acc += tl.load(base_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], round_to(acc, dtype), mask=inside)


def expand_planes(
    S: Tensor,
    B: Tensor,
    dtype: torch.dtype,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(base + bias + drop(S Bᵀ), S), each of base and bias where given: (M, N) in `dtype`, rounded once, and (M, r).

    S is (1, M, r) in B's dtype or fp32 planes (splits, M, r); the S that is returned is their sum in B's dtype, written
    to `total` where there are planes and it is given. Rows of both are contiguous; they may be slices of columns.
    """
    (splits, M, r), N = S.shape, B.shape[0]
    t = tile("expand", r)
    out = torch.empty((M, N), dtype=dtype, device=S.device)
    if splits == 1:
        total = S[0]
    elif total is None:
        total = torch.empty((M, r), dtype=B.dtype, device=S.device)
    if out.numel():
        grid = (triton.cdiv(M, t.BLOCK_M), triton.cdiv(N, t.BLOCK_C))
        with torch.cuda.device_of(S):
            _expand_kernel[grid](
                S if base is None else base, S if bias is None else bias, S, total, B, S if mask is None else mask, out,
                M, N, r, splits,
                *((0, 0) if base is None else base.stride()), 0 if bias is None else bias.stride(0),
                S.stride(0), S.stride(1), total.stride(0), *B.stride(), 0 if mask is None else mask.stride(0),
                splits > 1, base is not None, bias is not None, mask is not None,
                t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return out, total


def expand(
    S: Tensor,
    B: Tensor,
    dtype: torch.dtype,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """base + bias + drop(S Bᵀ), where given: (M, N) in `dtype`, rounded once. S has contiguous rows."""
    return expand_planes(S.unsqueeze(0), B, dtype, base, bias, mask)[0]
