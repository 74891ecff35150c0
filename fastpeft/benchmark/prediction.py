"""Predicted bytes and times of LoRA linears on a GPU, from bytes that were counted.

Triton's interpreter is too slow for the shapes that matter, and benches run where it is not. So small shapes are
counted, what they move is a MK + b MN + c Mr + d rK + e rN, and the coefficients are in counted.json. The tests that
count and hold the budgets (tests/kernels/test_budget.py, test_group_budget.py) hold the predictions to the same counts.
The planes of split reductions depend on how a shape is split, and have a formula, held in the same way.

    TRITON_INTERPRET=1 python -m fastpeft.benchmark.recount      # counted.json anew, after a kernel changed
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastpeft.benchmark.budget import Bytes
from fastpeft_kernels.tiles import ProductBy, Tile, fused_tile, group_tile, row_bands, split_columns, tile

COUNTED = Path(__file__).with_name("counted.json")
MOST_MEMBERS = 3  # of a group whose bytes are predicted


def _reductions(
    M: int, K: int, widths: Sequence[int], r: int, adapters: torch.dtype, product_by: ProductBy
) -> Iterator[tuple[int, int]]:
    """(elements, planes) of each sum of a backward with a bf16 base: dS, dB and dA of each member."""

    def bands(columns: int, t: Tile) -> int:
        return row_bands(M, -(-columns // t.BLOCK_C), t.BLOCK_M)[0]

    output, outer = fused_tile("output_pass", torch.bfloat16, adapters, r), tile("outer", r)
    if len(widths) > 1:
        input_tile: Tile | None = group_tile("input_pass", torch.bfloat16, adapters, r)
    else:
        input_tile = fused_tile("input_pass", torch.bfloat16, adapters, r) if product_by == "library" else None
    for N in widths:
        if output:
            yield M * r, -(-N // output.BLOCK_C)
        yield N * r, bands(N, output or outer)
        yield K * r, bands(K, input_tile or outer)


def plane_bytes(
    M: int,
    K: int,
    widths: Sequence[int],
    r: int,
    adapters: torch.dtype = torch.float32,
    product_by: ProductBy = "library",
) -> int:
    """What the backward's partial sums take, written and read, for a bf16 base.

    A sum that is not split is written once, in the adapters' dtype.
    """
    sums = _reductions(M, K, widths, r, adapters, product_by)
    return sum(elements * (8 * planes if planes > 1 else adapters.itemsize) for elements, planes in sums)


def s_plane_bytes(M: int, K: int, members: int, r: int, dropout: float, product_by: ProductBy = "library") -> int:
    """What S costs more where few rows split K, with fp32 adapters: every plane is written and read, and their sum
    written, which with our own product is a launch of its own."""
    if members > 1:
        t: Tile | None = group_tile("shrink", torch.bfloat16, torch.float32, r)
    else:
        t = tile("drawing_shrink" if dropout else "shrink", r)
    splits = split_columns(M, K, t)[1] if t else 1
    return 4 * M * r * members * (2 * splits - (product_by == "library")) if splits > 1 else 0


def predict(
    M: int, K: int, widths: Sequence[int], r: int = 16, dropout: float = 0.0, product_by: ProductBy = "library"
) -> tuple[Bytes, Bytes]:
    """The bytes of a forward and a backward of any size: bf16 base, fp32 adapters, K a multiple of 32.

    Args:
        widths: out_features of the linears that share the input and run as one op; one for a layer by itself.

    Raises:
        ValueError: nothing was counted for that rank or that many members.
    """
    rows = _counted().get(key(len(widths), dropout, product_by))
    if rows is None or not 0 < r <= 16:
        raise ValueError(
            f"bytes are predicted for ranks of 1 to 16 and up to {MOST_MEMBERS} layers that share an input; got r={r} "
            f"and {len(widths)} with the {product_by} product"
        )
    N = sum(widths)
    wide_terms, factor_terms = (M * K, M * N), (r * M, r * K, r * N)
    wide = [round(dot(rows[way]["wide"], wide_terms)) for way in ("forward", "backward")]
    factors = [round(dot(rows[way]["factors"], factor_terms)) for way in ("forward", "backward")]
    # A sum of one plane is already its own total, whose writing is among the factors.
    sums = _reductions(M, K, widths, r, torch.float32, product_by)
    of_gradients = sum(8 * planes * elements for elements, planes in sums if planes > 1)
    of_S = s_plane_bytes(M, K, len(widths), r, dropout, product_by)
    return Bytes(wide[0], factors[0], of_S), Bytes(wide[1], factors[1], of_gradients)


@functools.cache
def _counted() -> dict[str, Any]:
    """By op, and way: bytes for each MK and M ΣN of wide tensors, for each rM, rK and r ΣN of factors."""
    found: dict[str, Any] = json.loads(COUNTED.read_text())
    return found


def key(members: int, dropout: float, product_by: ProductBy) -> str:
    """The op's name in counted.json."""
    return f"{product_by} product, {members} linear{'s' * (members > 1)}{', dropout' if dropout else ''}"


def dot(coefficients: Sequence[float], terms: Sequence[int]) -> float:
    return sum(c * t for c, t in zip(coefficients, terms, strict=True))
