"""Kernels of fastpeft_kernels.routed_columns.

Launches, whatever the number of slots: gather 1, its backward those of torch's sort and one; scale 1, its backward 3.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu._bank import (
    ADDRESS,
    BY_RANK,
    FIELDS,
    FIRST,
    RANK,
    STRIDE_C,
    factor_bank,
    factor_ptrs,
    find_tile,
    load_factor,
    load_scale,
    slots_of,
    vector_bank,
)
from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._numerics import round_to
from fastpeft_kernels.gpu._routed import routed_sum
from fastpeft_kernels.routes import parted
from fastpeft_kernels.tiles import row_bands

GATHER_M, GATHER_R = 32, 16  # lines and ranks of a program of gather
RUN = 64  # lines with one id that are summed together
SCALE_M, SCALE_C = 16, 128  # rows and columns of a program of scale


@triton.jit
def _routed_gather_kernel(
    ids_ptr, table_ptr, rows_ptr, starts_ptr, weights_ptr, s_ptr,
    # (M,), a bank of (r_j, V), (P, M), (P, A + 1), (P, M), (P, M, R)
    M, V, R, A, rank_blocks, stride_ids,
    DTYPE: tl.constexpr, LAYOUT: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile, first_r = tl.program_id(0) // rank_blocks, tl.program_id(0) % rank_blocks * BLOCK_R
    p = tl.program_id(1)
    slot, begin, end = find_tile(starts_ptr + p * (A + 1), tile, M, A, BLOCK_M)
    if begin >= end:
        return
    a_ptr, r = load_factor(table_ptr, slot, DTYPE, LAYOUT, False)
    lines = begin + tl.arange(0, BLOCK_M)
    mask_m = lines < end
    offs_m = tl.load(rows_ptr + p * M + lines, mask=mask_m, other=0).to(tl.int64)
    ids = tl.load(ids_ptr + offs_m * stride_ids, mask=mask_m, other=0).to(tl.int64)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    a_ptrs = factor_ptrs(table_ptr, slot, a_ptr, r, offs_r[None, :], ids[:, None], V, LAYOUT)
    known = mask_m & (ids >= 0) & (ids < V)  # the base embedding reports what is not
    s = tl.load(a_ptrs, mask=known[:, None] & (offs_r < r)[None, :], other=0.0).to(tl.float32)
    s *= load_scale(table_ptr, slot)
    if HAS_WEIGHTS:
        s *= tl.load(weights_ptr + p * M + lines, mask=mask_m, other=0.0)[:, None]
    s_ptrs = s_ptr + (p * M + lines).to(tl.int64)[:, None] * R + offs_r[None, :]
    tl.store(s_ptrs, round_to(s, s_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_r < R)[None, :])


def gather(
    ids: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
) -> Tensor:
    bank = factor_bank(factors, 0, scales)
    (P, M), R, V = rows.shape, bank.largest, factors[0].shape[1]
    S = torch.empty((P, M, R), dtype=factors[0].dtype, device=ids.device)
    if S.numel():
        rank_blocks = triton.cdiv(R, GATHER_R)
        with torch.cuda.device_of(ids):
            _routed_gather_kernel[((M // GATHER_M + bank.slots + 1) * rank_blocks, P)](
                ids, bank.table, rows, starts, S if weights is None else weights, S,
                M, V, R, bank.slots, rank_blocks, ids.stride(0),
                bank.dtype, bank.layout, weights is not None, GATHER_M, GATHER_R,
            )  # fmt: skip
    return S


@triton.jit
def _routed_scatter_kernel(
    ds_ptr, keys_ptr, order_ptr, slots_ptr, table_ptr, weights_ptr, out_ptr,
    # (P M, R), (P M,) sorted and where each came from, (P M,), a bank of (r_j, V), (P M,), (Σ r_j V,) zeros
    total, V, R, A,
    HAS_WEIGHTS: tl.constexpr, RUN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first program of each run of equal keys, slot · V + id, sums up its lines, in their order."""
    first, first_r = tl.program_id(0), tl.program_id(1) * BLOCK_R
    key = tl.load(keys_ptr + first)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    slot = tl.load(slots_ptr + tl.load(order_ptr + first))
    r = tl.load(table_ptr + slot * FIELDS + RANK).to(tl.int32)
    if key == before or first_r >= r:
        return
    offs_r = first_r + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R,), tl.float32)
    start, going = first, key >= 0
    while going:
        offs = start + tl.arange(0, RUN)
        same = tl.load(keys_ptr + offs, mask=offs < total, other=-1) == key
        lines = tl.load(order_ptr + offs, mask=same, other=0)
        mask = same[:, None] & (offs_r < r)[None, :]
        ds = tl.load(ds_ptr + lines[:, None] * R + offs_r[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            ds *= tl.load(weights_ptr + lines, mask=same, other=0.0)[:, None]
        acc += tl.sum(ds, 0)
        start += RUN
        going = tl.sum(same.to(tl.int32), 0) == RUN
    acc *= load_scale(table_ptr, slot)
    out_ptr += tl.load(table_ptr + slot * FIELDS + FIRST) * V + (key - slot.to(tl.int64) * V)
    tl.store(out_ptr + offs_r.to(tl.int64) * V, round_to(acc, out_ptr.dtype.element_ty), mask=offs_r < r)


def gather_backward(
    dS: Tensor,
    ids: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
) -> list[Tensor]:
    """Lines are sorted by slot and id, and every run has one writer: the same bits on every run, no atomics."""
    bank = factor_bank(factors, 0, scales)
    (P, M), R, V = rows.shape, bank.largest, factors[0].shape[1]
    out = torch.zeros(bank.total * V, dtype=dS.dtype, device=dS.device)
    if P * M and out.numel():
        lines = torch.arange(M, dtype=torch.int32, device=ids.device).expand(P, M).contiguous()
        slots = torch.searchsorted(starts[:, 1:].contiguous(), lines, right=True, out_int32=True)  # the last: of nobody
        keys, order = torch.sort((slots.long() * V + ids.long()[rows.long()]).view(-1), stable=True)
        with torch.cuda.device_of(ids):
            _routed_scatter_kernel[(P * M, triton.cdiv(R, GATHER_R))](
                dS.contiguous(), keys, order, slots, bank.table, dS if weights is None else weights, out,
                P * M, V, R, bank.slots, weights is not None, RUN, GATHER_R,
            )  # fmt: skip
    return parted(out, factors)


@triton.jit
def _routed_scale_kernel(
    y_ptr, table_ptr, rows_ptr, starts_ptr, weights_ptr, lines_ptr, bias_ptr, out_ptr,
    # (M, C), a bank of (C,), (P, M), (P, A + 1), (P, M), (P - 1, M): the line of each row in later passes, (C,), (M, C)
    M, C, A,
    stride_ym, stride_yc, stride_bias,
    P: tl.constexpr, DTYPE: tl.constexpr, LAYOUT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = first < M
    offs_m = tl.load(rows_ptr + first, mask=mask_m, other=0).to(tl.int64)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = mask_m[:, None] & (offs_c < C)[None, :]
    f = tl.zeros((BLOCK_M, BLOCK_C), tl.float32) + 1.0
    touched = first < 0
    for p in tl.static_range(P):
        lines = first
        if p > 0:
            lines = tl.load(lines_ptr + (p - 1) * M + offs_m, mask=mask_m, other=0)
        slots = slots_of(starts_ptr + p * (A + 1), lines, A, 32)
        address = tl.load(table_ptr + slots * FIELDS + ADDRESS, mask=mask_m, other=0)
        has = address != 0
        stride = 1
        if LAYOUT != BY_RANK:
            stride = tl.load(table_ptr + slots * FIELDS + STRIDE_C, mask=mask_m, other=0)[:, None]
        l_ptrs = address.to(tl.pointer_type(DTYPE))[:, None] + offs_c[None, :] * stride
        scale = tl.load(l_ptrs, mask=has[:, None] & inside, other=1.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + p * M + lines, mask=mask_m & has, other=0.0)
            change = weight[:, None] * (scale - 1.0)
            # as without weights, to the bit: what other rows carry must not show
            f = tl.where((p == 0) & (weight == 1.0)[:, None], scale, f + change)
        elif p == 0:
            f = scale
        else:
            f += scale - 1.0
        touched = touched | has
    y = tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_c[None, :] * stride_yc, mask=inside, other=0.0)
    y = y.to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_c * stride_bias, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
        out = (y - bias) * f + bias
    else:
        out = y * f
    out = tl.where(touched[:, None], out, y)
    tl.store(out_ptr + offs_m[:, None] * C + offs_c[None, :], round_to(out, out_ptr.dtype.element_ty), mask=inside)


def scale(
    y: Tensor,
    vectors: Sequence[Tensor | None],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    bank, (P, M), C = vector_bank(vectors), rows.shape, y.shape[1]
    out = torch.empty((M, C), dtype=y.dtype, device=y.device)
    if not out.numel():
        return out
    lines = rows
    if P > 1:
        numbers = torch.arange(M, dtype=torch.int32, device=y.device).expand(P - 1, M)
        lines = torch.empty_like(rows[1:]).scatter_(1, rows[1:].long(), numbers)
    with torch.cuda.device_of(y):
        _routed_scale_kernel[(triton.cdiv(M, SCALE_M), triton.cdiv(C, SCALE_C))](
            y, bank.table, rows, starts, y if weights is None else weights, lines, y if bias is None else bias, out,
            M, C, bank.slots, *y.stride(), 0 if bias is None else bias.stride(0),
            P, bank.dtype, bank.layout, weights is not None, bias is not None, SCALE_M, SCALE_C,
        )  # fmt: skip
    return out


@triton.jit
def _routed_dscale_kernel(
    dout_ptr, y_ptr, table_ptr, rows_ptr, starts_ptr, weights_ptr, bias_ptr, plane_ptr,
    # (M, C), (M, C), a bank of (C,), (P, M), (P, A + 1), (P, M), (C,), (P, bands, C)
    M, C, A, band, bands,
    stride_dm, stride_dc, stride_ym, stride_yc, stride_bias,
    HAS_WEIGHTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    number, p = tl.program_id(1), tl.program_id(2)
    slot, begin, end = find_tile(starts_ptr + p * (A + 1), number, M, A, band)
    end = tl.minimum(end, begin + band)
    if begin >= end or tl.load(table_ptr + slot * FIELDS + ADDRESS) == 0:
        return
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_c * stride_bias, mask=mask_c, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(begin, end, BLOCK_M):
        lines = start + tl.arange(0, BLOCK_M)
        mask_m = lines < end
        offs_m = tl.load(rows_ptr + p * M + lines, mask=mask_m, other=0).to(tl.int64)
        inside = mask_m[:, None] & mask_c[None, :]
        dout_ptrs = dout_ptr + offs_m[:, None] * stride_dm + offs_c[None, :] * stride_dc
        dout = tl.load(dout_ptrs, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_c[None, :] * stride_yc, mask=inside, other=0.0)
        if HAS_WEIGHTS:
            dout *= tl.load(weights_ptr + p * M + lines, mask=mask_m, other=0.0)[:, None]
        acc += tl.sum(dout * (y.to(tl.float32) - bias[None, :]), 0)
    tl.store(plane_ptr + (p * bands + number).to(tl.int64) * C + offs_c, acc, mask=mask_c)


def scale_backward(
    dout: Tensor,
    y: Tensor,
    vectors: Sequence[Tensor | None],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """dy is `scale` of dout, without a bias. A band of a slot's rows leaves one plane of dl_j, summed afterwards."""
    bank, (P, M), C = vector_bank(vectors), rows.shape, y.shape[1]
    strips = triton.cdiv(C, SCALE_C)
    _, band = row_bands(M, strips, SCALE_M)
    bands = M // band + bank.slots + 1
    planes = torch.empty((P, bands, C), dtype=torch.float32, device=y.device)
    with torch.cuda.device_of(y):
        _routed_dscale_kernel[(strips, bands, P)](
            dout, y, bank.table, rows, starts, y if weights is None else weights, y if bias is None else bias, planes,
            M, C, bank.slots, band, bands, *dout.stride(), *y.stride(), 0 if bias is None else bias.stride(0),
            weights is not None, bias is not None, SCALE_M, SCALE_C,
        )  # fmt: skip
    given = [vector for vector in vectors if vector is not None]
    grads = parted(routed_sum(planes, bank, starts, given[0].dtype, C, band), given)
    by_slot = [y.new_empty(0) if vector is None else grads.pop(0) for vector in vectors]
    return scale(dout, vectors, rows, starts, weights, None), by_slot


# What the compile tests build: every kernel with every flag, P = 2.


def compile_cases() -> Iterator[CompileCase]:
    kinds = {
        **dict.fromkeys(("y_ptr", "dout_ptr", "bias_ptr"), "*bf16"),
        **dict.fromkeys(("rows_ptr", "starts_ptr", "lines_ptr", "slots_ptr"), "*i32"),
        **dict.fromkeys(("ids_ptr", "keys_ptr", "order_ptr", "table_ptr"), "*i64"),
        **dict.fromkeys(("weights_ptr", "plane_ptr", "s_ptr", "ds_ptr"), "*fp32"),
    }  # fmt: skip
    flags = {"HAS_WEIGHTS": True, "HAS_BIAS": True, "DTYPE": tl.float32, "LAYOUT": BY_RANK.value, "P": 2}
    sizes = {
        _routed_gather_kernel: {"BLOCK_M": GATHER_M, "BLOCK_R": GATHER_R},
        _routed_scatter_kernel: {"RUN": RUN, "BLOCK_R": GATHER_R},
        _routed_scale_kernel: {"BLOCK_M": SCALE_M, "BLOCK_C": SCALE_C},
        _routed_dscale_kernel: {"BLOCK_M": SCALE_M, "BLOCK_C": SCALE_C},
    }
    for fn, blocks in sizes.items():
        constexprs = {name: value for name, value in {**flags, **blocks}.items() if name in fn.arg_names}
        out = "*fp32" if fn is _routed_scatter_kernel else "*bf16"
        signature = {
            name: "constexpr" if name in constexprs else {**kinds, "out_ptr": out}.get(name, "i32")
            for name in fn.arg_names
        }
        name = fn.fn.__name__.removeprefix("_routed_").removesuffix("_kernel")
        yield CompileCase(name, fn, signature, constexprs, uses_matrix=False, unaligned=("R", "A", "band", "bands"))
