"""Launchers of fastpeft_kernels.lora_group, from the kernels of fastpeft_kernels.gpu.lora.

Without dropout the members see one x: their A's stand below each other, and one pass over x serves them all.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu.lora import expand, outer, shrink


def lora_group(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
) -> list[Tensor]:
    S = torch.cat([shrink(x, A, mask, s) for A, mask, s in zip(As, masks, scales, strict=True)], dim=1)
    outs = []
    for S_i, W, bias, B in zip(_by_rank(S, As), Ws, biases, Bs, strict=True):
        outs.append(expand(S_i.contiguous(), B, x.dtype, bias=bias).addmm_(x, W.t()))
    return [*outs, S]


def lora_group_backward(
    douts: Sequence[Tensor],
    x: Tensor,
    Ws: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    S: Tensor,
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
    need_dx: bool,
) -> list[Tensor]:
    dSs = [shrink(dout, B.t(), None, scale) for dout, B, scale in zip(douts, Bs, scales, strict=True)]
    S_parts = (S_i.contiguous() for S_i in _by_rank(S, As))
    dBs = [outer(dout, S_i, None, wide_first=True) for dout, S_i in zip(douts, S_parts, strict=True)]
    dAs = [outer(x, dS, mask) for dS, mask in zip(dSs, masks, strict=True)]
    dx = None if need_dx else x.new_empty(0)
    if dx is None:
        for dS, A, mask in zip(dSs, As, masks, strict=True):
            dx = expand(dS, A.t(), x.dtype, base=dx, mask=mask)
        assert dx is not None
        for dout, W in zip(douts, Ws, strict=True):
            dx.addmm_(dout, W)
    return [dx, *dAs, *dBs]


def _by_rank(t: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = torch.split_with_sizes(t, [A.shape[0] for A in As], 1)
    return parts


def compile_cases() -> Iterator[CompileCase]:
    """None: it launches kernels of fastpeft_kernels.gpu.lora alone."""
    yield from ()
