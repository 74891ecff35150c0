"""Column scale, out[m, n] = x[m, n] · scale[n], alone or in front of a frozen linear layer: IA³, arXiv:2205.05638
section 3.3.

`scale_columns` scales what a layer gives, `scale_linear` what a frozen linear takes (IA³'s feed-forward form). Both
keep for backward their x by reference, in its own dtype, and nothing else beside parameters.

Traffic in 16 bits. `scale_columns`: forward reads and writes x once (4MN bytes); backward reads dout and x once and
writes dx (6MN), or 4MN where only one of dx and dscale is asked for. `scale_linear`: the same with K for N, beyond the
frozen linear's own two products. dscale is summed in fp32 planes of rows without atomics: the same bits on every run.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels import formulas
from fastpeft_kernels import reference_scale as reference
from fastpeft_kernels.checks import check_frozen_linear
from fastpeft_kernels.dispatch import no_autocast, use_triton
from fastpeft_kernels.twice import differentiable


def scale_columns(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply column n of x by scale[n], in fp32 or wider, rounded once.

    Args:
        x: (..., N), any strides; any float dtype of 16, 32 or 64 bits.
        scale: (N,), (1, N) or (N, 1), any such dtype, not necessarily x's. A parameter need not be reshaped first.

    Returns:
        (..., N) in x's dtype, contiguous. Differentiable in both.

    Raises:
        ValueError: scale does not have one entry per column of x.
    """
    _check_scale(x, scale)
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor
    if torch.compiler.is_compiling():
        out = _scale_columns(rows, scale)
    elif torch.is_grad_enabled():
        out = _ScaleColumns.apply(rows, scale)  # type: ignore[no-untyped-call]
    else:
        out = _run_columns(rows, scale)
    return out.view(x.shape)


def scale_linear(x: Tensor, scale: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """A frozen linear layer of a scaled input: (x · scale) Wᵀ + bias.

    Computes in x's dtype, which is W's; autocast does not change that.

    Args:
        x: (..., K), any strides; any float dtype of 16, 32 or 64 bits.
        scale: (K,), (1, K) or (K, 1), any such dtype.
        W: (N, K), x's dtype, frozen.
        bias: (N,) in x's dtype, or None; may be trained.

    Returns:
        (..., N) in x's dtype, contiguous. Differentiable in x, scale and bias.

    Raises:
        ValueError: shapes or dtypes do not fit, or W is to be trained.
    """
    _check_scale(x, scale)
    check_frozen_linear(
        x, W, bias, "scale_linear has no gradient for W: freeze it, or call the layer with scale_columns(x, scale)"
    )
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor
    if torch.compiler.is_compiling():
        out = _scale_linear(rows, scale, W, bias)
    elif torch.is_grad_enabled():
        out = _ScaleLinear.apply(rows, scale, W, bias)  # type: ignore[no-untyped-call]
    else:
        out = _run_linear(rows, scale, W, bias)
    return out.view(*x.shape[:-1], W.shape[0])


def _check_scale(x: Tensor, scale: Tensor) -> None:
    N = x.shape[-1]
    if scale.shape not in ((N,), (1, N), (N, 1)):
        raise ValueError(
            f"scale needs one entry per column of x: expected shape ({N},), (1, {N}) or ({N}, 1), got "
            f"{tuple(scale.shape)} for x of shape {tuple(x.shape)}"
        )


# scale_columns: what runs, the op for the compiler, the function for eager.


def _run_columns(x: Tensor, scale: Tensor) -> Tensor:
    if use_triton(x, scale):
        from fastpeft_kernels.gpu import scale as gpu  # triton is imported when first needed

        return gpu.scale_columns(x, scale)
    return reference.scale_columns(x, scale)


def _run_columns_backward(dout: Tensor, x: Tensor | None, scale: Tensor, need_dx: bool) -> tuple[Tensor, Tensor]:
    if use_triton(dout, scale):
        from fastpeft_kernels.gpu import scale as gpu

        return gpu.scale_columns_backward(dout, x, scale, need_dx)
    return reference.scale_columns_backward(dout, x, scale, need_dx)


_scale_columns = torch.library.custom_op("fastpeft::scale_columns", _run_columns, mutates_args=())
_scale_columns_backward = torch.library.custom_op(
    "fastpeft::scale_columns_backward", _run_columns_backward, mutates_args=()
)


@_scale_columns.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_scale_columns_backward.register_fake
def _(dout: Tensor, x: Tensor | None, scale: Tensor, need_dx: bool) -> tuple[Tensor, Tensor]:
    dx = dout.new_empty(dout.shape if need_dx else 0)
    return dx, scale.new_empty(0 if x is None else scale.shape)


def _setup_columns(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)


def _columns_gradients(ctx: Any, dout: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    need_dx, need_dscale = ctx.needs_input_grad
    dx, dscale = backward(dout, *ctx.saved_tensors, need_dx)
    return dx if need_dx else None, dscale if need_dscale else None


def _traced_columns_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _columns_gradients(ctx, dout, _scale_columns_backward)


_scale_columns.register_autograd(_traced_columns_backward, setup_context=_setup_columns)


class _ScaleColumns(torch.autograd.Function):
    """The same op where nothing is compiled: an autograd.Function costs the host a fraction of a custom op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _run_columns(*inputs)
        _setup_columns(ctx, inputs, output)
        return output

    @staticmethod
    @differentiable(partial(_columns_gradients, backward=formulas.scale_columns_backward))
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _columns_gradients(ctx, dout, _run_columns_backward)


# scale_linear: the same three.


def _run_linear(x: Tensor, scale: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    with no_autocast(x):
        if use_triton(x, scale):
            from fastpeft_kernels.gpu import scale as gpu

            return gpu.scale_linear(x, scale, W, bias)
        return reference.scale_linear(x, scale, W, bias)


def _run_linear_backward(
    dout: Tensor, x: Tensor | None, scale: Tensor, W: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor]:
    with no_autocast(dout):
        if use_triton(dout, scale):
            from fastpeft_kernels.gpu import scale as gpu

            return gpu.scale_linear_backward(dout, x, scale, W, need_dx)
        return reference.scale_linear_backward(dout, x, scale, W, need_dx)


_scale_linear = torch.library.custom_op("fastpeft::scale_linear", _run_linear, mutates_args=())
_scale_linear_backward = torch.library.custom_op(
    "fastpeft::scale_linear_backward", _run_linear_backward, mutates_args=()
)


@_scale_linear.register_fake
def _(x: Tensor, scale: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], W.shape[0]))


@_scale_linear_backward.register_fake
def _(dout: Tensor, x: Tensor | None, scale: Tensor, W: Tensor, need_dx: bool) -> tuple[Tensor, Tensor]:
    dx = dout.new_empty((dout.shape[0], W.shape[1]) if need_dx else 0)
    return dx, scale.new_empty(0 if x is None else scale.shape)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, W, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale, W)


def _linear_gradients(ctx: Any, dout: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    need_dx, need_dscale, _, need_dbias = ctx.needs_input_grad
    dx, dscale = None, None
    if need_dx or need_dscale:
        dx, dscale = backward(dout, *ctx.saved_tensors, need_dx)
    dbias = dout.sum(0) if need_dbias else None
    return dx if need_dx else None, dscale if need_dscale else None, None, dbias


def _traced_linear_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _linear_gradients(ctx, dout, _scale_linear_backward)


_scale_linear.register_autograd(_traced_linear_backward, setup_context=_setup_linear)


class _ScaleLinear(torch.autograd.Function):
    """`scale_linear` where nothing is compiled."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _run_linear(*inputs)
        _setup_linear(ctx, inputs, output)
        return output

    @staticmethod
    @differentiable(partial(_linear_gradients, backward=formulas.scale_linear_backward))
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _linear_gradients(ctx, dout, _run_linear_backward)
