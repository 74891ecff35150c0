"""Every op in plain torch: the specification, and the path on a CPU.

Written for caches. Rows go through in chunks that stay in the second-level cache, are widened to the adapters' dtype
there, and each output is rounded once where it is written; nothing with M rows is ever held in fp32 beside S.

    S    = scale · drop(x) Aᵀ          (M, r)   `shrink`
    out  = x Wᵀ + bias + S Bᵀ          (M, N)   `expand`
    dS   = scale · dout B              (M, r)   `shrink`
    dB   = doutᵀ S                     (N, r)   `outer`
    dA   = dSᵀ drop(x)                 (r, K)   `outer`
    dx   = dout W + drop'(dS A)        (M, K)   `expand`

drop zeroes what the mask drops and no more: its factor 1 / (1 - p) is part of `scale`. LoRA: arXiv:2106.09685,
section 4.1.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 18  # elements of a row chunk: 1 MB once widened to fp32, a second-level cache

MASK_BITS = 32  # columns in one word of a mask
KEEP_LEVELS = 1 << 16  # the probability to keep an element is a multiple of 1 / KEEP_LEVELS


# Dropout masks: one bit an element, bit j of word w is column 32 w + j, 1 keeps.


def keep_level(p: float) -> int:
    """The probability to keep an element under dropout `p`, in units of 1 / KEEP_LEVELS; at least one unit."""
    return max(1, round((1.0 - p) * KEEP_LEVELS))


def mask_words(columns: int) -> int:
    return -(-columns // MASK_BITS)


def draw_mask(M: int, K: int, p: float, device: torch.device) -> Tensor:
    """Independent Bernoulli bits from torch's generator: (M, ⌈K / 32⌉) int32, each bit 1 with probability 1 - p.

    Bit-sliced: from the lowest binary digit of the level up, a 1 takes `acc | word`, a 0 `acc & word`, which makes 64
    draws out of 16 random words. The stock `bernoulli_` takes six times as long on a CPU.
    """
    level, words = keep_level(p), M * mask_words(K)
    acc = torch.full(((words + 1) // 2,), -1 if level == KEEP_LEVELS else 0, dtype=torch.int64, device=device)
    digits = range((level & -level).bit_length() - 1, KEEP_LEVELS.bit_length() - 1)  # zeros at the end change nothing
    for digit in digits:
        word = torch.empty_like(acc).random_(-(1 << 63), None)
        acc = acc.bitwise_or_(word) if level >> digit & 1 else acc.bitwise_and_(word)
    return acc.view(torch.int32)[:words].view(M, mask_words(K))


def _byte_lanes(itemsize: int, device: torch.device) -> Tensor:
    """For each byte of a mask its eight bits as lanes of `itemsize` bytes, all ones or all zeros: (256, itemsize)."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1  # (256, 8)
    return (-bits).to(_LANES[itemsize]).view(torch.int64)


_kept_byte_lanes = functools.cache(_byte_lanes)
_LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask keeps, 0 where it drops (also where x is not finite): (M, K) in x's dtype."""
    M, K = x.shape
    lanes_dtype = _LANES[x.element_size()]
    table = _kept_byte_lanes if type(mask) is Tensor else _byte_lanes  # a fake tensor must not outlive its mode
    indices = mask.contiguous().view(torch.uint8).reshape(-1).int()
    lanes = table(x.element_size(), x.device).index_select(0, indices).view(lanes_dtype)
    return (x.view(lanes_dtype) & lanes.view(M, mask.shape[1] * MASK_BITS)[:, :K]).view(x.dtype)


def dropout(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """scale · drop(x): (M, K) in x's dtype."""
    return apply_mask(x, mask).mul_(scale)


# The low-rank products.


def _row_chunks(M: int, columns: int) -> Iterator[slice]:
    rows = max(64, CHUNK // max(columns, 1) // 64 * 64)
    return (slice(start, start + rows) for start in range(0, M, rows))


def _widened(x: Tensor, rows: slice, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    chunk = x[rows]
    if mask is not None:
        chunk = apply_mask(chunk, mask[rows])
    return chunk.to(dtype)


def shrink(x: Tensor, A: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """S = scale · drop(x) Aᵀ: x (M, K), A (r, K) of any strides -> (M, r) in A's dtype."""
    if mask is None and x.dtype == A.dtype:
        return torch.mm(x, A.t()).mul_(scale)
    S = torch.empty((x.shape[0], A.shape[0]), dtype=A.dtype, device=x.device)
    for rows in _row_chunks(*x.shape):
        torch.mm(_widened(x, rows, mask, A.dtype), A.t(), out=S[rows])
    return S.mul_(scale)


def outer(x: Tensor, S: Tensor, mask: Tensor | None) -> Tensor:
    """Sᵀ drop(x): x (M, K), S (M, r) -> (r, K) in S's dtype."""
    if mask is None and x.dtype == S.dtype:
        return torch.mm(S.t(), x)
    total = torch.zeros((S.shape[1], x.shape[1]), dtype=_sum_dtype(S), device=x.device)
    for rows in _row_chunks(*x.shape):
        _add_product(total, S[rows].t(), _widened(x, rows, mask, S.dtype))
    return total.to(S.dtype)


def _sum_dtype(S: Tensor) -> torch.dtype:
    """What a sum over chunks is kept in: each addition to a 16-bit sum would round, until no chunk moves it at all."""
    return torch.promote_types(S.dtype, torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in place, where total may be wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def expand_(out: Tensor, S: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    """out += drop(S Bᵀ) in place: out (M, N), S (M, r), B (N, r) of any strides, S and B of one dtype."""
    if S.dtype == torch.float32 and out.dtype == torch.bfloat16:
        S, B = _bf16_halves(S, (0, 1, 0)), _bf16_halves(B, (0, 0, 1))
    if S.dtype == out.dtype:
        if mask is None:
            return out.addmm_(S, B.t())
        for rows in _row_chunks(*out.shape):
            out[rows] += apply_mask(torch.mm(S[rows], B.t()), mask[rows])
        return out
    for rows in _row_chunks(*out.shape):
        delta = torch.mm(S[rows], B.t())
        out[rows] += delta if mask is None else apply_mask(delta, mask[rows])
    return out


def _bf16_halves(t: Tensor, order: tuple[int, ...]) -> Tensor:
    """fp32 columns as bf16 ones: t = high + low, 16 bits of it, set side by side in `order`.

    (high, low, high) against (high, high, low) is the product good to 2⁻¹⁶ in one bf16 matrix product, accumulated in
    fp32: for an output that is rounded to bf16 anyway.
    """
    high = t.to(torch.bfloat16)
    low = (t - high).to(torch.bfloat16)
    return torch.cat([(high, low)[part] for part in order], dim=1)


# The ops: a LoRA linear that owns the base product, and the LoRA part added onto somebody's output.


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, S): (M, N) in x's dtype and (M, r) in A's."""
    out = F.linear(x, W, bias)
    S = shrink(x, A, mask, scale)
    return expand_(out, S, B), S


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
    """(dx, dA, dB); dx is empty, of shape (0,), where it is not needed."""
    dS, dB = _output_pass(dout, B, S, scale)
    dx = expand_(torch.mm(dout, W), dS, A.t(), mask) if need_dx else x.new_empty(0)
    return dx, outer(x, dS, mask), dB


def lora_add(out: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out + S Bᵀ, S): (M, N) in out's dtype and (M, r) in A's."""
    S = shrink(x, A, mask, scale)
    return expand_(out.clone(memory_format=torch.contiguous_format), S, B), S


def lora_add_backward(
    dout: Tensor, x: Tensor, A: Tensor, B: Tensor, S: Tensor, mask: Tensor | None, scale: float, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) of the low-rank part alone; dx is empty, of shape (0,), where it is not needed."""
    dS, dB = _output_pass(dout, B, S, scale)
    dA = outer(x, dS, mask)
    if not need_dx:
        return x.new_empty(0), dA, dB
    return expand_(torch.zeros_like(x, memory_format=torch.contiguous_format), dS, A.t(), mask), dA, dB


def _output_pass(dout: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(dS, dB) with each chunk of dout widened once for both: (M, r) and (N, r) in S's dtype."""
    if dout.dtype == S.dtype:
        return shrink(dout, B.t(), None, scale), torch.mm(S.t(), dout).t().contiguous()
    dS, dB = torch.empty_like(S), torch.zeros((S.shape[1], dout.shape[1]), dtype=_sum_dtype(S), device=S.device)
    for rows in _row_chunks(*dout.shape):
        chunk = dout[rows].to(S.dtype)
        torch.mm(chunk, B, out=dS[rows])
        _add_product(dB, S[rows].t(), chunk)  # (r, N): twice as fast as (N, r) in a CPU's library
    return dS.mul_(scale), dB.to(S.dtype).t().contiguous()
