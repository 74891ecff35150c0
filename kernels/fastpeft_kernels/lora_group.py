"""LoRA linears that share their input: out_i = x W_iᵀ + bias_i + s_i · drop_i(x) A_iᵀ B_iᵀ, as for q, k, v or gate, up.

One pass over x makes all S_i = s_i · drop_i(x) A_iᵀ, another all dA_i, and the base products sum their parts of dx,
which autograd would otherwise add one by one. Masks are independent. LoRA: arXiv:2106.09685 section 4.1.

Kept for backward: x by reference, once; S = [S_1 S_2 ...] (M x Σr); one bit an element and member for dropout.

Traffic beyond n frozen linears, 16-bit x, forward + backward, N = Σ N_i: S reads x (2MK), the low-rank parts are C
operands (4MN), dS and dB read dout (2MN), dA reads x (2MK), dx is one C operand (4MK): 8MK + 6MN for the whole group,
and n MK/8 for each pass over masks. Each base product of dx but the first reads the sum so far as well, 2MK, where
autograd would add the dx of separate layers at 6MK. Counted in tests/kernels/test_group_budget.py.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft_kernels import formulas, reference
from fastpeft_kernels.dispatch import current_product, inferring_few, no_autocast, use_triton
from fastpeft_kernels.dropout import check_probability, draw_mask, dropout_scale
from fastpeft_kernels.lora import autocast_operands, check_linear
from fastpeft_kernels.twice import differentiable


class LoraOperands(NamedTuple):
    """What one LoRA linear needs beside its input: the arguments of `lora_linear`, in its order."""

    W: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0


def lora_group(x: Tensor, members: Sequence[LoraOperands]) -> tuple[Tensor, ...]:
    """`lora_linear` of each member on the same x, in one op.

    Args:
        x: (..., K), any strides; fp64, fp32, fp16 or bf16.
        members: at least one; each as for `lora_linear`, and all adapters of one dtype.

    Returns:
        One (..., N_i) a member, in x's dtype, contiguous. Differentiable in x and every member's bias, lora_A and
        lora_B; an output that is not used costs nothing in backward.

    Raises:
        ValueError: no members, the adapters differ in dtype, or a member does not fit x (as for `lora_linear`).
    """
    if not members:
        raise ValueError("lora_group needs at least one member, got none")
    x, *flat = autocast_operands(x, *(t for m in members for t in m[:4]))
    cast = zip(*(flat[i::4] for i in range(4)), members, strict=True)
    members = [LoraOperands(W, bias, A, B, m.scaling, m.dropout_p) for W, bias, A, B, m in cast]
    for member in members:
        check_linear(x, *member[:4])
    if len(dtypes := {member.lora_A.dtype for member in members}) > 1:
        raise ValueError(f"the adapters of a group must be of one dtype; got {', '.join(sorted(map(str, dtypes)))}")
    if inferring_few(x, max(member.dropout_p for member in members)):
        return tuple(reference.lora_linear_of_few(x, *member[:5]) for member in members)
    rows = x.reshape(-1, x.shape[-1])
    masks = _draw_masks(rows, [member.dropout_p for member in members])
    scales = [member.scaling * dropout_scale(member.dropout_p) for member in members]
    Ws, biases, As, Bs = (list(operands) for operands in list(zip(*members, strict=True))[:4])
    outs: Sequence[Tensor]
    if torch.compiler.is_compiling():
        outs = _lora_group(rows, Ws, _stand_ins(biases, x), As, Bs, _stand_ins(masks, x), scales)[:-1]
    elif torch.is_grad_enabled():
        outs = _LoraGroup.apply(rows, scales, *Ws, *biases, *As, *Bs, *masks)  # type: ignore[no-untyped-call]
    else:
        outs = _run_group(rows, Ws, biases, As, Bs, masks, scales)[:-1]
    return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outs)


def _draw_masks(x: Tensor, ps: Sequence[float]) -> list[Tensor | None]:
    """A mask a member: those with one probability are drawn together, which no compiler can put in another order."""
    masks: list[Tensor | None] = [None] * len(ps)
    for p in dict.fromkeys(ps):
        check_probability(p)
        takers = [i for i, other in enumerate(ps) if other == p]
        if p > 0.0:
            drawn = draw_mask(x, p, len(takers))
            for i, mask in zip(takers, drawn.view(len(takers), len(x), drawn.shape[1]).unbind(), strict=True):
                masks[i] = mask
    return masks


def _run_group(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
) -> list[Tensor]:
    """[out_1, out_2, ..., S]."""
    if current_product() == "own":
        raise RuntimeError(
            'a group sums its base products in the library\'s, not product "own": take "auto" or "library"'
        )
    if use_triton(x):
        from fastpeft_kernels.gpu import lora_group as gpu  # triton is imported when first needed

        return gpu.lora_group(x, Ws, biases, As, Bs, masks, scales)
    return reference.lora_group(x, Ws, biases, As, Bs, masks, scales)


def _run_group_backward(
    douts: Sequence[Tensor],
    x: Tensor,
    Ws: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    S: Tensor,
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
    need_dx: bool,
    need_factors: bool = True,
) -> list[Tensor]:
    """[dx, dA_1, dA_2, ..., dB_1, dB_2, ...], [dx] without `need_factors`; S may be a slice of columns."""
    with no_autocast(x):
        if use_triton(x):
            from fastpeft_kernels.gpu import lora_group as gpu

            return gpu.lora_group_backward(douts, x, Ws, As, Bs, S, masks, scales, need_dx, need_factors)
        return reference.lora_group_backward(douts, x, Ws, As, Bs, S, masks, scales, need_dx, need_factors)


# The ops for the compiler. Autograd takes no lists with None in them: an empty tensor stands for what is not there.


def _stand_ins(optional: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if t is None else t for t in optional]


def _optional(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [t if t.numel() else None for t in tensors]


@torch.library.custom_op("fastpeft::lora_group", mutates_args=())
def _lora_group(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    masks: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    return _run_group(x, Ws, _optional(biases), As, Bs, _optional(masks), scales)


@torch.library.custom_op("fastpeft::lora_group_backward", mutates_args=())
def _lora_group_backward(
    douts: Sequence[Tensor],
    x: Tensor,
    Ws: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    S: Tensor,
    masks: Sequence[Tensor],
    scales: Sequence[float],
    need_dx: bool,
    need_factors: bool = True,
) -> list[Tensor]:
    return _run_group_backward(douts, x, Ws, As, Bs, S, _optional(masks), scales, need_dx, need_factors)


@_lora_group.register_fake
def _(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    masks: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    M = x.shape[0]
    return [*(x.new_empty((M, W.shape[0])) for W in Ws), As[0].new_empty((M, sum(A.shape[0] for A in As)))]


@_lora_group_backward.register_fake
def _(
    douts: Sequence[Tensor],
    x: Tensor,
    Ws: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    S: Tensor,
    masks: Sequence[Tensor],
    scales: Sequence[float],
    need_dx: bool,
    need_factors: bool = True,
) -> list[Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0)
    return [dx, *(t.new_empty(t.shape) for t in (*As, *Bs) if need_factors)]


def _setup_traced(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, Ws, _, As, Bs, masks, scales = inputs
    ctx.save_for_backward(x, *Ws, *As, *Bs, *masks, output[-1])
    ctx.scales = scales
    ctx.set_materialize_grads(False)


def _traced_backward(ctx: Any, douts: list[Tensor | None]) -> tuple[Any, ...]:
    need_dx, _, *needed, _, _ = ctx.needs_input_grad
    dx, dbiases, dAs, dBs = _gradients_of_used(ctx, douts[:-1], need_dx, needed, _lora_group_backward)
    none = [None] * len(ctx.scales)
    return dx, none, dbiases, dAs, dBs, none, None


_lora_group.register_autograd(_traced_backward, setup_context=_setup_traced)


def _gradients_of_used(
    ctx: Any, douts: Sequence[Tensor | None], need_dx: bool, needed: Sequence[Sequence[bool]], backward: Any
) -> tuple[Tensor | None, list[Any], list[Any], list[Any]]:
    """(dx, dbiases, dAs, dBs); those of a member whose output was not used are None. `needed`: of the last three."""
    n, (need_biases, need_As, need_Bs) = len(ctx.scales), needed
    x, *operands, S = ctx.saved_tensors
    used = [i for i, dout in enumerate(douts) if dout is not None]
    Ws, As, Bs, masks = ([operands[j + i] for i in used] for j in range(0, 4 * n, n))
    if len(used) < n:
        ranks = [A.shape[0] for A in operands[n : 2 * n]]
        S = torch.cat([part for i, part in enumerate(S.split(ranks, dim=1)) if i in used], dim=1)
    wanted: list[Tensor] = [dout for dout in douts if dout is not None]
    scales = [ctx.scales[i] for i in used]
    need_factors = any(need_As[i] or need_Bs[i] for i in used)
    dx, grads = None, []  # type: Any, list[Tensor]
    if used and (need_dx or need_factors):
        dx, *grads = backward(wanted, x, Ws, As, Bs, S, masks, scales, need_dx, need_factors)
    dbiases, dAs, dBs = [None] * n, [None] * n, [None] * n  # type: list[Any], list[Any], list[Any]
    for j, i in enumerate(used):
        if need_factors:
            dAs[i], dBs[i] = grads[j], grads[len(used) + j]
        if need_biases[i]:
            dbiases[i] = wanted[j].sum(0)
    return dx if need_dx else None, dbiases, dAs, dBs


def _gradients(ctx: Any, *douts: Tensor | None, backward: Any) -> tuple[Any, ...]:
    n = len(ctx.scales)
    needed = [ctx.needs_input_grad[i : i + n] for i in range(2 + n, 2 + 4 * n, n)]
    dx, dbiases, dAs, dBs = _gradients_of_used(ctx, douts, ctx.needs_input_grad[0], needed, backward)
    none = [None] * n
    return dx, None, *none, *dbiases, *dAs, *dBs, *none


class _LoraGroup(torch.autograd.Function):
    """The same op where nothing is compiled: x, the scales, then n each of W, bias, A, B and mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: list[float], *operands: Any) -> tuple[Tensor, ...]:
        n = len(scales)
        Ws, biases, As, Bs, masks = (operands[i : i + n] for i in range(0, 5 * n, n))
        *outs, S = _run_group(x, Ws, biases, As, Bs, masks, scales)
        ctx.save_for_backward(x, *Ws, *As, *Bs, *masks, S)
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @differentiable(partial(_gradients, backward=formulas.lora_group_backward))
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, *douts, backward=_run_group_backward)
