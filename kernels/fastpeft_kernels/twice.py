"""Gradients of gradients: torch.autograd.functional.hvp, a penalty on a gradient's norm.

A fused backward writes into its own results, so autograd cannot go through it. Where a backward is itself recorded, the
op's gradients are computed by plain operators instead (formulas.py, formulas_routed.py), with torch's own gradients of
any order.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from fastpeft_kernels.dispatch import no_autocast

Backward = Callable[..., tuple[Any, ...]]


def differentiable(formula: Backward) -> Callable[[Backward], Backward]:
    """Decorates the backward of an autograd.Function, in the place of `once_differentiable`.

    `once_differentiable` is no guard: the node that it hangs behind a gradient raises only if what is differentiated
    reaches that node alone. A second derivative in x that has another way to x lacks the op's part, in silence.

    Args:
        formula: the same gradients as the backward, of the same arguments, by operators that autograd can follow.
    """

    def decorate(fused: Backward) -> Backward:
        @functools.wraps(fused)
        def backward(ctx: Any, *douts: Any) -> tuple[Any, ...]:
            if not torch.is_grad_enabled():  # on within a backward for create_graph=True alone
                return fused(ctx, *douts)
            given = next((dout for dout in douts if dout is not None), None)
            with nullcontext() if given is None else no_autocast(given):
                return formula(ctx, *douts)

        return backward

    return decorate
