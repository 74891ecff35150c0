"""Suite "own-gemm": a LoRA linear's base product, by the library and by our own kernel. It fills the table of tiles.py.

Each case is one product of the forward, x Wᵀ + S Bᵀ, or of dx, dout W + mask · (dS A), replayed as a CUDA graph:
"library" writes the low-rank part and lets the vendor's product accumulate onto it, "own" adds it in its epilogue, and
"own-128x256" and so on are that kernel in each of its tiles. "frozen" is the vendor's product alone: what the low-rank
part costs is the distance to it. The shapes are the linears of Llama-3-8B with 8192 tokens (fp32 adapters) and the
squares of LoRAFusion's table (bf16 adapters). An entry of `tiles.PRODUCTS` may move to "own" where "own" is faster
than "library" in all cases of its class.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.benchmark.cases import DTYPES, Case, Effort, Libraries
from fastpeft.benchmark.libraries import FROZEN
from fastpeft.benchmark.timing import Step, graph_replay
from fastpeft_kernels import product
from fastpeft_kernels.dropout import draw_mask
from fastpeft_kernels.tiles import sum_class

LIBRARY, OWN = "library", "own"


@dataclass(frozen=True)
class OwnGemmCase(Case):
    """One product with N columns that sums over K; dropout is dx's alone, the forward's is in S already."""

    suite: ClassVar[str] = "own-gemm"
    baselines: ClassVar[tuple[str, ...]] = (LIBRARY,)
    effort: ClassVar[Effort | None] = Effort(budget_s=1.0, warmup=20, min_rounds=50, max_rounds=200)

    direction: str  # "forward" or "dx"
    M: int
    K: int
    N: int
    r: int = 16
    dropout: float = 0.1
    dtype: str = "bf16"
    adapters: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.direction}-K{self.K}-N{self.N}-M{self.M}-{self.adapters}"

    @property
    def params(self) -> dict[str, Any]:
        return {**super().params, "class": sum_class(self.M, self.K)}

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """x, W, S, B and the mask as the product takes them: for dx they are dout, Wᵀ, dS, Aᵀ and dropout's mask."""

        def make(rows: int, columns: int, dtype: str) -> Tensor:
            return torch.randn(rows, columns, device=self.device).mul_(columns**-0.5).to(DTYPES[dtype])

        x, S = make(self.M, self.K, self.dtype), make(self.M, self.r, self.adapters)
        if self.direction == "forward":
            return x, make(self.N, self.K, self.dtype), S, make(self.N, self.r, self.adapters), None
        W, B = make(self.K, self.N, self.dtype).t(), make(self.r, self.N, self.adapters).t()
        return x, W, S, B, draw_mask(S.new_empty(self.M, self.N), self.dropout)

    def steps(self, found: Libraries) -> dict[str, Step]:
        """Raises RuntimeError, with the reason, where our own kernel does not run."""
        from fastpeft_kernels.gpu import linear as own
        from fastpeft_kernels.gpu import lora  # triton is imported when first needed

        del found
        x, W, S, B, mask = self.operands()

        def by_library() -> Tensor:
            return lora.expand(S, B, x.dtype, mask=mask).addmm_(x, W.t())

        steps: dict[str, Callable[[], Tensor]] = {
            OWN: lambda: own.linear(x, W, None, S, B, mask),
            LIBRARY: by_library,
        }
        with product(OWN):
            own.takes_product(x, W, S)
        for tile in own.tiles_for(x, S):
            name = f"{OWN}-{tile.BLOCK_M}x{tile.BLOCK_N}"
            steps[name] = lambda tile=tile: own.linear(x, W, None, S, B, mask, tile=tile)  # type: ignore[misc]
        steps[FROZEN] = lambda: F.linear(x, W)
        return {name: graph_replay(step, self.device) for name, step in steps.items()}


def own_gemm_cases(quick: bool, device: str) -> Iterator[OwnGemmCase]:
    linears = (
        (4096, 4096),
        (4096, 1024),
        (4096, 14336),
        (14336, 4096),
    )  # (in, out): q and o, k and v, gate and up, down
    for K, N in linears:
        yield OwnGemmCase("forward", M=8192, K=K, N=N, device=device)
        yield OwnGemmCase("dx", M=8192, K=N, N=K, device=device)
    for size in (4096,) if quick else (4096, 5120, 8192):
        for M in (8192,) if quick else (2048, 4096, 8192):
            for direction in ("forward", "dx"):
                yield OwnGemmCase(direction, M=M, K=size, N=size, adapters="bf16", device=device)
