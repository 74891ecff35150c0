"""Predicted bytes and times of a LoRA linear layer, from bytes that were counted.

Triton's interpreter is too slow for the shapes that matter, so small ones are counted, and what they move is written as
a MK + b MN + c Mr + d rK + e rN, which holds exactly (tests/kernels/test_budget.py). The planes of split reductions
depend on how a shape is split, and have their own formula, held against the counted ones in the same test.

    TRITON_INTERPRET=1 python -m fastpeft.benchmark.budget 8192 4096 4096 --rank 16 --dropout 0.1
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastpeft.benchmark.traffic import Traffic, counting
from fastpeft_kernels import LoraOperands, backend, lora_group, lora_linear, lora_routed, product
from fastpeft_kernels.tiles import ProductBy, fused_tile, row_bands, tile

H200_BYTES_PER_SECOND = 4.3e12  # measured, copy

# What the kernels' arguments are. Every program reads its part of a factor anew; caches hold factors.
_SLOTS = range(3)  # members of a group in one launch
PLANES = frozenset({"plane_ptr", "ds_ptr", "db_ptr", "first_ptr", "second_ptr", *(f"plane{i}_ptr" for i in _SLOTS)})
FACTORS = frozenset(
    {"a_ptr", "b_ptr", "s_ptr", "total_ptr", "bias_ptr", "seed_ptr", "first_out_ptr", "second_out_ptr"}
    | {"scale_ptr", "factor_ptr", "square_ptr"}
    | {f"{factor}{i}_ptr" for factor in "as" for i in _SLOTS}
)
ROUTING = frozenset({"table_ptr", "rows_ptr", "starts_ptr", "weights_ptr"})  # of a routed batch: who takes which slot

# M, K, N at which the terms tell themselves apart: bands and strips enough that dS, dA and dB are sums of planes, and K
# so small that S is not, as with many rows.
PROBES = ((576, 64, 320), (576, 128, 192), (640, 64, 192))


@dataclass(frozen=True)
class Bytes:
    """What one forward and backward of a layer moves beyond its base products, by kind.

    Attributes:
        wide: tensors of the size of x, of out, and dropout's mask.
        factors: A, B, S, dS, dA, dB and the like, once a launch.
        planes: partial sums of split reductions, written and read.
    """

    wide: int
    factors: int
    planes: int

    @property
    def total(self) -> int:
        return self.wide + self.factors + self.planes

    def seconds(self, bytes_per_second: float = H200_BYTES_PER_SECOND) -> float:
        return self.total / bytes_per_second


def count(
    M: int,
    K: int,
    N: int,
    r: int,
    dropout: float = 0.0,
    adapters: torch.dtype = torch.float32,
    product_by: ProductBy = "library",
) -> tuple[Traffic, Traffic]:
    """Forward and backward of one layer, bf16 base, every gradient, counted in the interpreter.

    Args:
        product_by: who computes the base products: the vendor's library, or our own kernel.
    """
    x = torch.randn(M, K).bfloat16().requires_grad_()
    W, dout = torch.randn(N, K).bfloat16(), torch.randn(M, N).bfloat16()
    A, B = (torch.randn(*shape).to(adapters).requires_grad_() for shape in ((r, K), (N, r)))
    with product(product_by):
        return count_op(lambda: [lora_linear(x, W, None, A, B, 1.0, dropout)], [dout], [W])


def count_op(
    op: Callable[[], Sequence[Tensor]], douts: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Traffic, Traffic]:
    """Forward and backward of any op on its Triton path, beyond the products with the frozen `weights`."""
    with backend("triton"):
        with counting(*weights, cached=FACTORS) as forward:
            outs = op()
        with counting(*weights, cached=FACTORS) as backward:
            torch.autograd.backward(outs, douts)
    return forward, backward


def count_group(
    M: int, K: int, Ns: Sequence[int], r: int, dropout: float = 0.0, adapters: torch.dtype = torch.float32
) -> tuple[Traffic, Traffic]:
    """As `count`, for layers of widths `Ns` that share their input and run as one op."""
    x = torch.randn(M, K).bfloat16().requires_grad_()
    douts = [torch.randn(M, N).bfloat16() for N in Ns]
    pairs = [[torch.randn(*shape).to(adapters).requires_grad_() for shape in ((r, K), (N, r))] for N in Ns]
    Ws = [torch.randn(N, K).bfloat16() for N in Ns]
    members = [
        LoraOperands(W, None, A, B, 1.0 + i, dropout) for i, (W, (A, B)) in enumerate(zip(Ws, pairs, strict=True))
    ]
    return count_op(lambda: lora_group(x, members), douts, Ws)


def count_routed(
    K: int,
    N: int,
    ranks: Sequence[int],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None = None,
    adapters: torch.dtype = torch.float32,
    train: bool = True,
) -> tuple[Traffic, Traffic]:
    """As `count`, for the low-rank part of a batch that is routed over slots of these ranks; beside a bf16 base.

    What the kernels read of the slots' factors goes by the name "address from memory". Without `train`, the forward is
    that of inference, and the backward is empty.
    """
    M = rows.shape[1]
    x, base, dout = (torch.randn(M, columns).bfloat16() for columns in (K, N, N))
    As, Bs = (
        [torch.randn(*shape).to(adapters) for shape in shapes]
        for shapes in ([(r, K) for r in ranks], [(N, r) for r in ranks])
    )
    for t in (x, *As, *Bs):
        t.requires_grad_(train)
    with backend("triton"), torch.set_grad_enabled(train):
        with counting(cached=FACTORS | ROUTING) as forward:
            out = lora_routed(base, x, As, Bs, [1.0] * len(ranks), rows, starts, weights)
        with counting(cached=FACTORS | ROUTING) as backward:
            if train:
                torch.autograd.backward(out, dout)
    return forward, backward


def by_kind(*parts: Traffic, narrow: int = 64) -> Bytes:
    """Counted bytes by kind. The C operands that base products read are wide.

    Args:
        narrow: what an operator of torch moves of a tensor in fewer bytes is a factor: a seed, or what is as long as a
            row; kernels' arguments go by their names.
    """
    totals = {"wide": sum(part.c_reads for part in parts), "factors": 0, "planes": 0}
    for launch in (launch for part in parts for launch in part.launches):
        for name, size in launch.arguments.items():
            small = name in FACTORS or (size < narrow and launch.name.startswith("aten."))
            totals["planes" if name in PLANES else "factors" if small else "wide"] += size
    return Bytes(**totals)


def plane_bytes(M: int, K: int, N: int, r: int, adapters: torch.dtype = torch.float32) -> int:
    """What the backward's partial sums take, written and read, for a bf16 base; S not split over K.

    A sum that is not split is written once, in the adapters' dtype.
    """

    def moved(elements: int, planes: int) -> int:
        return elements * (8 * planes if planes > 1 else adapters.itemsize)

    def split(columns: int, name: Literal["output_pass", "input_pass"]) -> tuple[int, int, bool]:
        fused = fused_tile(name, torch.bfloat16, adapters, r)
        t = fused or tile("outer", r)
        strips = -(-columns // t.BLOCK_C)
        return strips, row_bands(M, strips, t.BLOCK_M)[0], fused is not None

    strips, dB_bands, is_fused = split(N, "output_pass")
    _, dA_bands, _ = split(K, "input_pass")
    return (moved(M * r, strips) if is_fused else 0) + moved(N * r, dB_bands) + moved(K * r, dA_bands)


def predict(M: int, K: int, N: int, r: int = 16, dropout: float = 0.0, adapters: torch.dtype = torch.float32) -> Bytes:
    """The bytes of a layer of any size, from what the probes moved: S is not split over K (from 4096 rows on it never
    is), and K is a multiple of 32.

    Raises:
        ValueError: the rank is over 16, where the probes are not the formula's only terms, or there are too few rows.
        RuntimeError: the probes moved what the formula does not give.
    """
    fewest = PROBES[0][0]
    if not (0 < r <= 16 and fewest <= M):
        raise ValueError(f"bytes are predicted for ranks of 1 to 16 and {fewest} rows or more; got r={r}, M={M}")
    counted = [by_kind(*count(*probe, r, dropout, adapters)) for probe in PROBES]
    wide = _solve([(m * k, m * n) for m, k, n in PROBES], [c.wide for c in counted], (M * K, M * N))
    factors = _solve([(m, k, n) for m, k, n in PROBES], [c.factors for c in counted], (M, K, N))
    return Bytes(wide, factors, plane_bytes(M, K, N, r, adapters))


def _solve(terms: Sequence[tuple[int, ...]], counts: Sequence[int], at: tuple[int, ...]) -> int:
    """The value `at` other terms of the linear function that gives `counts` at `terms`."""
    coefficients, *_ = np.linalg.lstsq(np.array(terms, float), np.array(counts, float), rcond=None)
    if not np.allclose(np.array(terms) @ coefficients, counts, rtol=1e-5):
        raise RuntimeError(f"the counted bytes {list(counts)} are no linear function of {list(terms)}")
    return round(float(np.dot(coefficients, at)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted bytes and time of a LoRA linear layer beyond its base.")
    for name in ("M", "K", "N"):
        parser.add_argument(name, type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bandwidth", type=float, default=H200_BYTES_PER_SECOND, help="bytes a second")
    args = parser.parse_args()
    moved = predict(args.M, args.K, args.N, args.rank, args.dropout)
    figures = {"wide": moved.wide, "factors": moved.factors, "planes": moved.planes, "total": moved.total}
    print(json.dumps({"bytes": figures, "microseconds": round(1e6 * moved.seconds(args.bandwidth), 1)}))


if __name__ == "__main__":
    main()
