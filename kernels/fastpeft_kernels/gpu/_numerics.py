"""Matrix products and roundings that are as exact as the op promises, on a GPU and in Triton's interpreter.

The interpreter multiplies bf16 matrices wrongly and truncates fp32 to bf16 (Triton 3.7.1, 3.9.0): both are mended here
and nowhere else.
"""

import os

import triton
import triton.language as tl
from triton.language.target_info import is_hip

INTERPRETING = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True)  # NaN has no nearest
    return x.to(dtype)


@triton.jit
def _dot16(a, b, acc):
    if INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def exact_product(a, b, acc):
    """acc + a b with the accuracy of fp32: a (M, K), b (K, N), each fp32 or 16 bits wide.

    A bf16 a against an fp32 b takes three bf16 products (b = high + mid + low, all 24 bits of it): the matrix units'
    bf16 rate, where fp32 or tf32x3 would need a widened copy of a. The chunk is summed by itself, then added to acc,
    because the units may truncate inside a long sum: keep K at 64 or less.
    """
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return _dot16(a, b, acc)
    elif a.dtype == tl.bfloat16:
        high = round_to(b, tl.bfloat16)
        rest = b - high.to(tl.float32)
        mid = round_to(rest, tl.bfloat16)
        low = round_to(rest - mid.to(tl.float32), tl.bfloat16)
        chunk = _dot16(a, low, tl.zeros_like(acc))
        chunk = _dot16(a, mid, chunk)
        chunk = _dot16(a, high, chunk)
        return acc + chunk
    else:
        precision: tl.constexpr = "ieee" if is_hip() else "tf32x3"  # AMD has fp32 matrix units and no tf32x3
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=precision)


@triton.jit
def product_for(a, b, acc, dtype: tl.constexpr):
    """acc + a b, for a result that is rounded to `dtype` right afterwards; a and b of one dtype.

    fp32 operands of a bf16 result take two parts each (high high + high low + low high: 16 bits).
    """
    if a.dtype != tl.float32:
        return _dot16(a, b, acc)
    elif dtype == tl.bfloat16:
        a_high, b_high = round_to(a, tl.bfloat16), round_to(b, tl.bfloat16)
        a_low = round_to(a - a_high.to(tl.float32), tl.bfloat16)
        b_low = round_to(b - b_high.to(tl.float32), tl.bfloat16)
        acc = _dot16(a_high, b_low, acc)
        acc = _dot16(a_low, b_high, acc)
        return _dot16(a_high, b_high, acc)
    else:
        precision: tl.constexpr = "ieee" if is_hip() else "tf32x3"
        return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def kept(mask_ptr, stride_mask, offs_m, offs_c, inside):
    """Where the packed mask has a 1: word w of a row holds columns 32 w to 32 w + 31."""
    words = tl.load(mask_ptr + offs_m[:, None] * stride_mask + (offs_c // 32)[None, :], mask=inside, other=0)
    return (words >> (offs_c % 32)[None, :]) & 1 != 0


@triton.jit
def keep(x, mask_ptr, stride_mask, offs_m, offs_c, inside):
    """x where the packed mask has a 1, else 0."""
    return tl.where(kept(mask_ptr, stride_mask, offs_m, offs_c, inside), x, tl.zeros_like(x))
