"""Kernels of fastpeft_kernels.lora: three products with a rank-r operand, from which all four ops are made.

    shrink   S = scale · drop(x) Aᵀ      one pass over x
    expand   out = base + drop(S Bᵀ)     one pass over out
    outer    Sᵀ drop(x)                  one pass over x, planes of partial sums over rows, no atomics

The base products are the vendor library's: the low-rank part is written first, as the C operand, and the library
accumulates onto it (beta = 1), so that reading C hides in its epilogue. Or they are our own, with the low-rank part in
the epilogue (gpu/linear.py); tiles.py says where.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._numerics import exact_product, keep, product_for, round_to
from fastpeft_kernels.gpu.linear import linear, takes_product
from fastpeft_kernels.tiles import ROWS_PER_PLANE, SPLIT_K_BELOW, TILES, Kernel, tile


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, mask_ptr, s_ptr,  # (M, K), (r, K), (M, ⌈K / 32⌉), (splits, M, r)
    M, K, r, k_per_split, scale,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_mask,
    HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = (offs_m < M)[:, None], offs_r < r
    end = tl.minimum(K, (split + 1) * k_per_split)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(split * k_per_split, end, BLOCK_C):
        offs_k = start + tl.arange(0, BLOCK_C)
        inside = mask_m & (offs_k < end)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=inside, other=0.0)
        if HAS_MASK:
            x = keep(x, mask_ptr, stride_mask, offs_m, offs_k, inside)
        a_ptrs = a_ptr + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak
        a = tl.load(a_ptrs, mask=mask_r[None, :] & (offs_k < end)[:, None], other=0.0)  # (BLOCK_C, BLOCK_R)
        acc = exact_product(x, a, acc)
    s_ptrs = s_ptr + (split * M + offs_m)[:, None] * r + offs_r[None, :]
    tl.store(s_ptrs, round_to(acc * scale, s_ptr.dtype.element_ty), mask=mask_m & mask_r[None, :])


def shrink(x: Tensor, A: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """S = scale · drop(x) Aᵀ: (M, r) in A's dtype. Few rows split K over planes, so that the whole GPU reads x."""
    (M, K), r = x.shape, A.shape[0]
    t = tile("shrink", r)
    row_blocks, rank_blocks = triton.cdiv(M, t.BLOCK_M), triton.cdiv(r, t.BLOCK_R)
    splits = max(1, min(SPLIT_K_BELOW // max(row_blocks, 1), triton.cdiv(K, 4 * t.BLOCK_C)))
    k_per_split = triton.cdiv(triton.cdiv(K, splits), t.BLOCK_C) * t.BLOCK_C
    splits = triton.cdiv(K, k_per_split)
    S = torch.empty((splits, M, r), dtype=A.dtype if splits == 1 else torch.float32, device=x.device)
    if S.numel():
        with torch.cuda.device_of(x):
            _shrink_kernel[(row_blocks, splits, rank_blocks)](
                x, A, x if mask is None else mask, S, M, K, r, k_per_split, scale,
                *x.stride(), *A.stride(), 0 if mask is None else mask.stride(0),
                mask is not None, t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return S[0] if splits == 1 else S.sum(0).to(A.dtype)


@triton.jit
def _expand_kernel(
    base_ptr, bias_ptr, s_ptr, b_ptr, mask_ptr, out_ptr,  # (M, N), (N,), (M, r), (N, r), (M, ⌈N / 32⌉), (M, N)
    M, N, r,
    stride_basem, stride_basen, stride_bias, stride_bn, stride_br, stride_mask,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
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
        s = tl.load(s_ptr + offs_m[:, None] * r + offs_r[None, :], mask=mask_m & (offs_r < r)[None, :], other=0.0)
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


def expand(
    S: Tensor,
    B: Tensor,
    dtype: torch.dtype,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """base + bias + drop(S Bᵀ), each of base and bias where given: (M, N) in `dtype`, rounded once."""
    (M, r), N = S.shape, B.shape[0]
    t = tile("expand", r)
    out = torch.empty((M, N), dtype=dtype, device=S.device)
    if out.numel():
        grid = (triton.cdiv(M, t.BLOCK_M), triton.cdiv(N, t.BLOCK_C))
        with torch.cuda.device_of(S):
            _expand_kernel[grid](
                S if base is None else base, S if bias is None else bias, S, B, S if mask is None else mask, out,
                M, N, r,
                *((0, 0) if base is None else base.stride()), 0 if bias is None else bias.stride(0), *B.stride(),
                0 if mask is None else mask.stride(0), base is not None, bias is not None, mask is not None,
                t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return out


@triton.jit
def _outer_kernel(
    x_ptr, s_ptr, mask_ptr, plane_ptr,  # (M, K), (M, r), (M, ⌈K / 32⌉), (planes, r, K) by strides
    M, K, r, rows,  # rows of x that one plane sums
    stride_xm, stride_xk, stride_mask, stride_pp, stride_pr, stride_pk,
    HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < r
    end = tl.minimum(M, (plane + 1) * rows)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for start in range(plane * rows, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < end)[:, None]
        inside = mask_m & mask_k[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=inside, other=0.0)
        if HAS_MASK:
            x = keep(x, mask_ptr, stride_mask, offs_m, offs_k, inside)
        s = tl.load(s_ptr + offs_m[:, None] * r + offs_r[None, :], mask=mask_m & mask_r[None, :], other=0.0)
        acc = exact_product(tl.trans(x), s, acc)
    plane_ptrs = plane_ptr + plane * stride_pp + offs_k[:, None] * stride_pk + offs_r[None, :] * stride_pr
    tl.store(plane_ptrs, round_to(acc, plane_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_r[None, :])


def outer(x: Tensor, S: Tensor, mask: Tensor | None, wide_first: bool = False) -> Tensor:
    """Sᵀ drop(x): (r, K) in S's dtype, or its transpose (K, r) with `wide_first`. The same bits on every run."""
    (M, K), r = x.shape, S.shape[1]
    t = tile("outer", r)
    planes = max(1, triton.cdiv(M, ROWS_PER_PLANE))
    rows = triton.cdiv(triton.cdiv(max(M, 1), planes), t.BLOCK_M) * t.BLOCK_M
    shape = (planes, K, r) if wide_first else (planes, r, K)
    partial = torch.empty(shape, dtype=S.dtype if planes == 1 else torch.float32, device=x.device)
    stride_pp, stride_pr, stride_pk = (K * r, 1, r) if wide_first else (K * r, K, 1)
    if partial.numel():
        grid = (planes, triton.cdiv(K, t.BLOCK_C), triton.cdiv(r, t.BLOCK_R))
        with torch.cuda.device_of(x):
            _outer_kernel[grid](
                x, S, x if mask is None else mask, partial, M, K, r, rows,
                *x.stride(), 0 if mask is None else mask.stride(0), stride_pp, stride_pr, stride_pk,
                mask is not None, t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return partial[0] if planes == 1 else partial.sum(0).to(S.dtype)


def base_product(x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias + drop(S Bᵀ): (M, N) in x's dtype. The product of dx is that of dout and Wᵀ."""
    if takes_product(x, W, S):
        return linear(x, W, bias, S, B, mask)
    return expand(S, B, x.dtype, bias=bias, mask=mask).addmm_(x, W.t())


# The ops, with the signatures of fastpeft_kernels.reference.


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    S = shrink(x, A, mask, scale)
    return base_product(x, W, bias, S, B), S


def lora_linear_backward(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dS, dA, dB = _pair_backward(dout, x, B, S, mask, scale)
    dx = base_product(dout, W.t(), None, dS, A.t(), mask) if need_dx else x.new_empty(0)
    return dx, dA, dB


def lora_add(out: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    S = shrink(x, A, mask, scale)
    return expand(S, B, out.dtype, base=out), S


def lora_add_backward(
    dout: Tensor, x: Tensor, A: Tensor, B: Tensor, S: Tensor, mask: Tensor | None, scale: float, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dS, dA, dB = _pair_backward(dout, x, B, S, mask, scale)
    dx = expand(dS, A.t(), x.dtype, mask=mask) if need_dx else x.new_empty(0)
    return dx, dA, dB


def _pair_backward(
    dout: Tensor, x: Tensor, B: Tensor, S: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dS = shrink(dout, B.t(), None, scale)
    return dS, outer(x, dS, mask), outer(dout, S, None, wide_first=True)


# What the compile tests build: every tile, for every mix of dtypes that the ops accept.


def _signature(fn: triton.JITFunction, pointers: dict[str, str], constexprs: dict[str, object]) -> dict[str, str]:
    def kind(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        return f"*{pointers[name]}" if name in pointers else "fp32" if name == "scale" else "i32"

    return {name: kind(name) for name in fn.arg_names}


def compile_cases() -> Iterator[CompileCase]:
    kernels: dict[Kernel, triton.JITFunction] = {
        "shrink": _shrink_kernel, "expand": _expand_kernel, "outer": _outer_kernel
    }  # fmt: skip
    mixes = (("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32"))
    bare = ("bf16", "fp32")  # compiled without mask, base and bias as well; elsewhere the full kernel stands for both
    for (wide, narrow), masked in [*product(mixes, (True,)), (bare, False)]:
        for kernel, fn in kernels.items():
            for t in TILES[kernel].values():
                pointers = {
                    "x_ptr": wide, "base_ptr": wide, "out_ptr": wide, "bias_ptr": wide, "mask_ptr": "i32",
                    "a_ptr": narrow, "b_ptr": narrow, "s_ptr": narrow, "plane_ptr": "fp32",
                }  # fmt: skip
                constexprs: dict[str, object] = {
                    "HAS_MASK": masked, "BLOCK_M": t.BLOCK_M, "BLOCK_C": t.BLOCK_C, "BLOCK_R": t.BLOCK_R,
                }  # fmt: skip
                if kernel == "expand":
                    constexprs |= {"HAS_BASE": masked, "HAS_BIAS": masked}
                yield CompileCase(
                    f"{kernel}-r{t.BLOCK_R}-{wide}-{narrow}{'' if masked else '-bare'}", fn,
                    _signature(fn, pointers, constexprs), constexprs, t.num_warps, t.num_stages,
                    dot_rows=t.BLOCK_C if kernel == "outer" else t.BLOCK_M,
                )  # fmt: skip
