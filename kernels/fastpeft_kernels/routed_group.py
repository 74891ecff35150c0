"""The low-rank parts of layers that share their input, q, k and v or gate and up, in a batch of mixed adapters.

What `fastpeft_kernels.routed` computes for one layer, for several of them: one launch makes S of all, one more a layer
and pass adds onto its base's output. For n layers and one adapter a row that is n + 1 launches instead of 2n, whatever
the number of adapters (tests/kernels/test_routed_group.py); in decoding launches are what such a layer costs. Traffic
is that of the layers by themselves, but for x, of which their programs read one tile at a time together, and for S,
which is as wide as the largest rank of all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft_kernels.dispatch import no_autocast, use_triton
from fastpeft_kernels.routed import lora_routed
from fastpeft_kernels.routes import check_base, check_pairs, check_routing, check_scales, routed_input


class RoutedOperands(NamedTuple):
    """What one layer needs beside its input: arguments of `lora_routed`."""

    base: Tensor
    As: Sequence[Tensor]
    Bs: Sequence[Tensor]
    scales: Sequence[float]


def lora_routed_group(
    x: Tensor, members: Sequence[RoutedOperands], rows: Tensor, starts: Tensor, weights: Tensor | None = None
) -> list[Tensor]:
    """`lora_routed` of each member on the same x and routing, without dropout.

    In one op where kernels compute and no gradient is recorded; one after the other elsewhere, with the same bits.

    Args:
        x: (M, K), any strides.
        members: at least one, each with as many slots; their adapters are of one dtype.
        rows, starts, weights: the routing, as in `fastpeft_kernels.routed`.

    Returns:
        One (M, N_i) a member, in its base's dtype, contiguous. Differentiable as `lora_routed` is.

    Raises:
        ValueError: no members, their adapters differ in dtype, or one does not fit (as for `lora_routed`).
    """
    if not members:
        raise ValueError("lora_routed_group needs at least one member, got none")
    if len(dtypes := {A.dtype for member in members for A in member.As[:1]}) > 1:
        raise ValueError(f"the adapters of a group must be of one dtype; got {', '.join(sorted(map(str, dtypes)))}")
    one_by_one = torch.compiler.is_compiling() or torch.is_grad_enabled() or not members[0].As
    if one_by_one or not use_triton(x, members[0].As[0]):
        return [lora_routed(base, x, As, Bs, scales, rows, starts, weights) for base, As, Bs, scales in members]
    x = routed_input(x, members[0].As)
    for member in members:
        check_base(member.base, x)
        check_pairs(member.As, member.Bs, x.shape[1], member.base.shape[1])
        check_routing(x, len(member.As), rows, starts, weights)
        check_scales(member.scales, member.As)
    from fastpeft_kernels.gpu import routed as gpu  # triton is imported when first needed

    bases, *factors = zip(*members, strict=True)
    with no_autocast(x):
        return gpu.lora_group(x, bases, gpu.GroupBanks.of(*factors), rows, starts, weights)


class RepeatedGroup:
    """What adds the adapters of such layers, or of one, step after step: where their factors lie is looked up once.

    The factors, their memory and the scales must stay as they are.

    Args:
        As, Bs, scales: by layer and slot, as in `RoutedOperands`, for kernels.
    """

    def __init__(
        self, As: Sequence[Sequence[Tensor]], Bs: Sequence[Sequence[Tensor]], scales: Sequence[Sequence[float]]
    ) -> None:
        from fastpeft_kernels.gpu import routed as gpu

        self._banks, self._add = gpu.GroupBanks.of(As, Bs, scales), gpu.lora_group

    def add_to_(
        self, outs: Sequence[Tensor], x: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None
    ) -> list[Tensor]:
        """`lora_routed_group` in place, without gradients: outs (M, N_i), contiguous; x (M, K) of the adapters' dtype,
        or of 16 bits where they are fp32."""
        return self._add(x, outs, self._banks.in_order(), rows, starts, weights, overwrite=True)
