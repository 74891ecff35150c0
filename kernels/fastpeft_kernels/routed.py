"""LoRA for a batch whose rows take different adapters: out[m] = base[m] + Σ w · s_j · drop(x[m]) A_jᵀ B_jᵀ over the
entries (slot j, weight w) of row m. LoRA: arXiv:2106.09685 section 4.1; batches of many adapters: arXiv:2310.18547.

An adapter is a slot, a number below A; three tensors on x's device say who takes what, P being the most entries of a
row (1 in all but weighted batches):

    rows     (P, M) int32      pass p's order of all M rows: those with a p-th entry first, by slot, the others last
    starts   (P, A + 1) int32  the entries of slot j in pass p are rows[p, starts[p, j] : starts[p, j + 1]]
    weights  (P, M) fp32       of each entry, in the order of `rows`; None where all are 1

Shapes depend on P, M and A alone, so that a CUDA graph replays with other routings in the same tensors. S is kept by
entry: line e of pass p, (P, M, R), belongs to row rows[p, e]; R is the largest rank. Kept for backward: x by reference,
S, and one bit an element for dropout.

Traffic beyond the base layer, 16-bit x, P = 1, no dropout: forward reads x, reads and writes out (2MK + 4MN); backward
reads dout twice and x, writes dx (4MN + 4MK). Each row block reads the factors of its own slot alone, at their own
rank. Launches: 2 forward, whatever A is (tests/kernels/test_routed_budget.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft_kernels.routed_ops import (
    ExpandRouted,
    LoraRouted,
    ShrinkRouted,
    _expand_routed,
    _lora_routed,
    _shrink_routed,
    run_expand,
    run_lora,
    run_shrink,
)
from fastpeft_kernels.routes import (
    check_base,
    check_factors,
    check_mask,
    check_pairs,
    check_routing,
    check_scales,
    routed_input,
)


def shrink_routed(
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """S = weight · scale · drop(x) A_jᵀ for every entry. Routing as in the module's docstring.

    Args:
        x: (M, K), any strides; cast to the factors' dtype unless it is a 16-bit tensor and they are fp32. Under
            autocast it is cast to autocast's dtype first; factors are never cast: a copy has another address.
        factors: one (r_j, K) a slot, of one float dtype, any strides; a slot without an adapter has r_j = 0.
        scales: one factor a slot.
        rows, starts, weights: the routing.
        mask: (M, ⌈K / 32⌉) int32, dropout's mask as `draw_mask` gives it, or None; its scale belongs into `scales`.

    Returns:
        (P, M, R) in the factors' dtype, R the largest r_j. Columns past a slot's rank and lines without an entry are
        zeros. Differentiable in x and every factor; a slot without rows gets a gradient of zeros.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    x = routed_input(x, factors)
    check_factors(factors, "factors", 1, x.shape[1])
    check_routing(x, len(factors), rows, starts, weights)
    check_scales(scales, factors)
    check_mask(mask, x)
    S: Tensor
    if torch.compiler.is_compiling():
        S = _shrink_routed(x, factors, scales, rows, starts, weights, mask)
    elif torch.is_grad_enabled():
        S = ShrinkRouted.apply(x, scales, rows, starts, weights, mask, *factors)  # type: ignore[no-untyped-call]
    else:
        S = run_shrink(x, factors, scales, rows, starts, weights, mask)
    return S


def expand_routed(base: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor) -> Tensor:
    """base + Σ S B_jᵀ over the entries of each row, added in fp32 or wider and rounded once.

    Args:
        base: (M, N), any strides and float dtype; not changed.
        S: (P, M, R), what `shrink_routed` or `gather_routed` gave for the same routing.
        factors: one (N, r_j) a slot, S's dtype, any strides; R is the largest r_j.
        rows, starts: the routing.

    Returns:
        (M, N) in base's dtype, contiguous; rows without an entry have the very bits of base. Differentiable in base, S
        and every factor.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if base.ndim != 2:
        raise ValueError(f"base must be (M, N): flatten the batch first; got {tuple(base.shape)}")
    check_factors(factors, "factors", 0, base.shape[1])
    check_routing(base, len(factors), rows, starts, None)
    shape = (*rows.shape, max(B.shape[1] for B in factors))
    if S.shape != shape or S.dtype != factors[0].dtype:
        raise ValueError(
            f"S must be (P, M, R) = {shape} of the factors' dtype {factors[0].dtype}; got {tuple(S.shape)} of {S.dtype}"
        )
    out: Tensor
    if torch.compiler.is_compiling():
        out = _expand_routed(base, S, factors, rows, starts)
    elif torch.is_grad_enabled():
        out = ExpandRouted.apply(base, S, rows, starts, *factors)  # type: ignore[no-untyped-call]
    else:
        out = run_expand(base, S, factors, rows, starts)
    return out


def lora_routed(
    base: Tensor,
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """The LoRA part of any layer, added onto its base's output: `expand_routed` of `shrink_routed`.

    Args and errors are theirs: base (M, N), x (M, K), As (r_j, K) and Bs (N, r_j) of one dtype.
        overwrite: base, contiguous, is the op's to change where no gradient is recorded: it saves a copy on a CPU.

    Returns:
        (M, N) in base's dtype, contiguous. Differentiable in base, x and every factor.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        S = shrink_routed(x, As, scales, rows, starts, weights, mask)
        return expand_routed(base, S, Bs, rows, starts)
    x = routed_input(x, As)
    check_base(base, x)
    check_pairs(As, Bs, x.shape[1], base.shape[1])
    check_routing(x, len(As), rows, starts, weights)
    check_scales(scales, As)
    check_mask(mask, x)
    out: Tensor
    if torch.compiler.is_compiling():
        out = _lora_routed(base, x, As, Bs, scales, rows, starts, weights, mask)
    elif torch.is_grad_enabled():
        out = LoraRouted.apply(base, x, scales, rows, starts, weights, mask, *As, *Bs)  # type: ignore[no-untyped-call]
    else:
        out = run_lora(base, x, As, Bs, scales, rows, starts, weights, mask, overwrite)
    return out
