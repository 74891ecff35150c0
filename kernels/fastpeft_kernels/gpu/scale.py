"""Kernels of fastpeft_kernels.scale. A frozen linear's own products are the vendor library's.

Bytes in 16 bits, counted in tests/kernels/test_scale_budget.py: 4MN forward; 6MN backward, or 4MN where only one of dx
and dscale is asked for. In front of a linear the same with K for N. Launches: one forward; one backward, and one that
sums the planes of dscale.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._numerics import round_to

BLOCK_M, BLOCK_N, WARPS = 32, 128, 8  # 16 elements a thread; with 32 the backward spills on sm_80
MOST_PLANES = 64  # row splits of the backward: at most 64 x N fp32 partial sums, no atomics


@triton.jit
def _forward_kernel(
    x_ptr, scale_ptr, out_ptr,  # (M, N), (N,), (M, N)
    M, N,
    stride_xm, stride_xn, stride_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    scale = tl.load(scale_ptr + offs_n * stride_s, mask=mask_n, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn, mask=mask, other=0.0)
    out = round_to(x.to(tl.float32) * scale[None, :], out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out, mask=mask)


@triton.jit
def _backward_kernel(
    dout_ptr, x_ptr, scale_ptr, dx_ptr, plane_ptr,  # (M, N) x2, (N,), (M, N), (planes, N)
    M, N, rows,  # rows of x that one plane sums
    stride_dm, stride_dn, stride_xm, stride_xn, stride_s,
    NEED_DX: tl.constexpr, NEED_DSCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx may be dout itself: an element is read and written by one program, in this order."""
    plane = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    end = tl.minimum(M, (plane + 1) * rows)
    scale = tl.load(scale_ptr + offs_n * stride_s, mask=mask_n, other=0.0).to(tl.float32)
    dscale = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(plane * rows, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m < end)[:, None] & mask_n[None, :]
        dout_ptrs = dout_ptr + offs_m[:, None] * stride_dm + offs_n[None, :] * stride_dn
        dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)
        if NEED_DSCALE:
            x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn
            dscale += tl.sum(dout * tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32), axis=0)
        if NEED_DX:
            dx = round_to(dout * scale[None, :], dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx, mask=mask)
    if NEED_DSCALE:
        tl.store(plane_ptr + plane * N + offs_n, dscale, mask=mask_n)


def scale_columns(x: Tensor, scale: Tensor) -> Tensor:
    (M, N), scale = x.shape, scale.reshape(-1)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))
        with torch.cuda.device_of(x):
            _forward_kernel[grid](x, scale, out, M, N, *x.stride(), *scale.stride(), BLOCK_M, BLOCK_N, num_warps=WARPS)
    return out


def scale_columns_backward(dout: Tensor, x: Tensor | None, scale: Tensor, need_dx: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty(dout.shape if need_dx else 0, dtype=dout.dtype, device=dout.device)
    return dx, _gradients(dout, x, scale, dx if need_dx else None)


def _gradients(dout: Tensor, x: Tensor | None, scale: Tensor, dx: Tensor | None) -> Tensor:
    """dscale in scale's shape, or of shape (0,) without x; dx, which may be dout, is written where it is given."""
    (M, N), flat = dout.shape, scale.reshape(-1)
    rows = triton.cdiv(triton.cdiv(max(M, 1), MOST_PLANES), BLOCK_M) * BLOCK_M
    planes = torch.empty((triton.cdiv(M, rows), 0 if x is None else N), dtype=torch.float32, device=dout.device)
    if dout.numel():
        grid = (len(planes), triton.cdiv(N, BLOCK_N))
        with torch.cuda.device_of(dout):
            _backward_kernel[grid](
                dout, dout if x is None else x, flat, dout if dx is None else dx, planes, M, N, rows,
                *dout.stride(), *((0, 0) if x is None else x.stride()), *flat.stride(),
                dx is not None, x is not None, BLOCK_M, BLOCK_N, num_warps=WARPS,
            )  # fmt: skip
    return scale.new_empty(0) if x is None else planes.sum(0).to(scale.dtype).view(scale.shape)


def scale_linear(x: Tensor, scale: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(scale_columns(x, scale), W, bias)


def scale_linear_backward(
    dout: Tensor, x: Tensor | None, scale: Tensor, W: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor]:
    g = torch.mm(dout, W)  # ours alone: dx takes its place
    dscale = _gradients(g, x, scale, g if need_dx else None)
    return g if need_dx else dout.new_empty(0), dscale


def compile_cases() -> Iterator[CompileCase]:
    constexprs: dict[str, object] = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    for wide, narrow in (("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")):
        pointers = {f"{name}_ptr": f"*{wide}" for name in ("dout", "x", "dx", "out")}
        pointers |= {"scale_ptr": f"*{narrow}", "plane_ptr": "*fp32"}
        yield CompileCase(
            f"scale-forward-{wide}-{narrow}", _forward_kernel, _signature(_forward_kernel, pointers, constexprs),
            constexprs, WARPS, uses_matrix=False,
        )  # fmt: skip
        for need_dx, need_dscale in ((True, True), (True, False), (False, True)):
            flags = constexprs | {"NEED_DX": need_dx, "NEED_DSCALE": need_dscale}
            parts = "-dx" * need_dx + "-dscale" * need_dscale
            yield CompileCase(
                f"scale-backward{parts}-{wide}-{narrow}", _backward_kernel,
                _signature(_backward_kernel, pointers, flags), flags, WARPS, uses_matrix=False,
            )  # fmt: skip


def _signature(fn: triton.JITFunction, pointers: dict[str, str], constexprs: dict[str, object]) -> dict[str, str]:
    return {name: "constexpr" if name in constexprs else pointers.get(name, "i32") for name in fn.arg_names}
