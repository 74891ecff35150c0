"""Kernels of fastpeft_kernels.dropout."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._numerics import keep, round_to
from fastpeft_kernels.reference import KEEP_LEVELS, keep_level, mask_words

BLOCK_WORDS = 256  # 8192 mask bits a program
BLOCK_M, BLOCK_C = 32, 128
DIGITS = tl.constexpr(KEEP_LEVELS.bit_length() - 1)


@triton.jit
def _draw_kernel(
    seed_ptr, mask_ptr,  # (1,) int64, (words,) int32
    words, level,
    BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Bit-sliced Bernoulli: from the lowest digit of `level` up, a 1 takes acc | random, a 0 acc & random.

    The counter is the word's index, so that the mask does not depend on the block size; four words a Philox call.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    seed = tl.load(seed_ptr)
    zero = offs * 0
    acc = tl.zeros((BLOCK_WORDS,), tl.uint32)
    for quad in tl.static_range(DIGITS // 4):
        draws = tl.philox(
            seed, offs.to(tl.uint32), (offs >> 32).to(tl.uint32), (zero + quad).to(tl.uint32), zero.to(tl.uint32)
        )
        for lane in tl.static_range(4):
            digit = (level >> (4 * quad + lane)) & 1
            acc = tl.where(digit != 0, acc | draws[lane], acc & draws[lane])
    tl.store(mask_ptr + offs, acc.to(tl.int32, bitcast=True), mask=offs < words)


def draw_mask(M: int, K: int, p: float, device: torch.device) -> Tensor:
    """The seed comes from torch's generator on the device: no host sync, right under CUDA graphs and checkpointing."""
    level, words = keep_level(p), M * mask_words(K)
    if level == KEEP_LEVELS:
        return torch.full((M, mask_words(K)), -1, dtype=torch.int32, device=device)
    mask = torch.empty((M, mask_words(K)), dtype=torch.int32, device=device)
    if words:
        seed = torch.empty(1, dtype=torch.int64, device=device).random_()
        with torch.cuda.device_of(mask):
            _draw_kernel[(triton.cdiv(words, BLOCK_WORDS),)](seed, mask, words, level, BLOCK_WORDS)
    return mask


@triton.jit
def _dropout_kernel(
    x_ptr, mask_ptr, out_ptr,  # (M, K), (M, ⌈K / 32⌉), (M, K)
    M, K, scale,
    stride_xm, stride_xk, stride_mask,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=inside, other=0.0)
    x = keep(x.to(tl.float32) * scale, mask_ptr, stride_mask, offs_m, offs_k, inside)
    out_ptrs = out_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(out_ptrs, round_to(x, out_ptr.dtype.element_ty), mask=inside)


def dropout(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    M, K = x.shape
    out = torch.empty((M, K), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(K, BLOCK_C))
        with torch.cuda.device_of(x):
            _dropout_kernel[grid](x, mask, out, M, K, scale, *x.stride(), mask.stride(0), BLOCK_M, BLOCK_C)
    return out


def compile_cases() -> Iterator[CompileCase]:
    yield CompileCase(
        "draw", _draw_kernel,
        {"seed_ptr": "*i64", "mask_ptr": "*i32", "words": "i32", "level": "i32", "BLOCK_WORDS": "constexpr"},
        {"BLOCK_WORDS": BLOCK_WORDS}, uses_matrix=False,
    )  # fmt: skip
    for dtype in ("bf16", "fp16", "fp32"):
        yield CompileCase(
            f"dropout-{dtype}", _dropout_kernel,
            {
                "x_ptr": f"*{dtype}", "mask_ptr": "*i32", "out_ptr": f"*{dtype}", "M": "i32", "K": "i32",
                "scale": "fp32", "stride_xm": "i32", "stride_xk": "i32", "stride_mask": "i32",
                "BLOCK_M": "constexpr", "BLOCK_C": "constexpr",
            },
            {"BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C}, uses_matrix=False,
        )  # fmt: skip
