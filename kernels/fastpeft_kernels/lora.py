"""LoRA linear, out = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ: arXiv:2106.09685 section 4.1.

`lora_linear` owns the base product; `lora_add` adds the low-rank part onto any base layer's output. W is frozen.
Kept for backward: x by reference, S = s · drop(x) Aᵀ (M x r), and one bit an element for dropout.

Traffic beyond the frozen linear, 16-bit x, forward + backward: S reads x (2MK), the low-rank part is the C operand of
the base product (4MN), dS and dB read dout (2MN), dA reads x (2MK), dx's low-rank part is a C operand again (4MK):
8MK + 6MN, and MK/8 for drawing the mask with S and for reading it with dA and dx (compiled code draws it by itself:
MK/8 more). With our own product, which has no C operand: 4MK + 2MN.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels import formulas, reference
from fastpeft_kernels.checks import check_frozen_linear
from fastpeft_kernels.dispatch import check_torch_product, inferring_few, no_autocast, use_triton
from fastpeft_kernels.dropout import check_probability, dropout_scale, fresh_mask
from fastpeft_kernels.masks import Draw, written
from fastpeft_kernels.twice import differentiable


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float = 0.0
) -> Tensor:
    """A frozen linear layer with a LoRA pair beside it: x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ.

    Under autocast every operand is cast to autocast's dtype first, as torch's own linear does. fp32 adapters over a
    16-bit base give gradients of fp32 accuracy.

    Args:
        x: (..., K), any strides; fp64, fp32, fp16 or bf16.
        W: (N, K), x's dtype, frozen.
        bias: (N,) in x's dtype, or None; may be trained.
        lora_A: (r, K), fp32 or x's dtype.
        lora_B: (N, r), lora_A's dtype.
        scaling: factor of the low-rank part.
        dropout_p: probability to drop an element of x on its way to lora_A, 0 <= p < 1.

    Returns:
        (..., N) in x's dtype, contiguous. Differentiable in x, bias, lora_A and lora_B.

    Raises:
        ValueError: shapes or dtypes do not fit, W is to be trained, or p is outside [0, 1).
    """
    x, W, bias, lora_A, lora_B = autocast_operands(x, W, bias, lora_A, lora_B)
    check_linear(x, W, bias, lora_A, lora_B)
    if inferring_few(x, dropout_p):
        return reference.lora_linear_of_few(x, W, bias, lora_A, lora_B, scaling)
    rows = x.reshape(-1, x.shape[-1])
    mask, scale = _mask_and_scale(rows, scaling, dropout_p)
    inputs = (rows, W, bias, lora_A, lora_B, mask, scale)
    out: Tensor
    if torch.compiler.is_compiling():
        out = _lora_linear(*inputs)[0]
    elif torch.is_grad_enabled():
        out = _LoraLinear.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        out = _run_linear(*inputs)[0]
    return out.view(*x.shape[:-1], W.shape[0])


def lora_add(out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float = 0.0) -> Tensor:
    """out + scaling · drop(x) Aᵀ Bᵀ: the LoRA part of any layer, added onto its base's output.

    Args:
        out: (..., N), any float dtype; not changed.
        x: (..., K), any strides; cast to lora_A's dtype unless it is a 16-bit tensor and lora_A is fp32.
        lora_A: (r, K), any float dtype.
        lora_B: (N, r), lora_A's dtype.
        scaling: factor of the low-rank part.
        dropout_p: probability to drop an element of x on its way to lora_A, 0 <= p < 1.

    Returns:
        (..., N) in out's dtype, contiguous. Differentiable in all four tensors.

    Raises:
        ValueError: shapes or dtypes do not fit, or p is outside [0, 1).
    """
    x, lora_A, lora_B = autocast_operands(x, lora_A, lora_B)
    if not (lora_A.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        x = x.to(lora_A.dtype)
    _check_pair(x, lora_A, lora_B, N=out.shape[-1])
    if out.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"out and x need the same rows; got out {tuple(out.shape)} and x {tuple(x.shape)}")
    rows, base = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
    mask, scale = _mask_and_scale(rows, scaling, dropout_p, out)
    inputs = (base, rows, lora_A, lora_B, mask, scale)
    result: Tensor
    if torch.compiler.is_compiling():
        result = _lora_add(*inputs)[0]
    elif torch.is_grad_enabled():
        result = _LoraAdd.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        result = _run_add(*inputs)[0]
    return result.view(out.shape)


def autocast_operands(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """The operands as autocast would hand them to a linear layer: 16- and 32-bit floats in its dtype."""
    if not torch.is_autocast_enabled(x.device.type):
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def check_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> None:
    _check_pair(x, A, B, N=W.shape[0])
    check_frozen_linear(
        x, W, bias, "lora_linear has no gradient for W: freeze it, or add the low-rank part with lora_add"
    )


def _check_pair(x: Tensor, A: Tensor, B: Tensor, N: int) -> None:
    if A.ndim != 2 or A.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_A must be (r, K) = (r, {x.shape[-1]}); got {tuple(A.shape)}")
    if B.shape != (N, A.shape[0]):
        raise ValueError(f"lora_B must be (N, r) = ({N}, {A.shape[0]}); got {tuple(B.shape)}")
    if A.dtype != B.dtype or A.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"lora_A and lora_B must both be float32 or x's dtype {x.dtype}; got {A.dtype} and {B.dtype}")


def _mask_and_scale(
    rows: Tensor, scaling: float, p: float, other: Tensor | None = None
) -> tuple[Tensor | Draw | None, float]:
    check_probability(p)
    return (None, scaling) if p == 0.0 else (fresh_mask(rows, p, other), scaling * dropout_scale(p))


# lora_linear: what runs, the op for the compiler, the function for eager.


def _run_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | Draw | None, scale: float
) -> tuple[Tensor, Tensor]:
    if use_triton(x):
        from fastpeft_kernels.gpu import lora as gpu  # triton is imported when first needed

        return gpu.lora_linear(x, W, bias, A, B, mask, scale)
    check_torch_product()
    return reference.lora_linear(x, W, bias, A, B, written(mask), scale)


def _run_linear_backward(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(x):
        if use_triton(x):
            from fastpeft_kernels.gpu import lora as gpu

            return gpu.lora_linear_backward(dout, x, W, A, B, S, mask, scale, need_dx, need_factors)
        check_torch_product()
        return reference.lora_linear_backward(dout, x, W, A, B, S, mask, scale, need_dx, need_factors)


@torch.library.custom_op("fastpeft::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _run_linear(x, W, bias, A, B, mask, scale)


# `need_factors` is True unless given: the compiler's cache on disk may hold graphs that call the op without it.
_lora_linear_backward = torch.library.custom_op("fastpeft::lora_linear_backward", _run_linear_backward, mutates_args=())


@_lora_linear.register_fake
def _(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], W.shape[0])), A.new_empty((x.shape[0], A.shape[0]))


@_lora_linear_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    shape_A, shape_B = (A.shape, B.shape) if need_factors else (0, 0)
    return x.new_empty(x.shape if need_dx else 0), A.new_empty(shape_A), B.new_empty(shape_B)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W, _, A, B, mask, scale = inputs
    ctx.save_for_backward(x, W, A, B, output[1], written(mask))
    ctx.scale = scale


def _linear_gradients(ctx: Any, dout: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    need_dx, _, need_dbias, need_dA, need_dB, *_ = ctx.needs_input_grad
    dx, dA, dB = _needed(backward, (dout, *ctx.saved_tensors, ctx.scale), need_dx, need_dA, need_dB)
    return dx, None, dout.sum(0) if need_dbias else None, dA, dB, None, None


def _needed(
    backward: Any, inputs: tuple[Any, ...], need_dx: bool, need_dA: bool, need_dB: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), None where not needed. The factors' gradients are computed both or neither."""
    if not (need_dx or need_dA or need_dB):
        return None, None, None
    dx, dA, dB = backward(*inputs, need_dx, need_dA or need_dB)
    return dx if need_dx else None, dA if need_dA else None, dB if need_dB else None


def _traced_linear_backward(ctx: Any, dout: Tensor, _dS: Tensor) -> tuple[Tensor | None, ...]:
    return _linear_gradients(ctx, dout, _lora_linear_backward)


_lora_linear.register_autograd(_traced_linear_backward, setup_context=_setup_linear)


class _LoraLinear(torch.autograd.Function):
    """The same op where nothing is compiled: an autograd.Function costs the host a fraction of a custom op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        outputs = _run_linear(*inputs)
        _setup_linear(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    @differentiable(partial(_linear_gradients, backward=formulas.lora_linear_backward))
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _linear_gradients(ctx, dout, _run_linear_backward)


# lora_add: the same three.


def _run_add(
    out: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | Draw | None, scale: float
) -> tuple[Tensor, Tensor]:
    if use_triton(x, out):
        from fastpeft_kernels.gpu import lora as gpu

        return gpu.lora_add(out, x, A, B, mask, scale)
    return reference.lora_add(out, x, A, B, written(mask), scale)


def _run_add_backward(
    dout: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(x):
        if use_triton(x, dout):
            from fastpeft_kernels.gpu import lora as gpu

            return gpu.lora_add_backward(dout, x, A, B, S, mask, scale, need_dx, need_factors)
        return reference.lora_add_backward(dout, x, A, B, S, mask, scale, need_dx, need_factors)


@torch.library.custom_op("fastpeft::lora_add", mutates_args=())
def _lora_add(out: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _run_add(out, x, A, B, mask, scale)


_lora_add_backward = torch.library.custom_op("fastpeft::lora_add_backward", _run_add_backward, mutates_args=())


@_lora_add.register_fake
def _(out: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), A.new_empty((x.shape[0], A.shape[0]))


@_lora_add_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    shape_A, shape_B = (A.shape, B.shape) if need_factors else (0, 0)
    return x.new_empty(x.shape if need_dx else 0), A.new_empty(shape_A), B.new_empty(shape_B)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, A, B, mask, scale = inputs
    ctx.save_for_backward(x, A, B, output[1], written(mask))
    ctx.scale = scale


def _add_gradients(ctx: Any, dout: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    gradients = _needed(backward, (dout, *ctx.saved_tensors, ctx.scale), *ctx.needs_input_grad[1:4])
    return dout, *gradients, None, None


def _traced_add_backward(ctx: Any, dout: Tensor, _dS: Tensor) -> tuple[Tensor | None, ...]:
    return _add_gradients(ctx, dout, _lora_add_backward)


_lora_add.register_autograd(_traced_add_backward, setup_context=_setup_add)


class _LoraAdd(torch.autograd.Function):
    """`lora_add` where nothing is compiled."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        outputs = _run_add(*inputs)
        _setup_add(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    @differentiable(partial(_add_gradients, backward=formulas.lora_add_backward))
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _add_gradients(ctx, dout, _run_add_backward)
