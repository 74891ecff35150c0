"""What all routed ops share: checks of their operands, and how lists of gradients pass the compiler.

The routing itself is explained in routed.py.
"""

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter

import torch
from torch import Tensor

from fastpeft_kernels.masks import mask_words

_dtype = attrgetter("dtype")

NARROW = (torch.bfloat16, torch.float16)

# What the kernels keep on a device by the addresses of factors outlives a call. Inductor's CUDA graphs reuse the memory
# that was taken while they were made, and so must leave these ops out.
UNSAFE_TAGS = (torch.Tag.cudagraph_unsafe,)


def routed_input(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x in the dtype that the op reads: (M, K)."""
    if x.ndim != 2:
        raise ValueError(f"x must be (M, K): flatten the batch first; got {tuple(x.shape)}")
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not factors or x.dtype == factors[0].dtype or (factors[0].dtype == torch.float32 and x.dtype in NARROW):
        return x
    return x.to(factors[0].dtype)


def check_factors(factors: Sequence[Tensor], name: str, dim: int, columns: int) -> None:
    """Each is a matrix whose dimension `dim` has `columns` entries, the other one is its rank; all are of one dtype."""
    if not factors:
        raise ValueError(f"{name} must hold a matrix for each slot, got none: call the base layer alone")
    if not torch.compiler.is_compiling() and _all_alike(factors) and _have(factors, dim, columns):
        return
    dtype = factors[0].dtype
    for slot, factor in enumerate(factors):
        shape = factor.shape
        if len(shape) != 2 or shape[dim] != columns:
            expected = f"(r_j, {columns})" if dim else f"({columns}, r_j)"
            raise ValueError(f"{name}[{slot}] must be {expected}; got {tuple(shape)}")
        if factor.dtype != dtype:
            raise ValueError(f"{name} must be of one dtype; got {dtype} for slot 0 and {factor.dtype} for slot {slot}")


# The same questions about all factors at once: asked one by one, 64 answers take as long as their products for a token.


def _all_alike(factors: Sequence[Tensor]) -> bool:
    """Whether they are matrices of one dtype."""
    return set(map(Tensor.dim, factors)) == {2} and len(set(map(_dtype, factors))) == 1


def _have(factors: Sequence[Tensor], dim: int, columns: int) -> bool:
    return set(map(Tensor.size, factors, repeat(dim))) == {columns}


def check_base(base: Tensor, x: Tensor) -> None:
    if base.ndim != 2 or base.shape[0] != x.shape[0]:
        raise ValueError(f"base must be (M, N) of x's {x.shape[0]} rows; got {tuple(base.shape)}")


def check_pairs(As: Sequence[Tensor], Bs: Sequence[Tensor], K: int, N: int) -> None:
    """A (r_j, K) and B (N, r_j) of one dtype for every slot."""
    if not torch.compiler.is_compiling() and As and _all_alike([*As, *Bs]):
        ranks_fit = ranks_of(As, 0) == ranks_of(Bs, 1)
        if ranks_fit and _have(As, 1, K) and _have(Bs, 0, N):
            return
    check_factors(As, "As", 1, K)
    check_factors(Bs, "Bs", 0, N)
    ranks = ranks_of(As, 0), ranks_of(Bs, 1)
    if ranks[0] != ranks[1] or As[0].dtype != Bs[0].dtype:
        raise ValueError(
            f"As and Bs must fit each other slot by slot; got ranks {ranks[0]} of {As[0].dtype} and {ranks[1]} of "
            f"{Bs[0].dtype}"
        )


def ranks_of(factors: Sequence[Tensor], dim: int) -> list[int]:
    """The rank of each slot, which is dimension `dim` of its factor."""
    if torch.compiler.is_compiling():
        return [factor.shape[dim] for factor in factors]
    return list(map(Tensor.size, factors, repeat(dim)))


def check_routing(x: Tensor, slots: int, rows: Tensor, starts: Tensor, weights: Tensor | None) -> None:
    """Whether the three tensors route the rows of x over so many slots, by shape: what is in them is on the device."""
    M = x.shape[0]
    if rows.ndim != 2 or rows.shape[1] != M or rows.dtype != torch.int32 or not rows.is_contiguous():
        raise ValueError(
            f"rows must be (P, M) = (P, {M}) of int32, contiguous; got {tuple(rows.shape)} of {rows.dtype}"
        )
    shape = (rows.shape[0], slots + 1)
    if starts.shape != shape or starts.dtype != torch.int32 or not starts.is_contiguous():
        raise ValueError(
            f"starts must be (P, slots + 1) = {shape} of int32, contiguous; got {tuple(starts.shape)} of {starts.dtype}"
        )
    if weights is None:
        return
    if weights.shape != rows.shape or weights.dtype != torch.float32 or not weights.is_contiguous():
        raise ValueError(
            f"weights must be (P, M) = {tuple(rows.shape)} of float32, contiguous; got {tuple(weights.shape)} of "
            f"{weights.dtype}"
        )
    if weights.requires_grad:
        raise ValueError("routed ops have no gradient for weights: detach them")


def check_scales(scales: Sequence[float], factors: Sequence[Tensor]) -> None:
    if len(scales) != len(factors):
        raise ValueError(f"scales needs one number a slot: expected {len(factors)}, got {len(scales)}")


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    shape = (x.shape[0], mask_words(x.shape[1]))
    if mask.shape != shape or mask.dtype != torch.int32:
        raise ValueError(f"mask must be (M, ⌈K / 32⌉) = {shape} of int32; got {tuple(mask.shape)} of {mask.dtype}")


def joined(grads: Sequence[Tensor]) -> Tensor:
    """An op's outputs share no memory, and its gradients may be parts of one tensor: as that tensor, (Σ elements,)."""
    return torch.cat([grad.reshape(-1) for grad in grads])


def parted(flat: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """What was `joined`, in the shapes of `factors`."""
    parts: Sequence[Tensor] = torch.split_with_sizes(flat, [factor.numel() for factor in factors])
    return [part.view(factor.shape) for part, factor in zip(parts, factors, strict=True)]
