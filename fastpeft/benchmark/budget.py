"""What LoRA linears move on a GPU beyond their base products, counted in Triton's interpreter, by kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft.benchmark.traffic import Traffic, counting
from fastpeft_kernels import LoraOperands, backend, lora_group, lora_linear, lora_routed, product
from fastpeft_kernels.tiles import ProductBy

# What the kernels' arguments are. Every program reads its part of a factor anew; caches hold factors.
_SLOTS = range(3)  # members of a group in one launch
PLANES = frozenset({"plane_ptr", "ds_ptr", "db_ptr", "first_ptr", "second_ptr", *(f"plane{i}_ptr" for i in _SLOTS)})
FACTORS = frozenset(
    {"a_ptr", "b_ptr", "s_ptr", "total_ptr", "bias_ptr", "seed_ptr", "first_out_ptr", "second_out_ptr"}
    | {"scale_ptr", "factor_ptr", "square_ptr"}
    | {f"{factor}{i}_ptr" for factor in "as" for i in _SLOTS}
)
ROUTING = frozenset({"table_ptr", "rows_ptr", "starts_ptr", "weights_ptr"})  # of a routed batch: who takes which slot


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

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.wide + other.wide, self.factors + other.factors, self.planes + other.planes)


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
