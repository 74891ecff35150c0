"""The ops of fastpeft_kernels.routed and routed_group on the kernels of _routed.py.

Launches, whatever the number of slots, for a routing of one pass: shrink and expand forward; dS, planes of dB and their
sum for `expand`'s backward; planes of dA, their sum and dx for `shrink`'s. Where few rows split K, shrink leaves planes
of S: `lora` lets expand add them up, the others add a launch (tests/kernels/test_routed_budget.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft_kernels.gpu import _routed
from fastpeft_kernels.gpu._bank import BY_COLUMN, BY_RANK, Bank, factor_bank, order
from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._planes import sum_planes
from fastpeft_kernels.gpu._routed import routed_expand, routed_outer, routed_shrink_planes
from fastpeft_kernels.routes import parted
from fastpeft_kernels.tiles import ROUTED_TILES, RoutedKernel, Tile


def shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    dtype = factors[0].dtype
    planes = routed_shrink_planes(x, factor_bank(factors, 0, scales), rows, starts, weights, mask, dtype)
    return sum_planes(planes, dtype=dtype)[0]


def shrink_backward(
    dS: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor]]:
    dS, bank = dS.contiguous(), factor_bank(factors, 0, scales)
    grads = routed_outer(x, dS, bank, rows, starts, weights, mask, transposed=False)
    dx = x.new_empty(0)
    if need_dx:
        dx = routed_expand(
            None, dS.unsqueeze(0), bank, rows, starts, x.dtype, x.shape[1], weights, mask, scaled=True
        )  # fmt: skip
    return dx, parted(grads, factors)


def expand(base: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor) -> Tensor:
    S, bank = S.contiguous().unsqueeze(0), factor_bank(factors, 1)
    return routed_expand(base, S, bank, rows, starts, base.dtype, base.shape[1])


def expand_backward(
    dout: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor
) -> tuple[Tensor, list[Tensor]]:
    bank = factor_bank(factors, 1)
    dS = sum_planes(routed_shrink_planes(dout, bank, rows, starts, None, None, S.dtype), dtype=S.dtype)[0]
    return dS, parted(routed_outer(dout, S.contiguous(), bank, rows, starts, None, None, transposed=True), factors)


def lora(
    base: Tensor,
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    S = routed_shrink_planes(x, factor_bank(As, 0, scales), rows, starts, weights, mask, As[0].dtype)
    return routed_expand(base, S, factor_bank(Bs, 1), rows, starts, base.dtype, base.shape[1])


@dataclass(frozen=True)
class GroupBanks:
    """Where the factors of layers that share their input lie."""

    A: Bank  # the slots of one layer after the other
    Bs: Sequence[Bank]  # one a layer
    dtype: torch.dtype

    @classmethod
    def of(
        cls, As: Sequence[Sequence[Tensor]], Bs: Sequence[Sequence[Tensor]], scales: Sequence[Sequence[float]]
    ) -> "GroupBanks":
        """Each argument by layer and slot."""
        flat = [A for own in As for A in own]
        bank = factor_bank(flat, 0, [scale for own in scales for scale in own])
        return cls(bank, [factor_bank(own, 1) for own in Bs], flat[0].dtype)

    def in_order(self) -> "GroupBanks":
        """Once more, on whatever stream this is."""
        for bank in (self.A, *self.Bs):
            order(bank)
        return self


def lora_group(
    x: Tensor,
    bases: Sequence[Tensor],
    banks: GroupBanks,
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    overwrite: bool = False,
) -> list[Tensor]:
    """`lora` of each layer; `overwrite`: its base, contiguous, takes the result."""
    S = routed_shrink_planes(x, banks.A, rows, starts, weights, None, banks.dtype, len(bases))
    parts = S.split(len(rows), dim=1)
    return [
        routed_expand(base, part, bank, rows, starts, base.dtype, base.shape[1], out=base if overwrite else None)
        for base, part, bank in zip(bases, parts, banks.Bs, strict=True)
    ]


# What the compile tests build: every tile as both passes use it, for the products' two number formats forward, and for
# the 16-bit factors of decoding.

_BF16, _FP16, _NARROW = ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16")
_DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
_KERNELS: dict[RoutedKernel, triton.JITFunction] = {
    "shrink": _routed._routed_shrink_kernel,
    "expand": _routed._routed_expand_kernel,
    "outer": _routed._routed_outer_kernel,
}
# kernel -> use -> the flags that are set, and how the factors lie
_USES: dict[RoutedKernel, dict[str, tuple[tuple[str, ...], tl.constexpr]]] = {
    "shrink": {"forward": (("WEIGHTS", "MASK"), BY_RANK), "backward": ((), BY_COLUMN)},
    "expand": {"forward": (("BASE", "PLANES"), BY_COLUMN), "backward": (("SCALE", "WEIGHTS", "MASK"), BY_RANK)},
    "outer": {"backward": (("WEIGHTS", "MASK"), BY_RANK)},
}


def _case(kernel: RoutedKernel, rows: str, t: Tile, mix: tuple[str, str], use: str) -> CompileCase:
    fn, (wide, narrow), (flags, layout) = _KERNELS[kernel], mix, _USES[kernel][use]
    constexprs: dict[str, object] = {
        "DTYPE": _DTYPES[narrow], "RESULT": _DTYPES[wide], "LAYOUT": layout.value, "ALIGNED": True, "TRANSPOSED": True,
        "BLOCK_M": t.BLOCK_M, "BLOCK_C": t.BLOCK_C, "BLOCK_R": t.BLOCK_R,
    }  # fmt: skip
    constexprs |= {name: name[4:] in flags for name in fn.arg_names if name.startswith("HAS_")}
    if (
        kernel == "shrink" and use == "backward"
    ):  # a gradient's rows are contiguous, and Triton specialises a stride of 1
        constexprs["stride_xk"] = 1
    constexprs = {name: value for name, value in constexprs.items() if name in fn.arg_names}
    pointers = {
        **dict.fromkeys(("x_ptr", "base_ptr", "out_ptr"), wide), **dict.fromkeys(("weights_ptr", "plane_ptr"), "fp32"),
        **dict.fromkeys(("rows_ptr", "starts_ptr", "mask_ptr"), "i32"), "table_ptr": "i64",
        "s_ptr": "fp32" if "PLANES" in flags else narrow,
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constexprs else f"*{pointers[name]}" if name in pointers else "i32"
        for name in fn.arg_names
    }
    return CompileCase(
        f"{kernel}-{use}-{rows}-{wide}-{narrow}", fn, signature, constexprs, t.num_warps, t.num_stages,
        dot_rows=t.BLOCK_C if kernel == "outer" else t.BLOCK_M, unaligned=("R", "A", "members", "starts_ptr"),
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    for kernel, uses in _USES.items():
        tiles = {t: rows for rows, t in ROUTED_TILES[kernel].items()}  # one that both take is built once
        for (t, rows), use in product(tiles.items(), uses):
            yield _case(kernel, rows, t, _BF16, use)
            if use == "forward" or kernel == "outer":
                yield _case(kernel, rows, t, _FP16, use)
            if use == "forward" and rows == "few":
                yield _case(kernel, rows, t, _NARROW, use)
    kinds = {"plane_ptr": "*fp32", "table_ptr": "*i64", "starts_ptr": "*i32", "out_ptr": "*bf16"}
    fn = _routed._routed_sum_kernel
    yield CompileCase(
        "sum", fn, {name: kinds.get(name, "constexpr" if name == "SUM_BLOCK" else "i32") for name in fn.arg_names},
        {"SUM_BLOCK": _routed.SUM_BLOCK}, uses_matrix=False, unaligned=("A", "P", "band", "bands"),
    )  # fmt: skip
