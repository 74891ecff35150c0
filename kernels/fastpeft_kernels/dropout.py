"""Dropout whose mask is kept at one bit an element: arXiv:1207.0580.

`draw_mask` is the only op of this package that draws random numbers, and is tagged as seeded, so that activation
checkpointing and the compiler's recomputation give it the same bits twice. Where nothing is compiled, `fresh_mask`
leaves the drawing to the Triton kernel that passes over x first. Everything that takes a drawn mask is exact.

Traffic for an M x K tensor: drawing writes MK/8 bytes; forward and backward each read MK/8 and move x once.
"""

from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels import formulas, reference
from fastpeft_kernels.dispatch import use_triton
from fastpeft_kernels.masks import KEEP_LEVELS, Draw, begin_draw, keep_level, mask_words
from fastpeft_kernels.masks import draw_mask as draw_in_torch
from fastpeft_kernels.twice import differentiable


def check_probability(p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout needs a probability p with 0 <= p < 1; got {p}")


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (probability to keep), so that the expectation is exact."""
    return KEEP_LEVELS / keep_level(p)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element of x with probability p and scale the others by 1 / (1 - p).

    The probability is rounded to a multiple of 2⁻¹⁶, and the scale belongs to the rounded one. Kept for backward: the
    mask, one bit an element (torch keeps a byte, or a copy in x's dtype on a CPU).

    Args:
        x: (..., K), any strides; any float dtype of 16, 32 or 64 bits.
        p: probability to drop, 0 <= p < 1; 0 returns x itself.

    Returns:
        (..., K) in x's dtype.

    Raises:
        ValueError: p is outside [0, 1).
    """
    check_probability(p)
    if p == 0.0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    mask = draw_mask(rows, p)
    out: Tensor
    if torch.compiler.is_compiling():
        out = _dropout(rows, mask, dropout_scale(p))
    else:
        out = _Dropout.apply(rows, mask, dropout_scale(p))  # type: ignore[no-untyped-call]
    return out.view(x.shape)


@torch.library.custom_op("fastpeft::draw_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_mask(x: Tensor, p: float, copies: int) -> Tensor:
    return _run_draw_mask(x, p, copies)


def _run_draw_mask(x: Tensor, p: float, copies: int) -> Tensor:
    M, K = x.shape
    if use_triton(x):
        from fastpeft_kernels.gpu import dropout as gpu  # triton is imported when first needed

        return gpu.draw_mask(copies * M, K, p, x.device)
    return draw_in_torch(copies * M, K, p, x.device)


@_draw_mask.register_fake
def _(x: Tensor, p: float, copies: int) -> Tensor:
    return x.new_empty((copies * x.shape[0], mask_words(x.shape[1])), dtype=torch.int32)


def draw_mask(x: Tensor, p: float, copies: int = 1) -> Tensor:
    """Fresh masks for x of shape (M, K), from torch's generator: (copies · M, ⌈K / 32⌉) int32, each bit 1 with 1 - p.

    Bit j of word w is column 32 w + j; a 1 keeps. Only shape and device of x are read.
    """
    return _draw_mask(x, p, copies) if torch.compiler.is_compiling() else _run_draw_mask(x, p, copies)


def fresh_mask(x: Tensor, p: float, other: Tensor | None = None) -> Tensor | Draw:
    """`draw_mask` for an op whose own first pass over x can draw: in eager Triton it is left to that kernel.

    Args:
        other: the op's second input of a dtype of its own, as of `use_triton`.
    """
    if torch.compiler.is_compiling() or not use_triton(x, other):
        return draw_mask(x, p)
    return begin_draw(x.shape[0], x.shape[1], p, x.device)


@torch.library.custom_op("fastpeft::dropout", mutates_args=())
def _dropout(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return _run_dropout(x, mask, scale)


def _run_dropout(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    if use_triton(x):
        from fastpeft_kernels.gpu import dropout as gpu

        return gpu.dropout(x, mask, scale)
    return reference.dropout(x, mask, scale)


@_dropout.register_fake
def _(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.scale = inputs[2]


def _traced_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return _dropout(dout, mask, ctx.scale), None, None


_dropout.register_autograd(_traced_backward, setup_context=_setup)


def _recorded_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return formulas.dropout(dout, mask, ctx.scale), None, None


class _Dropout(torch.autograd.Function):
    """The same op where nothing is compiled: an autograd.Function costs the host a fraction of a custom op."""

    @staticmethod
    def forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
        return _run_dropout(x, mask, scale)

    setup_context = staticmethod(_setup)

    @staticmethod
    @differentiable(_recorded_backward)
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _run_dropout(dout, mask, ctx.scale), None, None
