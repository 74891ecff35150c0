"""Kernels of fastpeft_kernels.dora: what it needs beside the products of fastpeft_kernels.gpu.lora.

    norm      ‖W + s B A‖ of each row               one pass over W, the update never leaves a tile
    scale     factor · (z + S Bᵀ) + bias            one pass over z
    columns   factor · dout and Σ_m dout · z        one pass over both, planes of partial sums over rows, no atomics
    rest      drop(x) and x - c drop(x)             one pass over x

The base products are the vendor library's, as they are for LoRA. Bytes beyond them, forward + backward, 16-bit x, ranks
up to 16, counted in tests/kernels/test_dora_budget.py: 8MK + 12MN + 2NK (shrink reads x; scale reads z and writes out;
norm reads W; columns reads dout and z and writes the scaled dout; the output pass reads dout; the input pass reads x
and writes the C operand of dx, which its product reads). With dropout 20MK + 14MN + 2NK, and MK/8 for each of draw,
rest, input pass and the last mask on dx: each way has a second base product, with a C operand and an input of its own.
Where all of an adapter is frozen the backward reads neither x nor z: columns, shrink and expand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._lora_backward import input_pass, outer_planes, output_pass
from fastpeft_kernels.gpu._lora_forward import expand_planes, shrink, shrink_planes
from fastpeft_kernels.gpu._numerics import exact_product, keep, product_for, round_to
from fastpeft_kernels.gpu._planes import sum_planes
from fastpeft_kernels.gpu.dropout import dropout
from fastpeft_kernels.tiles import ROWS_PER_PLANE, SPLIT_K_BELOW, TILES, rank_class, tile

BLOCK_M, BLOCK_C = 16, 128  # elementwise passes: 2048 elements a step, 16 a thread at 4 warps; 32 spill on sm_100
NORM_N, NORM_K = 32, 64  # tiles of W
NORM_R = 32  # of the rank, at most; higher ranks take several: 64 would spill on sm_80


@triton.jit
def _norm_kernel(
    w_ptr, a_ptr, b_ptr, square_ptr,  # (N, K), (r, K), (N, r), (splits, N)
    N, K, r, k_per_split, scale,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    end = tl.minimum(K, (split + 1) * k_per_split)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(split * k_per_split, end, BLOCK_C):
        offs_k = start + tl.arange(0, BLOCK_C)
        mask_k = offs_k < end
        update = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start_r in range(0, r, BLOCK_R):
            offs_r = start_r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < r
            b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
            a_ptrs = a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :] * stride_ak
            b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_N, BLOCK_R)
            a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)
            update = exact_product(b, a, update)
        w_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
        w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        v = w + scale * update
        square += tl.sum(v * v, axis=1)
    tl.store(square_ptr + split * N + offs_n, square, mask=mask_n)


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · B A‖ of each row: (N,) fp32. Few rows split K over planes, so that the whole GPU reads W."""
    (N, K), r = W.shape, A.shape[0]
    blocks = triton.cdiv(N, NORM_N)
    splits = max(1, min(SPLIT_K_BELOW // max(blocks, 1), triton.cdiv(K, 4 * NORM_K)))
    k_per_split = triton.cdiv(triton.cdiv(K, splits), NORM_K) * NORM_K
    splits = triton.cdiv(K, k_per_split)
    square = torch.empty((splits, N), dtype=torch.float32, device=W.device)
    if square.numel():
        with torch.cuda.device_of(W):
            _norm_kernel[(blocks, splits)](
                W, A, B, square, N, K, r, k_per_split, scaling,
                *W.stride(), *A.stride(), *B.stride(), NORM_N, NORM_K, min(NORM_R, rank_class(r)),
                num_warps=4, num_stages=1,
            )  # fmt: skip
    return square.sum(0).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)


@triton.jit
def _scale_kernel(
    z_ptr, factor_ptr, bias_ptr, s_ptr, b_ptr, out_ptr,  # (M, N), (N,), (N,), (M, r), (N, r), (M, N)
    M, N, r, stride_bias, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
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
    offsets = offs_m[:, None] * N + offs_n[None, :]
    acc += tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    acc *= tl.load(factor_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offsets, round_to(acc, dtype), mask=inside)


def scaled_sum(z: Tensor, S: Tensor, B: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """factor · (z + S Bᵀ) + bias: z (M, N) contiguous, factor (N,) fp32 -> (M, N) in z's dtype, rounded once."""
    (M, N), r = z.shape, S.shape[1]
    t = tile("expand", r)
    out = torch.empty_like(z)
    if out.numel():
        grid = (triton.cdiv(M, t.BLOCK_M), triton.cdiv(N, t.BLOCK_C))
        with torch.cuda.device_of(z):
            _scale_kernel[grid](
                z, factor, z if bias is None else bias, S, B, out, M, N, r,
                0 if bias is None else bias.stride(0), *B.stride(), bias is not None,
                t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
            )  # fmt: skip
    return out


@triton.jit
def _columns_kernel(
    dout_ptr, z_ptr, factor_ptr, scaled_ptr, plane_ptr,  # (M, N) x2, (N,), (M, N), (planes, N)
    M, N, rows,  # rows of dout that one plane sums
    stride_dm, stride_dn,
    HAS_SCALED: tl.constexpr, HAS_TOTAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n = offs_n < N
    factor = tl.load(factor_ptr + offs_n, mask=mask_n, other=0.0)
    end = tl.minimum(M, (plane + 1) * rows)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(plane * rows, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        inside = (offs_m < end)[:, None] & mask_n[None, :]
        offsets = offs_m[:, None] * N + offs_n[None, :]
        dout_ptrs = dout_ptr + offs_m[:, None] * stride_dm + offs_n[None, :] * stride_dn
        dout = tl.load(dout_ptrs, mask=inside, other=0.0).to(tl.float32)
        if HAS_TOTAL:
            total += dout * tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALED:
            scaled = round_to(dout * factor[None, :], scaled_ptr.dtype.element_ty)
            tl.store(scaled_ptr + offsets, scaled, mask=inside)
    if HAS_TOTAL:
        tl.store(plane_ptr + plane * N + offs_n, tl.sum(total, axis=0), mask=mask_n)


def column_pass(dout: Tensor, z: Tensor, factor: Tensor, need_scaled: bool, need_total: bool) -> tuple[Tensor, Tensor]:
    """(factor · dout, Σ_m dout · z): (M, N) in dout's dtype and (N,) fp32; what is not needed is empty."""
    M, N = dout.shape
    scaled = torch.empty((M, N) if need_scaled else 0, dtype=dout.dtype, device=dout.device)
    planes = max(1, triton.cdiv(M, ROWS_PER_PLANE))
    rows = triton.cdiv(triton.cdiv(max(M, 1), planes), BLOCK_M) * BLOCK_M
    partial = torch.empty((planes, N if need_total else 0), dtype=torch.float32, device=dout.device)
    if N and (need_scaled or need_total):
        with torch.cuda.device_of(dout):
            _columns_kernel[(planes, triton.cdiv(N, BLOCK_C))](
                dout, z, factor, scaled, partial, M, N, rows, *dout.stride(),
                need_scaled, need_total, BLOCK_M, BLOCK_C,
            )  # fmt: skip
    return scaled, partial.sum(0)


@triton.jit
def _rest_kernel(
    x_ptr, mask_ptr, dropped_ptr, rest_ptr,  # (M, K), (M, ⌈K / 32⌉), (M, K), (M, K)
    M, K, scale,
    stride_xm, stride_xk, stride_mask,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    offsets = offs_m[:, None] * K + offs_k[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=inside, other=0.0)
    dropped = keep(x, mask_ptr, stride_mask, offs_m, offs_k, inside)
    rest = x.to(tl.float32) - scale * dropped.to(tl.float32)
    tl.store(dropped_ptr + offsets, dropped, mask=inside)
    tl.store(rest_ptr + offsets, round_to(rest, rest_ptr.dtype.element_ty), mask=inside)


def drop_and_rest(x: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(drop(x), x - scale · drop(x)): both (M, K) in x's dtype."""
    M, K = x.shape
    dropped, rest = (torch.empty((M, K), dtype=x.dtype, device=x.device) for _ in range(2))
    if dropped.numel():
        grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(K, BLOCK_C))
        with torch.cuda.device_of(x):
            _rest_kernel[grid](x, mask, dropped, rest, M, K, scale, *x.stride(), mask.stride(0), BLOCK_M, BLOCK_C)
    return dropped, rest


# The ops, with the signatures of fastpeft_kernels.reference_dora.


def dora_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    mask: Tensor | None,
    scaling: float,
    keep_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = dora_norm(W, A, B, scaling)
    factor = magnitude.float() / norm * keep_scale
    dropped, rest = (x, None) if mask is None else drop_and_rest(x, mask, keep_scale)
    S = shrink(dropped, A, None, scaling)
    z = torch.mm(dropped, W.t())
    out = scaled_sum(z, S, B, factor, bias)
    return out if rest is None else out.addmm_(rest, W.t()), S, z, norm


def dora_linear_backward(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    S: Tensor,
    z: Tensor,
    norm: Tensor,
    mask: Tensor | None,
    scaling: float,
    keep_scale: float,
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = magnitude.float() / norm
    factor = (g * keep_scale).unsqueeze(1)
    weighted = (B * factor).to(B.dtype)
    scaled, total = column_pass(dout, z, g if mask is None else (g - 1) * keep_scale, need_dx, need_factors)
    if need_factors:
        dS, T_planes = output_pass(dout, weighted, S, scaling)
        dx, dA_planes = input_pass(x, dS, A, mask) if need_dx else (x.new_empty(0), outer_planes(x, dS, mask))
        dA, T = sum_planes(dA_planes, T_planes, dtype=S.dtype)
        dB = (T * factor).to(B.dtype)
        total += (T.float() * B).sum(1)
        dmagnitude = (total * keep_scale / norm).to(magnitude.dtype)
    else:
        dS_planes = shrink_planes(dout, weighted.t(), None, scaling)
        dx = expand_planes(dS_planes, A.t(), x.dtype, mask=mask)[0] if need_dx else x.new_empty(0)
        dA, dB, dmagnitude = (t.new_empty(0) for t in (A, B, magnitude))
    if not need_dx:
        return dx, dA, dB, dmagnitude
    dx.addmm_(scaled, W)
    if mask is not None:
        dx = dropout(dx, mask, 1.0).addmm_(dout, W)
    return dx, dA, dB, dmagnitude


# What the compile tests build.


def _signature(fn: triton.JITFunction, pointers: dict[str, str], constexprs: dict[str, object]) -> dict[str, str]:
    def kind(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        return f"*{pointers[name]}" if name in pointers else "fp32" if name == "scale" else "i32"

    return {name: kind(name) for name in fn.arg_names}


def _matrix_cases() -> Iterator[CompileCase]:
    for wide, narrow in (("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")):
        pointers = {"w_ptr": wide, "a_ptr": narrow, "b_ptr": narrow, "square_ptr": "fp32", "s_ptr": narrow}
        pointers |= {"z_ptr": wide, "bias_ptr": wide, "out_ptr": wide, "factor_ptr": "fp32"}
        for r in (16, NORM_R):
            blocks: dict[str, object] = {"BLOCK_N": NORM_N, "BLOCK_C": NORM_K, "BLOCK_R": r}
            yield CompileCase(
                f"norm-r{r}-{wide}-{narrow}", _norm_kernel, _signature(_norm_kernel, pointers, blocks), blocks,
                num_stages=1, dot_rows=NORM_N,
            )  # fmt: skip
        for t in TILES["expand"].values():
            blocks = {"HAS_BIAS": True, "BLOCK_M": t.BLOCK_M, "BLOCK_C": t.BLOCK_C, "BLOCK_R": t.BLOCK_R}
            yield CompileCase(
                f"scale-r{t.BLOCK_R}-{wide}-{narrow}", _scale_kernel, _signature(_scale_kernel, pointers, blocks),
                blocks, t.num_warps, t.num_stages, dot_rows=t.BLOCK_M,
            )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    yield from _matrix_cases()
    blocks: dict[str, object] = {"BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C}
    for wide in ("bf16", "fp16", "fp32"):
        pointers = dict.fromkeys(("x_ptr", "z_ptr", "dout_ptr", "scaled_ptr", "dropped_ptr", "rest_ptr"), wide)
        pointers |= {"mask_ptr": "i32", "factor_ptr": "fp32", "plane_ptr": "fp32"}
        for name, fn, constexprs in (
            ("rest", _rest_kernel, blocks),
            ("columns", _columns_kernel, {"HAS_SCALED": True, "HAS_TOTAL": True, **blocks}),
            ("columns-bare", _columns_kernel, {"HAS_SCALED": False, "HAS_TOTAL": True, **blocks}),
            ("columns-frozen", _columns_kernel, {"HAS_SCALED": True, "HAS_TOTAL": False, **blocks}),
        ):
            signature = _signature(fn, pointers, constexprs)
            yield CompileCase(f"{name}-{wide}", fn, signature, constexprs, uses_matrix=False)
