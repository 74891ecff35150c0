"""Dropout masks of one bit an element, in plain torch: bit j of word w is column 32 w + j, a 1 keeps."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft_kernels.scratch import scratch

MASK_BITS = 32  # columns in one word of a mask
KEEP_LEVELS = 1 << 16  # the probability to keep an element is a multiple of 1 / KEEP_LEVELS


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
    word = scratch("mask-words", acc.shape, acc.dtype, acc)
    for digit in digits:
        word.random_(-(1 << 63), None)
        acc = acc.bitwise_or_(word) if level >> digit & 1 else acc.bitwise_and_(word)
    return acc.view(torch.int32)[:words].view(M, mask_words(K))


class Draw(NamedTuple):
    """A mask that is yet to be drawn: the kernel of the first pass over x draws it, the same bits as gpu/dropout.py."""

    mask: Tensor  # (M, ⌈K / 32⌉) int32, contiguous: where to
    seed: Tensor  # (1,) int64
    level: int  # probability to keep, in units of 1 / KEEP_LEVELS


def written(mask: Tensor | Draw | None) -> Tensor | None:
    """The mask's tensor, once the pass that draws it has run."""
    return mask.mask if isinstance(mask, Draw) else mask


def begin_draw(M: int, K: int, p: float, device: torch.device) -> Draw:
    """The seed comes from torch's generator on the device: no host sync, right under CUDA graphs and checkpointing."""
    mask = torch.empty((M, mask_words(K)), dtype=torch.int32, device=device)
    return Draw(mask, torch.empty(1, dtype=torch.int64, device=device).random_(), keep_level(p))


def _byte_lanes(itemsize: int, device: torch.device) -> Tensor:
    """For each byte of a mask its eight bits as lanes of `itemsize` bytes, all ones or all zeros: (256, itemsize)."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1  # (256, 8)
    return (-bits).to(_LANES[itemsize]).view(torch.int64)


_kept_byte_lanes = functools.cache(_byte_lanes)
_LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply_mask(x: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """x where the mask keeps, 0 where it drops (also where x is not finite): (M, K) in x's dtype.

    Args:
        out: where to; contiguous, may be x itself.
    """
    (M, K), lanes_dtype = x.shape, _LANES[x.element_size()]
    table = _kept_byte_lanes if type(mask) is Tensor else _byte_lanes  # a fake tensor must not outlive its mode
    mask_bytes = mask.contiguous().view(torch.uint8).reshape(-1)
    indices = scratch("mask-indices", mask_bytes.shape, torch.int32, x).copy_(mask_bytes)
    byte_lanes = table(x.element_size(), x.device)  # (256, itemsize) int64
    lanes = scratch("mask-lanes", (len(mask_bytes), byte_lanes.shape[1]), torch.int64, x)
    torch.index_select(byte_lanes, 0, indices, out=lanes)
    kept = lanes.view(lanes_dtype).view(M, mask.shape[1] * MASK_BITS)[:, :K]
    if out is None:
        return (x.view(lanes_dtype) & kept).view(x.dtype)
    torch.bitwise_and(x.view(lanes_dtype), kept, out=out.view(lanes_dtype))
    return out
