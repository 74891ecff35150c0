"""The op of fastpeft_kernels.lora_group: passes over x for all members at once, all else member by member.

Launches beside the base products, n members in one launch of each: shrink and n expands forward; n output passes, sums
of dS's planes by pairs, input pass, sums of the planes of dA and dB by pairs backward: at most 5n / 2 + 2. Bytes,
forward + backward, 16-bit x, N = Σ N_i: 8MK + 6MN, 3nMK/8 more with dropout, and 2MK for each base product of dx but
the first, which accumulates onto the ones before it (tests/kernels/test_group_budget.py). Where all factors are frozen
shrinks stand for output passes, and the input pass does not read x.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch
import triton
from torch import Tensor

from fastpeft_kernels.gpu import _lora_group
from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._lora_backward import output_planes
from fastpeft_kernels.gpu._lora_forward import expand_planes, shrink_planes
from fastpeft_kernels.gpu._lora_group import group_input_pass, group_shrink_planes
from fastpeft_kernels.gpu._planes import sum_planes
from fastpeft_kernels.gpu.lora import MIXES
from fastpeft_kernels.tiles import GROUP_TILES, GroupKernel, GroupTile, units


def lora_group(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
) -> list[Tensor]:
    planes = group_shrink_planes(x, As, masks, scales)
    S = planes[0] if len(planes) == 1 else torch.empty(planes.shape[1:], dtype=As[0].dtype, device=x.device)
    outs = []
    for part, S_i, W, bias, B in zip(_by_rank(planes, As), _by_rank(S, As), Ws, biases, Bs, strict=True):
        out, _ = expand_planes(part, B, x.dtype, bias=bias, total=S_i)
        outs.append(out.addmm_(x, W.t()))
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
    need_factors: bool,
) -> list[Tensor]:
    dS_planes: Sequence[Tensor]
    dB_planes: Sequence[Tensor]
    if need_factors:
        parts = zip(douts, Bs, _by_rank(S, As), scales, strict=True)
        dS_planes, dB_planes = zip(*(output_planes(*part) for part in parts), strict=True)
    else:
        rest = zip(douts, Bs, scales, strict=True)
        dS_planes, dB_planes = [shrink_planes(dout, B.t(), None, scale) for dout, B, scale in rest], []
    dSs = sum_planes(*dS_planes, dtype=S.dtype)
    dx, dA_planes = group_input_pass(x, dSs, As, masks, need_dx, need_factors)
    grads = sum_planes(*dA_planes, *dB_planes, dtype=S.dtype)
    if need_dx:
        for dout, W in zip(douts, Ws, strict=True):
            dx.addmm_(dout, W)
    return [dx, *grads]


def _by_rank(t: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    """[S_1 S_2 ...] in its parts: slices of columns."""
    parts: Sequence[Tensor] = torch.split_with_sizes(t, [A.shape[0] for A in As], -1)
    return parts


# What the compile tests build: every tile at the most members that it takes, for every mix of dtypes; at fewer, and
# without masks, for the most usual mix.


def compile_cases() -> Iterator[CompileCase]:
    kernels: dict[GroupKernel, triton.JITFunction] = {
        "shrink": _lora_group._group_shrink_kernel,
        "input_pass": _lora_group._group_input_kernel,
    }
    for (kernel, fn), mix in product(kernels.items(), MIXES):
        wide, narrow = (getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[t]) for t in mix)
        for t in GROUP_TILES[kernel][units(wide, narrow)].values():
            full = _case(kernel, fn, t, mix, t.members, masked=True)
            yield full
            if mix != ("bf16", "fp32"):
                continue
            yield _case(kernel, fn, t, mix, t.members, masked=False)
            if kernel == "input_pass":
                yield _case(kernel, fn, t, mix, t.members, masked=True, need_factors=False)
            for members in range(2 if t.members > 2 else 1, t.members):  # as `group_launches` divides two or more
                yield _case(kernel, fn, t, mix, members, masked=True)
            if t.BLOCK_R == 16:  # nearly full: with ranks of no multiple of 16, too
                yield replace(full, name=f"{full.name}-r8", unaligned=("r0", "r1", "r2", "stride_sm"))


def _case(
    kernel: GroupKernel,
    fn: triton.JITFunction,
    t: GroupTile,
    mix: tuple[str, str],
    members: int,
    masked: bool,
    need_factors: bool = True,
) -> CompileCase:
    wide, narrow = mix
    kinds = {"x": wide, "dx": wide, "mask": "i32", "a": narrow, "s": narrow, "plane": "fp32"}
    constexprs = {
        "MEMBERS": members, "MASKED": (1 << members) - 1 if masked else 0, "NEED_DX": True, "ADD": masked,
        "NEED_FACTORS": need_factors,
        "BLOCK_M": t.BLOCK_M, "BLOCK_C": t.BLOCK_C, "BLOCK_R": t.BLOCK_R,
    }  # fmt: skip
    signature = {}
    for name in fn.arg_names:
        kind = "fp32" if name.startswith("scale") else "i32"
        pointee = kinds.get(name.removesuffix("_ptr").rstrip("012")) if name.endswith("_ptr") else None
        signature[name] = "constexpr" if name in constexprs else f"*{pointee}" if pointee else kind
    ending = f"{'' if masked else '-bare'}{'' if need_factors else '-frozen'}"
    return CompileCase(
        f"{kernel}-{members}xr{t.BLOCK_R}-{wide}-{narrow}{ending}", fn, signature,
        {name: value for name, value in constexprs.items() if name in fn.arg_names}, t.num_warps, t.num_stages,
        dot_rows=t.BLOCK_M,
    )  # fmt: skip
