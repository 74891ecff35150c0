"""Kernels of fastpeft_kernels.dropout."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._numerics import keep, round_to
from fastpeft_kernels.masks import KEEP_LEVELS, begin_draw

BLOCK_WORDS = 256  # 8192 mask bits a program
BLOCK_M, BLOCK_C = 32, 128
DIGITS = tl.constexpr(KEEP_LEVELS.bit_length() - 1)


@triton.jit
def draw_words(seed, index, level):
    """Words number `index` (int64, any shape) of a mask: uint32, each bit 1 with probability level / KEEP_LEVELS.

    Bit-sliced Bernoulli: from the lowest digit of `level` up, a 1 takes acc | random, a 0 acc & random. The counter is
    the word's index, so that a mask depends on no tile and no kernel; four digits a Philox call.
    """
    low, high, zero = index.to(tl.uint32), (index >> 32).to(tl.uint32), (index * 0).to(tl.uint32)
    acc = zero
    for quad in tl.static_range(DIGITS // 4):
        draws = tl.philox(seed, low, high, zero + quad, zero)
        for lane in tl.static_range(4):
            digit = (level >> (4 * quad + lane)) & 1
            acc = tl.where(digit != 0, acc | draws[lane], acc & draws[lane])
    return tl.where(level >> DIGITS != 0, tl.full(acc.shape, 0xFFFFFFFF, tl.uint32), acc)  # the highest level keeps all


@triton.jit
def _draw_kernel(
    seed_ptr, mask_ptr,  # (1,) int64, (words,) int32
    words, level,
    BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    drawn = draw_words(tl.load(seed_ptr), offs, level)
    tl.store(mask_ptr + offs, drawn.to(tl.int32, bitcast=True), mask=offs < words)


@triton.jit
def drawn(
    mask_ptr, stride_mask, seed, level, offs_m, start, inside_m, end, writes,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Where a tile keeps its elements, by words drawn here and, if `writes`, stored: (BLOCK_M, BLOCK_C) bool.

    The tile begins at column `start`, a multiple of 32; the mask is contiguous.
    """
    WORDS: tl.constexpr = BLOCK_C // 32
    place = tl.arange(0, WORDS)[None, :]
    offs = offs_m[:, None] * stride_mask + start // 32 + place
    words = draw_words(seed, offs, level).to(tl.int32, bitcast=True)  # (BLOCK_M, WORDS)
    # An identity: without it the compiler draws every word anew for each of the 32 columns.
    words = tl.gather(words, tl.broadcast_to(place, (BLOCK_M, WORDS)), 1)
    tl.store(mask_ptr + offs, words, mask=inside_m & (start + 32 * place < end) & writes)
    words = tl.broadcast_to(words[:, :, None], (BLOCK_M, WORDS, 32)).reshape(BLOCK_M, BLOCK_C)
    return (words >> (tl.arange(0, BLOCK_C) % 32)[None, :]) & 1 != 0


def draw_mask(M: int, K: int, p: float, device: torch.device) -> Tensor:
    mask, seed, level = begin_draw(M, K, p, device)
    if words := mask.numel():
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
