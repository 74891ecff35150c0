"""A matrix product in good, spilling and oversized tiles, and one that never reaches the matrix units."""

from collections.abc import Iterator

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda

from fastpeft_kernels.gpu._compile import CompileCase


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, out_ptr,  # (M, K), (N, K), (M, N)
    M, N, K, stride_xm, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + (k + offs_k)[None, :], mask=mask_m, other=0.0)
        w = tl.load(w_ptr + offs_n[None, :] * stride_wn + (k + offs_k)[:, None], mask=mask_n, other=0.0)
        acc = tl.dot(x, w, acc)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask_m & mask_n)


@triton.jit
def _slow_product_kernel(x_ptr, w_ptr, out_ptr, K, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(K):
        x, w = tl.load(x_ptr + offs * K + k), tl.load(w_ptr + offs * K + k)
        acc += x[:, None].to(tl.float32) * w[None, :].to(tl.float32)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def _asking_kernel(out_ptr):
    if not is_cuda():
        tl.static_assert(False, "asked: not CUDA")
    if not cuda_capability_geq(9, 0):
        tl.static_assert(False, "asked: older than 9.0")
    tl.store(out_ptr, 1.0)


def _product(name: str, m: int, n: int, k: int, warps: int, stages: int, **more: object) -> CompileCase:
    pointers = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16"}
    sizes = dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn"), "i32")
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    signature = {**pointers, **sizes, **dict.fromkeys(tile, "constexpr")}
    return CompileCase(name, _product_kernel, signature, tile, warps, stages, **more)  # type: ignore[arg-type]


def compile_cases() -> Iterator[CompileCase]:
    yield _product("good", 128, 128, 64, 8, 3)
    yield _product("no-pipeline", 128, 128, 64, 8, 3, pipelined=True)
    yield _product("short", 16, 128, 64, 4, 2, dot_rows=16)
    yield _product("spilling", 256, 256, 32, 4, 2)
    yield _product("oversized", 128, 256, 64, 8, 5)
    signature = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "K": "i32", "BLOCK": "constexpr"}
    yield CompileCase("no-matrix", _slow_product_kernel, signature, {"BLOCK": 64})
    yield CompileCase("broken", _slow_product_kernel, signature, {"BLOCK": 48})
    yield CompileCase("asking", _asking_kernel, {"out_ptr": "*fp32"}, {}, uses_matrix=False)
