"""Planes of partial sums: what a reduction that is split over programs leaves, and the kernel that adds them up.

A plane has one writer, and planes are added in a fixed order: the same bits on every run, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._numerics import round_to

SUM_PLANES, SUM_BLOCK = 8, 256  # planes and elements that a program takes at once


@triton.jit
def store_plane(plane_ptr, acc, offs_c, offs_r, C, r, stride_pc, stride_pr):
    mask = (offs_c < C)[:, None] & (offs_r < r)[None, :]
    ptrs = plane_ptr + offs_c[:, None] * stride_pc + offs_r[None, :] * stride_pr
    tl.store(ptrs, round_to(acc, plane_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_block(plane_ptr, out_ptr, size, planes, block, SUM_PLANES: tl.constexpr, SUM_BLOCK: tl.constexpr):
    offs = block * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    acc = tl.zeros((SUM_PLANES, SUM_BLOCK), tl.float32)
    for start in range(0, planes, SUM_PLANES):
        offs_p = (start + tl.arange(0, SUM_PLANES)).to(tl.int64)
        inside = (offs_p < planes)[:, None] & (offs < size)[None, :]
        acc += tl.load(plane_ptr + offs_p[:, None] * size + offs[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + offs, round_to(tl.sum(acc, axis=0), out_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _sum_planes_kernel(
    first_ptr, first_out_ptr, second_ptr, second_out_ptr,  # (planes, size), (size,), twice
    first_size, first_planes, second_size, second_planes,
    SUM_PLANES: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first_blocks = tl.cdiv(first_size, SUM_BLOCK)
    if block < first_blocks:
        _sum_block(first_ptr, first_out_ptr, first_size, first_planes, block, SUM_PLANES, SUM_BLOCK)
    else:
        block -= first_blocks
        _sum_block(second_ptr, second_out_ptr, second_size, second_planes, block, SUM_PLANES, SUM_BLOCK)


def sum_planes(*groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The sum over the first dimension of each group, in `dtype`: two groups a launch.

    A single plane is already its own sum, in `dtype`, and costs nothing.
    """
    sums = tuple(
        planes[0] if len(planes) == 1 else torch.empty(planes.shape[1:], dtype=dtype, device=planes.device)
        for planes in groups
    )
    work = [(planes, out) for planes, out in zip(groups, sums, strict=True) if len(planes) > 1 and out.numel()]
    for pair in (work[i : i + 2] for i in range(0, len(work), 2)):
        (first, first_out), (second, second_out) = pair[0], pair[-1]
        second_size = second_out.numel() if len(pair) == 2 else 0
        grid = (triton.cdiv(first_out.numel(), SUM_BLOCK) + triton.cdiv(second_size, SUM_BLOCK),)
        with torch.cuda.device_of(first):
            _sum_planes_kernel[grid](
                first, first_out, second, second_out, first_out.numel(), len(first), second_size, len(second),
                SUM_PLANES, SUM_BLOCK,
            )  # fmt: skip
    return sums
