"""Kernels of fastpeft_kernels.lora_group: both passes over the input that its members share.

    shrink       S_i = s_i · drop_i(x) A_iᵀ for all i                                       one pass over x
    input pass   dA_i = dS_iᵀ drop_i(x) for all i, and dx's low-rank part Σ drop_i'(dS_i A_i)   one pass over x

Both load a tile of x once and take it through every member, with that member's own mask: at the same bytes of x as one
layer. A member has a block of the rank to itself, so that ranks and scalings may differ and no A is copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._lora_backward import input_pass, outer_planes
from fastpeft_kernels.gpu._lora_forward import expand, shrink, shrink_planes
from fastpeft_kernels.gpu._numerics import exact_product, keep, kept, product_for, round_to
from fastpeft_kernels.gpu._planes import store_plane
from fastpeft_kernels.tiles import GroupKernel, GroupTile, group_launches, group_tile, row_bands, split_columns

SLOTS = 3  # members that a kernel has arguments for


@triton.jit
def _shrink_member(
    x, acc, a_ptr, mask_ptr, offs_m, offs_k, inside, end, r, K, stride_mask,
    HAS_MASK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + drop_i(x) A_iᵀ: (BLOCK_M, BLOCK_R)."""
    offs_r = tl.arange(0, BLOCK_R)
    if HAS_MASK:
        x = keep(x, mask_ptr, stride_mask, offs_m, offs_k, inside)
    mask_a = (offs_r < r)[None, :] & (offs_k < end)[:, None]
    a = tl.load(a_ptr + offs_r[None, :] * K + offs_k[:, None], mask=mask_a, other=0.0)  # (BLOCK_C, BLOCK_R)
    return exact_product(x, a, acc)


@triton.jit
def _store_member(s_ptr, acc, scale, offs_m, first, r, M, stride_sm, BLOCK_R: tl.constexpr):
    offs_r = tl.arange(0, BLOCK_R)
    mask = (offs_m < M)[:, None] & (offs_r < r)[None, :]
    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + (first + offs_r)[None, :]
    tl.store(s_ptrs, round_to(acc * scale, s_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_shrink_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, mask0_ptr, mask1_ptr, mask2_ptr, s_ptr,
    # (M, K), (r_i, K), (M, ⌈K / 32⌉), (splits, M, Σr_i); rows of x contiguous, A_i as a whole
    M, K, r0, r1, r2, k_per_split, scale0, scale1, scale2,
    stride_xm, stride_mask, stride_sp, stride_sm,
    MEMBERS: tl.constexpr, MASKED: tl.constexpr,  # bit i: member i has a mask
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.minimum(K, (split + 1) * k_per_split)
    acc0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc1, acc2 = acc0, acc0
    for start in range(split * k_per_split, end, BLOCK_C):
        offs_k = start + tl.arange(0, BLOCK_C)
        inside = (offs_m < M)[:, None] & (offs_k < end)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=inside, other=0.0)
        acc0 = _shrink_member(
            x, acc0, a0_ptr, mask0_ptr, offs_m, offs_k, inside, end, r0, K, stride_mask, MASKED % 2 == 1, BLOCK_R
        )
        if MEMBERS > 1:
            acc1 = _shrink_member(
                x, acc1, a1_ptr, mask1_ptr, offs_m, offs_k, inside, end, r1, K, stride_mask, MASKED // 2 % 2 == 1,
                BLOCK_R,
            )  # fmt: skip
        if MEMBERS > 2:
            acc2 = _shrink_member(
                x, acc2, a2_ptr, mask2_ptr, offs_m, offs_k, inside, end, r2, K, stride_mask, MASKED // 4 % 2 == 1,
                BLOCK_R,
            )  # fmt: skip
    s_ptr += split * stride_sp
    _store_member(s_ptr, acc0, scale0, offs_m, 0, r0, M, stride_sm, BLOCK_R)
    if MEMBERS > 1:
        _store_member(s_ptr, acc1, scale1, offs_m, r0, r1, M, stride_sm, BLOCK_R)
    if MEMBERS > 2:
        _store_member(s_ptr, acc2, scale2, offs_m, r0 + r1, r2, M, stride_sm, BLOCK_R)


def group_shrink_planes(
    x: Tensor, As: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Sequence[float]
) -> Tensor:
    """S = [S_1 S_2 ...]: (1, M, Σr) in the A's dtype, or fp32 planes (splits, M, Σr) whose sum is S.

    One pass over x for as many members as `group_launches` puts together; one for each member where a tile is missing
    or rows are not contiguous.
    """
    t = _fitting_tile("shrink", x, As, masks)
    if len(As) == 1:
        return shrink_planes(x, As[0], masks[0], scales[0])
    if t is None:
        parts = [shrink(x, A, mask, scale) for A, mask, scale in zip(As, masks, scales, strict=True)]
        return torch.cat(parts, dim=1).unsqueeze(0)
    (M, K), R = x.shape, sum(A.shape[0] for A in As)
    row_blocks, splits, k_per_split = split_columns(M, K, t)
    S = torch.empty((splits, M, R), dtype=As[0].dtype if splits == 1 else torch.float32, device=x.device)
    first = 0
    for part in group_launches(len(As), t.members):
        ranks = [A.shape[0] for A in As[part]]
        if M and sum(ranks):
            with torch.cuda.device_of(x):
                _group_shrink_kernel[(row_blocks, splits)](
                    x, *_filled(As[part]), *_filled(_pointers(masks[part], x)), S[:, :, first:],
                    M, K, *_filled(ranks), k_per_split, *_filled(scales[part]),
                    x.stride(0), _mask_stride(masks[part]), S.stride(0), S.stride(1), len(ranks), _masked(masks[part]),
                    t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
                )  # fmt: skip
        first += sum(ranks)
    return S


@triton.jit
def _load_rows(a_ptr, offs_k, r, K, BLOCK_R: tl.constexpr):
    offs_r = tl.arange(0, BLOCK_R)
    mask = (offs_r < r)[:, None] & (offs_k < K)[None, :]
    return tl.load(a_ptr + offs_r[:, None] * K + offs_k[None, :], mask=mask, other=0.0)  # (BLOCK_R, BLOCK_C)


@triton.jit
def _input_member(
    x, dx, da, s_ptr, a, mask_ptr, offs_m, offs_k, inside, end, r, stride_mask, dtype: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_FACTORS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(dx + drop_i'(dS_i A_i), dA_iᵀ + drop_i(x)ᵀ dS_i): (BLOCK_M, BLOCK_C), (BLOCK_C, BLOCK_R)."""
    offs_r = tl.arange(0, BLOCK_R)
    mask_s = (offs_m < end)[:, None] & (offs_r < r)[None, :]
    s = tl.load(s_ptr + offs_m[:, None] * r + offs_r[None, :], mask=mask_s, other=0.0)
    if HAS_MASK:
        bits = kept(mask_ptr, stride_mask, offs_m, offs_k, inside)
        if NEED_FACTORS:
            x = tl.where(bits, x, tl.zeros_like(x))
        if NEED_DX:
            dx += tl.where(bits, product_for(s, a, tl.zeros_like(dx), dtype), 0.0)
    elif NEED_DX:
        dx = product_for(s, a, dx, dtype)
    if NEED_FACTORS:
        da = exact_product(tl.trans(x), s, da)
    return dx, da


@triton.jit
def _group_input_kernel(
    x_ptr, s0_ptr, s1_ptr, s2_ptr, a0_ptr, a1_ptr, a2_ptr, mask0_ptr, mask1_ptr, mask2_ptr,
    plane0_ptr, plane1_ptr, plane2_ptr, dx_ptr,
    # (M, K), (M, r_i), (r_i, K), (M, ⌈K / 32⌉), (bands, r_i, K), (M, K); rows of x contiguous, the others as a whole
    M, K, r0, r1, r2, rows,
    stride_xm, stride_mask,
    MEMBERS: tl.constexpr, MASKED: tl.constexpr, NEED_DX: tl.constexpr, NEED_FACTORS: tl.constexpr,
    ADD: tl.constexpr,  # onto what is in dx
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = dx_ptr.dtype.element_ty
    strip, band = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_k = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_k = (offs_k < K)[None, :]
    a0 = _load_rows(a0_ptr, offs_k, r0, K, BLOCK_R)
    da0 = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    a1, a2, da1, da2 = a0, a0, da0, da0
    if MEMBERS > 1:
        a1 = _load_rows(a1_ptr, offs_k, r1, K, BLOCK_R)
    if MEMBERS > 2:
        a2 = _load_rows(a2_ptr, offs_k, r2, K, BLOCK_R)
    end = tl.minimum(M, (band + 1) * rows)
    for start in range(band * rows, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        inside = (offs_m < end)[:, None] & mask_k
        x = tl.zeros((BLOCK_M, BLOCK_C), x_ptr.dtype.element_ty)
        if NEED_FACTORS:
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=inside, other=0.0)
        dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
        dx = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if ADD:
            dx = tl.load(dx_ptrs, mask=inside, other=0.0).to(tl.float32)
        dx, da0 = _input_member(
            x, dx, da0, s0_ptr, a0, mask0_ptr, offs_m, offs_k, inside, end, r0, stride_mask, dtype,
            NEED_DX, NEED_FACTORS, MASKED % 2 == 1, BLOCK_R,
        )  # fmt: skip
        if MEMBERS > 1:
            dx, da1 = _input_member(
                x, dx, da1, s1_ptr, a1, mask1_ptr, offs_m, offs_k, inside, end, r1, stride_mask, dtype,
                NEED_DX, NEED_FACTORS, MASKED // 2 % 2 == 1, BLOCK_R,
            )  # fmt: skip
        if MEMBERS > 2:
            dx, da2 = _input_member(
                x, dx, da2, s2_ptr, a2, mask2_ptr, offs_m, offs_k, inside, end, r2, stride_mask, dtype,
                NEED_DX, NEED_FACTORS, MASKED // 4 % 2 == 1, BLOCK_R,
            )  # fmt: skip
        if NEED_DX:
            tl.store(dx_ptrs, round_to(dx, dtype), mask=inside)
    offs_r = tl.arange(0, BLOCK_R)
    if NEED_FACTORS:
        store_plane(plane0_ptr + band * K * r0, da0, offs_k, offs_r, K, r0, 1, K)
    if NEED_FACTORS and MEMBERS > 1:
        store_plane(plane1_ptr + band * K * r1, da1, offs_k, offs_r, K, r1, 1, K)
    if NEED_FACTORS and MEMBERS > 2:
        store_plane(plane2_ptr + band * K * r2, da2, offs_k, offs_r, K, r2, 1, K)


def group_input_pass(
    x: Tensor,
    dSs: Sequence[Tensor],
    As: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Σ drop_i'(dS_i A_i): (M, K) in x's dtype, and for each member planes of dA_i = dS_iᵀ drop_i(x): (bands, r_i, K).

    Planes are fp32 where there is more than one. What is not needed is empty, dx of shape (0,); without planes x is not
    read. One pass over x for as many members as `group_launches` puts together, whose sum is rounded once; one or two
    for each member where a tile is missing or rows are not contiguous.
    """
    t = _fitting_tile("input_pass", x, As, masks)
    if t is None:
        return _input_passes(x, dSs, As, masks, need_dx, need_factors)
    M, K = x.shape
    strips = triton.cdiv(K, t.BLOCK_C)
    bands, rows = row_bands(M, strips, t.BLOCK_M)
    dtype = As[0].dtype if bands == 1 else torch.float32
    planes = [torch.empty((bands, *A.shape), dtype=dtype, device=x.device) for A in As if need_factors]
    dx = torch.empty((M, K) if need_dx else 0, dtype=x.dtype, device=x.device)
    for part in group_launches(len(As), t.members):
        ranks = [A.shape[0] for A in As[part]]
        if K:
            with torch.cuda.device_of(x):
                _group_input_kernel[(strips, bands)](
                    x, *_filled(dSs[part]), *_filled(As[part]), *_filled(_pointers(masks[part], x)),
                    *_filled(planes[part] or [x]), dx, M, K, *_filled(ranks), rows,
                    x.stride(0), _mask_stride(masks[part]), len(ranks), _masked(masks[part]),
                    need_dx, need_factors, need_dx and part.start > 0,
                    t.BLOCK_M, t.BLOCK_C, t.BLOCK_R, num_warps=t.num_warps, num_stages=t.num_stages,
                )  # fmt: skip
    return dx, planes


def _input_passes(
    x: Tensor,
    dSs: Sequence[Tensor],
    As: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor, list[Tensor]]:
    """`group_input_pass` by the kernels of one layer."""
    if not need_dx:
        return x.new_empty(0), [outer_planes(x, dS, mask) for dS, mask in zip(dSs, masks, strict=True)]
    if need_factors:
        dx, first = input_pass(x, dSs[0], As[0], masks[0])
        planes = [first, *(outer_planes(x, dS, mask) for dS, mask in zip(dSs[1:], masks[1:], strict=True))]
    else:
        dx, planes = expand(dSs[0], As[0].t(), x.dtype, mask=masks[0]), []
    for dS, A, mask in zip(dSs[1:], As[1:], masks[1:], strict=True):
        dx = expand(dS, A.t(), x.dtype, base=dx, mask=mask)
    return dx, planes


def _fitting_tile(
    kernel: GroupKernel, x: Tensor, As: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> GroupTile | None:
    """The tile of a kernel of this module; None where it cannot run on these operands, or would serve one layer."""
    dense = all(t is None or t.is_contiguous() for t in [*As, *masks])
    if len(As) == 1 or not dense or x.stride(1) != 1:
        return None
    return group_tile(kernel, x.dtype, As[0].dtype, max(A.shape[0] for A in As))


# Kernels take SLOTS of everything: those that are not there repeat the first and are not looked at.


def _filled(values: Sequence[Any]) -> list[Any]:
    return [*values, *[values[0]] * (SLOTS - len(values))]


def _pointers(masks: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    return [x if mask is None else mask for mask in masks]


def _mask_stride(masks: Sequence[Tensor | None]) -> int:
    """Words of a row: one number for all masks, as they are contiguous."""
    return next((mask.stride(0) for mask in masks if mask is not None), 0)


def _masked(masks: Sequence[Tensor | None]) -> int:
    return sum(1 << i for i, mask in enumerate(masks) if mask is not None)
