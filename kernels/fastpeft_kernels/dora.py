"""DoRA linear, out = g · (x Wᵀ + s x Aᵀ Bᵀ) + bias with g = magnitude / ‖W + s B A‖ row by row: arXiv:2402.09353
section 4.1. The norm gets no gradient (section 4.3).

With dropout the low-rank part and what g adds to the base product see drop(x), the base product itself sees x, as in
PEFT: out = x Wᵀ + bias + (g - 1) · drop(x) Wᵀ + g s · drop(x) Aᵀ Bᵀ. W is frozen. Kept for backward: x by reference,
S = s · drop(x) Aᵀ (M x r), the base product (M x N), the norm (N), and one bit an element for dropout; nothing of W's
size.

Traffic beyond the LoRA linear's (fastpeft_kernels.lora), 16-bit x, forward + backward, without dropout: the norm reads
W (2NK), and one pass over dout and the base product writes g · dout (6MN). The low-rank part and g ride on one pass
over the base product, which takes the place of the C operand. With dropout there are two base products each way, whose
second inputs and C operands are written and read as well: drop(x) and x - c drop(x) (6MK), out (2MN), the masked part
of dx (6MK). gpu/dora.py has the sum.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels import formulas
from fastpeft_kernels import reference_dora as reference
from fastpeft_kernels.dispatch import current_product, no_autocast, use_triton
from fastpeft_kernels.dropout import check_probability, draw_mask, dropout_scale
from fastpeft_kernels.lora import autocast_operands, check_linear
from fastpeft_kernels.twice import differentiable


def dora_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """A frozen linear layer with a DoRA adapter: g · (x Wᵀ + scaling · x Aᵀ Bᵀ) + bias without dropout.

    Under autocast every operand but the magnitude is cast to autocast's dtype first, as torch's own linear does. Norms
    are computed in fp32 at least.

    Args:
        x: (..., K), any strides; fp64, fp32, fp16 or bf16.
        W: (N, K), x's dtype, frozen.
        bias: (N,) in x's dtype, or None; may be trained.
        lora_A: (r, K), fp32 or x's dtype.
        lora_B: (N, r), lora_A's dtype.
        magnitude: (N,), fp32 or lora_A's dtype.
        scaling: factor of the low-rank part.
        dropout_p: probability to drop an element of x on its way to all but the frozen layer, 0 <= p < 1.

    Returns:
        (..., N) in x's dtype, contiguous. Differentiable in x, bias, lora_A, lora_B and magnitude.

    Raises:
        ValueError: shapes or dtypes do not fit, W is to be trained, or p is outside [0, 1).
    """
    magnitude_dtypes = (torch.float32, lora_A.dtype)
    x, W, bias, lora_A, lora_B = autocast_operands(x, W, bias, lora_A, lora_B)
    check_linear(x, W, bias, lora_A, lora_B)
    if magnitude.shape != (W.shape[0],) or magnitude.dtype not in magnitude_dtypes:
        raise ValueError(
            f"magnitude must be (N,) = ({W.shape[0]},) of float32 or lora_A's dtype {magnitude_dtypes[1]}; got "
            f"{tuple(magnitude.shape)} of {magnitude.dtype}"
        )
    check_probability(dropout_p)
    rows = x.reshape(-1, x.shape[-1])
    mask, keep_scale = (draw_mask(rows, dropout_p), dropout_scale(dropout_p)) if dropout_p else (None, 1.0)
    inputs = (rows, W, bias, lora_A, lora_B, magnitude, mask, scaling, keep_scale)
    out: Tensor
    if torch.compiler.is_compiling():
        out = _dora_linear(*inputs)[0]
    elif torch.is_grad_enabled():
        out = _DoraLinear.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        out = _run_linear(*inputs)[0]
    return out.view(*x.shape[:-1], W.shape[0])


def dora_norm(W: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · B A‖ of each row, in one pass over W: what DoRA divides by. Without gradient.

    Args:
        W: (N, K), any strides and float dtype.
        lora_A: (r, K), any float dtype.
        lora_B: (N, r), lora_A's dtype.
        scaling: factor of the low-rank part.

    Returns:
        (N,) in fp32, in fp64 if an operand is; at least the smallest positive normal number.

    Raises:
        ValueError: the shapes do not fit.
    """
    if W.ndim != 2 or lora_B.shape[:1] != W.shape[:1] or lora_A.shape != (*lora_B.shape[1:], W.shape[-1]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (W, lora_A, lora_B))
        raise ValueError(f"W, lora_A and lora_B must be (N, K), (r, K) and (N, r); got {shapes}")
    operands = W.detach(), lora_A.detach(), lora_B.detach(), scaling
    if torch.compiler.is_compiling():
        return _dora_norm(*operands)  # type: ignore[no-any-return]
    with torch.no_grad():
        return _run_norm(*operands)


def _run_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    with no_autocast(W):
        if use_triton(W, A):
            from fastpeft_kernels.gpu import dora as gpu  # triton is imported when first needed

            return gpu.dora_norm(W, A, B, scaling)
        return reference.dora_norm(W, A, B, scaling)


_dora_norm = torch.library.custom_op("fastpeft::dora_norm", _run_norm, mutates_args=())


@_dora_norm.register_fake
def _(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return W.new_empty(W.shape[0], dtype=reference.wide_dtype(W, A))


def _run_linear(
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
    if current_product() == "own":
        raise RuntimeError('DoRA takes its base products from the library, not product "own": take "auto" or "library"')
    with no_autocast(x):
        if use_triton(x):
            from fastpeft_kernels.gpu import dora as gpu

            return gpu.dora_linear(x, W, bias, A, B, magnitude, mask, scaling, keep_scale)
        return reference.dora_linear(x, W, bias, A, B, magnitude, mask, scaling, keep_scale)


def _run_linear_backward(
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
    need_factors: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with no_autocast(x):  # backward may be called inside a block of autocast
        inputs = (dout, x, W, A, B, magnitude, S, z, norm, mask, scaling, keep_scale, need_dx, need_factors)
        if use_triton(x):
            from fastpeft_kernels.gpu import dora as gpu

            return gpu.dora_linear_backward(*inputs)
        return reference.dora_linear_backward(*inputs)


_dora_linear = torch.library.custom_op("fastpeft::dora_linear", _run_linear, mutates_args=())
# `need_factors` is True unless given, see fastpeft_kernels.lora.
_dora_linear_backward = torch.library.custom_op("fastpeft::dora_linear_backward", _run_linear_backward, mutates_args=())


@_dora_linear.register_fake
def _(
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
    M, N = x.shape[0], W.shape[0]
    norm = W.new_empty(N, dtype=reference.wide_dtype(W, A))
    return x.new_empty((M, N)), A.new_empty((M, A.shape[0])), x.new_empty((M, N)), norm


@_dora_linear_backward.register_fake
def _(
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
    need_factors: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0)
    dA, dB, dmagnitude = (t.new_empty(t.shape if need_factors else 0) for t in (A, B, magnitude))
    return dx, dA, dB, dmagnitude


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W, _, A, B, magnitude, mask, scaling, keep_scale = inputs
    _, S, z, norm = output
    ctx.save_for_backward(x, W, A, B, magnitude, S, z, norm, mask)
    ctx.scales = scaling, keep_scale


def _gradients(ctx: Any, dout: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    need_dx, _, need_dbias, *need_each, _, _, _ = ctx.needs_input_grad
    dx, grads = None, [None] * 3  # type: Any, list[Any]
    if need_dx or any(need_each):
        dx, *found = backward(dout, *ctx.saved_tensors, *ctx.scales, need_dx, any(need_each))
        grads = [gradient if need else None for gradient, need in zip(found, need_each, strict=True)]
    dbias = dout.sum(0) if need_dbias else None
    return dx if need_dx else None, None, dbias, *grads, None, None, None


def _traced_backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dout, _dora_linear_backward)


_dora_linear.register_autograd(_traced_backward, setup_context=_setup)


class _DoraLinear(torch.autograd.Function):
    """The same op where nothing is compiled: an autograd.Function costs the host a fraction of a custom op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        outputs = _run_linear(*inputs)
        _setup(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    @differentiable(partial(_gradients, backward=formulas.dora_linear_backward))
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dout, _run_linear_backward)
