"""Checks that several ops share."""

from torch import Tensor


def check_frozen_linear(x: Tensor, W: Tensor, bias: Tensor | None, with_gradient: str) -> None:
    """A frozen layer's weight (N, K) and bias (N,) beside x (..., K), all of x's dtype.

    Args:
        with_gradient: what the error says about a W that is to be trained.

    Raises:
        ValueError: shapes or dtypes do not fit, or W is to be trained.
    """
    if W.ndim != 2 or W.shape[1] != x.shape[-1] or W.dtype != x.dtype:
        raise ValueError(
            f"W must be (N, K) = (N, {x.shape[-1]}) of x's dtype {x.dtype}; got {tuple(W.shape)} of {W.dtype}"
        )
    if W.requires_grad:
        raise ValueError(with_gradient)
    if bias is not None and (bias.shape != (W.shape[0],) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be ({W.shape[0]},) of {x.dtype}; got {tuple(bias.shape)} of {bias.dtype}")
