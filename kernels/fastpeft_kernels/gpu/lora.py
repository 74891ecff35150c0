"""The ops of fastpeft_kernels.lora on the kernels of _lora_forward.py and _lora_backward.py.

The base products are the vendor library's: the low-rank part is written first, as the C operand, and the library
accumulates onto it (beta = 1), so that reading C hides in its epilogue. Or they are our own, with the low-rank part in
the epilogue (gpu/linear.py) and 4MK + 2MN bytes in all: tiles.py says where.

Launches beside the base product: shrink and expand forward, and with dropout one that draws a seed; output pass, sum of
dS's planes, input pass, sum of the planes of dA and dB backward. Bytes, forward + backward, 16-bit x: 8MK + 6MN, and
planes (tests/kernels/test_budget.py); with dropout MK/8 more where shrink draws the mask and writes it, and MK/8 where
the input pass reads it. Compiled code draws by an op of its own: a launch and MK/8 more. Ranks over 16 read dout twice
(8MN in all): _lora_backward.py says why. Where A and B are frozen the backward is shrink and expand again, and does not
read x (tests/kernels/test_frozen_factors.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
import triton
from torch import Tensor

from fastpeft_kernels.gpu import _lora_backward, _lora_forward, _planes
from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._lora_backward import input_pass, outer, outer_planes, output_pass
from fastpeft_kernels.gpu._lora_forward import expand, expand_planes, shrink, shrink_planes
from fastpeft_kernels.gpu._planes import sum_planes
from fastpeft_kernels.gpu.linear import linear, takes_product
from fastpeft_kernels.masks import Draw
from fastpeft_kernels.tiles import FUSED_TILES, TILES, Kernel, Tile, units

__all__ = ["expand", "lora_add", "lora_add_backward", "lora_linear", "lora_linear_backward", "outer", "shrink"]


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | Draw | None, scale: float
) -> tuple[Tensor, Tensor]:
    if takes_product(x, W, B):
        S = shrink(x, A, mask, scale)
        return linear(x, W, bias, S, B), S
    out, S = expand_planes(shrink_planes(x, A, mask, scale), B, x.dtype, bias=bias)
    return out.addmm_(x, W.t()), S


def lora_linear_backward(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not need_dx or not takes_product(dout, W.t(), B):
        dx, dA, dB = lora_add_backward(dout, x, A, B, S, mask, scale, need_dx, need_factors)
        return dx.addmm_(dout, W) if need_dx else dx, dA, dB
    if not need_factors:
        dS = shrink(dout, B.t(), None, scale)
        return linear(dout, W.t(), None, dS, A.t(), mask), A.new_empty(0), B.new_empty(0)
    dS, dB_planes = output_pass(dout, B, S, scale)
    dA, dB = sum_planes(outer_planes(x, dS, mask), dB_planes, dtype=S.dtype)
    return linear(dout, W.t(), None, dS, A.t(), mask), dA, dB


def lora_add(
    out: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | Draw | None, scale: float
) -> tuple[Tensor, Tensor]:
    return expand_planes(shrink_planes(x, A, mask, scale), B, out.dtype, base=out)


def lora_add_backward(
    dout: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not need_factors:
        dS_planes = shrink_planes(dout, B.t(), None, scale)
        dx = expand_planes(dS_planes, A.t(), x.dtype, mask=mask)[0] if need_dx else x.new_empty(0)
        return dx, A.new_empty(0), B.new_empty(0)
    dS, dB_planes = output_pass(dout, B, S, scale)
    dx, dA_planes = input_pass(x, dS, A, mask) if need_dx else (x.new_empty(0), outer_planes(x, dS, mask))
    dA, dB = sum_planes(dA_planes, dB_planes, dtype=S.dtype)
    return dx, dA, dB


# What the compile tests build: every tile, for every mix of dtypes that the ops accept.

MIXES = (("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32"))


def _signature(fn: triton.JITFunction, pointers: dict[str, str], constexprs: dict[str, object]) -> dict[str, str]:
    def kind(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        return f"*{pointers[name]}" if name in pointers else "fp32" if name == "scale" else "i32"

    return {name: kind(name) for name in fn.arg_names}


def _cases(
    kernel: Kernel, fn: triton.JITFunction, tiles: dict[int, Tile], mix: tuple[str, str], masked: bool
) -> Iterator[CompileCase]:
    wide, narrow = mix
    pointers = {
        "x_ptr": wide, "base_ptr": wide, "out_ptr": wide, "bias_ptr": wide, "dout_ptr": wide, "dx_ptr": wide,
        "mask_ptr": "i32", "a_ptr": narrow, "b_ptr": narrow, "s_ptr": narrow, "total_ptr": narrow,
        "plane_ptr": "fp32", "ds_ptr": "fp32", "db_ptr": "fp32", "seed_ptr": "i64",
    }  # fmt: skip
    flags = [name for name in fn.arg_names if name.startswith("HAS_")]
    for t in tiles.values():
        constexprs: dict[str, object] = {"BLOCK_M": t.BLOCK_M, "BLOCK_C": t.BLOCK_C, "BLOCK_R": t.BLOCK_R}
        constexprs |= dict.fromkeys(flags, masked)
        if "DRAWS" in fn.arg_names:
            constexprs["DRAWS"] = kernel == "drawing_shrink"
        if "HAS_PLANES" in flags:
            constexprs["HAS_PLANES"] = not masked  # S of one plane has the narrow type, planes are fp32
            pointers["s_ptr"] = narrow if masked else "fp32"
        case = CompileCase(
            f"{kernel}-r{t.BLOCK_R}-{wide}-{narrow}{'' if masked or not flags else '-bare'}", fn,
            _signature(fn, pointers, constexprs), constexprs, t.num_warps, t.num_stages,
            dot_rows=t.BLOCK_C if kernel == "outer" else t.BLOCK_M,
        )  # fmt: skip
        yield case
        if kernel in FUSED_TILES and t.BLOCK_R == 16:  # nearly full: with ranks of no multiple of 16, too
            yield replace(case, name=f"{case.name}-r8", unaligned=("r", "stride_bn", "stride_sm"))


def compile_cases() -> Iterator[CompileCase]:
    kernels: dict[Kernel, triton.JITFunction] = {
        "shrink": _lora_forward._shrink_kernel,
        "drawing_shrink": _lora_forward._shrink_kernel,
        "expand": _lora_forward._expand_kernel,
        "outer": _lora_backward._outer_kernel,
    }
    fused: dict[Kernel, triton.JITFunction] = {
        "output_pass": _lora_backward._output_pass_kernel,
        "input_pass": _lora_backward._input_pass_kernel,
    }
    bare = ("bf16", "fp32")  # compiled without mask, base and bias as well; elsewhere the full kernel stands for both
    for mix, masked in [*product(MIXES, (True,)), (bare, False)]:
        for kernel, fn in kernels.items():
            if masked or kernel != "drawing_shrink":
                yield from _cases(kernel, fn, TILES[kernel], mix, masked)
        wide, narrow = (getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[t]) for t in mix)
        for kernel, fn in fused.items():
            if masked or kernel == "input_pass":
                yield from _cases(kernel, fn, FUSED_TILES[kernel][units(wide, narrow)], mix, masked)
    yield CompileCase(
        "sum_planes", _planes._sum_planes_kernel,
        {
            "first_ptr": "*fp32", "first_out_ptr": "*fp32", "second_ptr": "*fp32", "second_out_ptr": "*bf16",
            "first_size": "i32", "first_planes": "i32", "second_size": "i32", "second_planes": "i32",
            "SUM_PLANES": "constexpr", "SUM_BLOCK": "constexpr",
        },
        {"SUM_PLANES": _planes.SUM_PLANES, "SUM_BLOCK": _planes.SUM_BLOCK}, uses_matrix=False,
    )  # fmt: skip
