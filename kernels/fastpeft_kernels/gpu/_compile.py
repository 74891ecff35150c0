"""What a kernel module says about its own tile configurations, so that each one can be compiled where there is no GPU.

Every module in `fastpeft_kernels.gpu` defines `compile_cases()`, which yields one `CompileCase` for each kernel in each
tile configuration that its launcher can choose. The compile tests build all of them for GPUs that are not there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one tile configuration.

    Attributes:
        name: unique within its module, readable as a test id: "forward-64x128-r16-bf16".
        fn: the `@triton.jit` function.
        signature: argument name -> Triton type ("*bf16", "*fp32", "i32", ..., "constexpr"), in the kernel's own order.
        constexprs: value of every argument whose type is "constexpr".
        num_warps, num_stages: the launch options.
        uses_matrix: the kernel must run on the matrix units.
        pipelined: it must load through the bulk copy engine (TMA), which 9.0 and later have, and its warp-group matrix
            instructions must follow each other without a wait (ptxas may serialise them, and only remarks on it).
        capabilities: compute capabilities (80, 86, 89, 90, 100) for which the launcher chooses this configuration;
            None: all.
        dot_rows: rows of the left operand of the smallest dot that matters. Under 64, the warp-level instruction (HMMA)
            is the right one on every target; from 64 on, 9.0 and 10.0 must use their warp-group ones.
        unaligned: arguments not known to be multiples of 16 (all other pointers and integers are taken to be).
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    uses_matrix: bool = True
    capabilities: tuple[int, ...] | None = None
    dot_rows: int = 64
    unaligned: tuple[str, ...] = ()
    pipelined: bool = False

    def __post_init__(self) -> None:
        typed = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if typed != set(self.constexprs):
            raise ValueError(
                f"{self.name}: arguments of type constexpr are {sorted(typed)}, values are given for "
                f"{sorted(self.constexprs)}; each needs the other"
            )

    def chosen_for(self, capability: int) -> bool:
        """Whether the launcher can choose this configuration on compute capability `capability`."""
        return self.capabilities is None or capability in self.capabilities
