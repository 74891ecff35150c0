"""Suites "punica", "vllm-lora" and "routed-groups": the routed ops alone, in inference; the first two at the shapes
that two serving systems state theirs in.

"punica" is the table of Punica (arXiv:2310.18547, section 7.2): h1 = 4096, h2 = 11008, r = 16, fp16, up to 64 rows that
take one adapter each, drawn from four popularities. Every contender computes the frozen product as well, whose 90 MB of
weights leave no adapter in a GPU's cache, as in a model; "frozen" is that product alone. "loop" adds adapter after
adapter, "gather-bmm" copies the factors of every row and multiplies them in one batch: the ways that Punica compares
itself with.

"vllm-lora" takes the two ops apart, as benchmarks/kernels/benchmark_lora.py of vLLM does: hidden sizes, rows, rank 16,
four adapters in no order. A step goes through 32 sets of operands, which for few rows fit into a GPU's cache.

"routed-groups" decodes q, k and v of Llama-3-8B, which share their input, with bf16 adapters that are drawn in turn:
"separate" is the same with an op for each of the three.

All steps are replayed as CUDA graphs. The predicted time is bytes over bandwidth, each distinct adapter counted once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.benchmark.cases import DTYPES, Case, Effort, Libraries
from fastpeft.benchmark.libraries import FROZEN, OURS
from fastpeft.benchmark.roofline import Work
from fastpeft.benchmark.timing import Step, graph_replay
from fastpeft_kernels import RoutedOperands, expand_routed, lora_routed, lora_routed_group, shrink_routed

LOOP, GATHER, SEPARATE = "loop", "gather-bmm", "separate"
POPULARITIES = ("identical", "uniform", "zipf", "distinct")
BRIEF = Effort(budget_s=0.3, warmup=10, min_rounds=50, max_rounds=200)


class Routing(NamedTuple):
    """One adapter a row: the routing in the ops' order."""

    rows: Tensor
    starts: Tensor


def lengths(batch: int, popularity: str) -> list[int]:
    """How many rows of a batch each adapter has, Punica's way.

    "uniform": ⌈√batch⌉ adapters of nearly equal shares; "zipf": each has 1.5 times the rows of the next one.

    Raises:
        ValueError: no such popularity.
    """
    if popularity == "identical":
        return [batch]
    if popularity == "distinct":
        return [1] * batch
    if popularity == "uniform":
        adapters = math.isqrt(batch - 1) + 1
        return [batch // adapters + (i < batch % adapters) for i in range(adapters)]
    if popularity == "zipf":
        shares: list[int] = []
        share = 1.0
        while sum(shares) + int(share) < batch:
            shares.append(int(share))
            share *= 1.5
        return sorted([*shares, batch - sum(shares)], reverse=True)
    raise ValueError(f"no popularity {popularity!r}; there are {', '.join(POPULARITIES)}")


def route(slots: Sequence[int], adapters: int, device: str) -> Routing:
    """The routing of rows that take one slot each."""
    order = sorted(range(len(slots)), key=slots.__getitem__)
    starts = [0, *accumulate(slots.count(slot) for slot in range(adapters))]
    return Routing(*(torch.tensor([line], dtype=torch.int32, device=device) for line in (order, starts)))


@dataclass(frozen=True)
class PunicaCase(Case):
    """One linear of `batch` rows, each with its adapter; the rows of an adapter follow one another."""

    suite: ClassVar[str] = "punica"
    baselines: ClassVar[tuple[str, ...]] = (LOOP, GATHER)
    effort: ClassVar[Effort | None] = BRIEF

    popularity: str
    batch: int
    h1: int = 4096
    h2: int = 11008
    r: int = 16
    dtype: str = "fp16"

    @property
    def name(self) -> str:
        return f"{self.popularity}-B{self.batch}"

    @property
    def lengths(self) -> list[int]:
        return lengths(self.batch, self.popularity)

    @property
    def params(self) -> dict[str, Any]:
        return {**super().params, "adapters": len(self.lengths)}

    def work(self) -> Work:
        """Beside the frozen product: the factors of each adapter once, x once, and out read and written."""
        M, K, N, adapters = self.batch, self.h1, self.h2, len(self.lengths)
        return Work(
            "bf16",  # whose rate fp16 has
            base_bytes=2.0 * (K * N + M * K + M * N),
            base_flops=2.0 * M * K * N,
            adapter_bytes=2.0 * (adapters * self.r * (K + N) + M * K + 2 * M * N),
            adapter_flops=2.0 * M * self.r * (K + N),
        )

    def operands(self) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """x (batch, h1), W (h2, h1), and for each adapter A (r, h1) and B (h2, r)."""
        make = partial(_random, self.dtype, self.device)
        shapes = [(self.r, self.h1), (self.h2, self.r)]
        As, Bs = ([make(*shape) for _ in self.lengths] for shape in shapes)
        return make(self.batch, self.h1), make(self.h2, self.h1), As, Bs

    def steps(self, found: Libraries) -> dict[str, Step]:
        del found
        x, W, As, Bs = self.operands()
        slots = [slot for slot, length in enumerate(self.lengths) for _ in range(length)]
        routing, scales = route(slots, len(As), self.device), [1.0] * len(As)

        def loop() -> Tensor:
            out = F.linear(x, W)
            parts = zip(out.split(self.lengths), x.split(self.lengths), As, Bs, strict=True)  # type: ignore[no-untyped-call]
            for part, rows, A, B in parts:
                part += rows @ A.t() @ B.t()
            return out

        def gather_bmm() -> Tensor:
            A, B = (torch.stack([factors[slot] for slot in slots]) for factors in (As, Bs))
            return F.linear(x, W) + (B @ (A @ x.unsqueeze(2))).squeeze(2)

        steps: dict[str, Callable[[], Tensor]] = {
            FROZEN: lambda: F.linear(x, W),
            OURS: lambda: lora_routed(F.linear(x, W), x, As, Bs, scales, *routing),
            LOOP: loop,
            GATHER: gather_bmm,
        }
        return {name: graph_replay(torch.no_grad()(step), self.device) for name, step in steps.items()}


@dataclass(frozen=True)
class VllmLoraCase(Case):
    """One op alone: "shrink", S = x Aᵀ, or "expand", out = base + S Bᵀ."""

    suite: ClassVar[str] = "vllm-lora"
    baselines: ClassVar[tuple[str, ...]] = (LOOP,)
    effort: ClassVar[Effort | None] = BRIEF
    repeats: ClassVar[int] = 32  # sets of operands

    op: str
    M: int
    hidden: int
    adapters: int = 4
    r: int = 16
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.op}-H{self.hidden}-M{self.M}"

    def work(self) -> Work:
        """There is no base: the bytes are those of one op."""
        wide = self.M * self.hidden * (1 if self.op == "shrink" else 2)
        moved = 2.0 * (wide + min(self.adapters, self.M) * self.r * self.hidden + self.M * self.r)
        return Work("bf16", 0.0, 0.0, moved, 2.0 * self.M * self.r * self.hidden)

    def slots(self) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        chosen: list[int] = torch.randint(self.adapters, (self.M,), generator=generator).tolist()
        return chosen

    def steps(self, found: Libraries) -> dict[str, Step]:
        del found
        sets = [self._set() for _ in range(self.repeats)]

        def step_of(name: str) -> Step:
            return torch.no_grad()(lambda: [contenders[name]() for contenders in sets])

        return {name: graph_replay(step_of(name), self.device) for name in (OURS, LOOP)}

    def _set(self) -> dict[str, Callable[[], Tensor]]:
        """The contenders on operands of their own, which they share."""
        make = partial(_random, self.dtype, self.device)
        slots, M = self.slots(), self.M
        routing = route(slots, self.adapters, self.device)
        rows_of = [
            torch.tensor([m for m, other in enumerate(slots) if other == slot], dtype=torch.int64, device=self.device)
            for slot in range(self.adapters)
        ]
        if self.op == "shrink":
            x, As = make(M, self.hidden), [make(self.r, self.hidden) for _ in rows_of]

            def shrink_loop() -> Tensor:
                S = x.new_empty((M, self.r))
                for rows, A in zip(rows_of, As, strict=True):
                    S.index_copy_(0, rows, x[rows] @ A.t())
                return S

            return {OURS: lambda: shrink_routed(x, As, [1.0] * len(As), *routing), LOOP: shrink_loop}
        base, S, Bs = make(M, self.hidden), make(1, M, self.r), [make(self.hidden, self.r) for _ in rows_of]
        by_row = torch.empty_like(S[0]).index_copy_(0, routing.rows[0].long(), S[0])  # S is in the order of the routing

        def expand_loop() -> Tensor:
            out = base.clone()
            for rows, B in zip(rows_of, Bs, strict=True):
                out.index_add_(0, rows, by_row[rows] @ B.t())
            return out

        return {OURS: lambda: expand_routed(base, S, Bs, *routing), LOOP: expand_loop}


@dataclass(frozen=True)
class RoutedGroupCase(Case):
    """Linears of `rows` rows that share their input, as wide as `widths`; the rows take the adapters in turn."""

    suite: ClassVar[str] = "routed-groups"
    baselines: ClassVar[tuple[str, ...]] = (SEPARATE,)
    effort: ClassVar[Effort | None] = BRIEF

    adapters: int
    rows: int = 64
    K: int = 4096
    widths: tuple[int, ...] = (4096, 1024, 1024)
    r: int = 16
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"qkv-A{self.adapters}"

    def work(self) -> Work:
        """Beside the frozen products: the factors of each adapter once, x once, and the outputs read and written."""
        M, K, N, n = self.rows, self.K, sum(self.widths), len(self.widths)
        return Work(
            "bf16",
            base_bytes=2.0 * (K * N + M * K + M * N),
            base_flops=2.0 * M * K * N,
            adapter_bytes=2.0 * (self.adapters * self.r * (n * K + N) + M * K + 2 * M * N),
            adapter_flops=2.0 * M * self.r * (n * K + N),
        )

    def steps(self, found: Libraries) -> dict[str, Step]:
        del found
        make = partial(_random, self.dtype, self.device)
        x, Ws = make(self.rows, self.K), [make(N, self.K) for N in self.widths]
        factors = [
            ([make(self.r, self.K) for _ in range(self.adapters)], [make(N, self.r) for _ in range(self.adapters)])
            for N in self.widths
        ]
        routing = route([m % self.adapters for m in range(self.rows)], self.adapters, self.device)
        scales = [1.0] * self.adapters

        def frozen() -> list[Tensor]:
            return [F.linear(x, W) for W in Ws]

        def together() -> list[Tensor]:
            members = [RoutedOperands(out, *own, scales) for out, own in zip(frozen(), factors, strict=True)]
            return lora_routed_group(x, members, *routing)

        def separate() -> list[Tensor]:
            return [
                lora_routed(out, x, As, Bs, scales, *routing) for out, (As, Bs) in zip(frozen(), factors, strict=True)
            ]

        steps: dict[str, Callable[[], list[Tensor]]] = {FROZEN: frozen, OURS: together, SEPARATE: separate}
        return {name: graph_replay(torch.no_grad()(step), self.device) for name, step in steps.items()}


def _random(dtype: str, device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).mul_(shape[-1] ** -0.5).to(DTYPES[dtype])


def punica_cases(quick: bool, device: str) -> Iterator[PunicaCase]:
    """A batch of one row has one popularity."""
    yield PunicaCase("identical", 1, device=device)
    for batch in (64,) if quick else (8, 16, 32, 64):
        for popularity in POPULARITIES:
            yield PunicaCase(popularity, batch, device=device)


def vllm_lora_cases(quick: bool, device: str) -> Iterator[VllmLoraCase]:
    for op in ("shrink", "expand"):
        for hidden in (4096,) if quick else (4096, 8192):
            for M in (16, 4096) if quick else (1, 64, 4096):
                yield VllmLoraCase(op, M, hidden, device=device)


def routed_group_cases(quick: bool, device: str) -> Iterator[RoutedGroupCase]:
    for adapters in (8,) if quick else (1, 8, 64):
        yield RoutedGroupCase(adapters, device=device)
