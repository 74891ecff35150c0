"""Tile sizes of the Triton kernels, by kernel and rank class, and how rows and columns are split over programs.

An entry is here because it compiles for sm_80, sm_90 and sm_100 without spills and fits the shared memory of all of
them (tests/kernels/test_compile.py builds every one). None has been timed on a GPU yet: a commit that changes an entry
for speed shows what it won, on which device. Bytes are counted on any machine (tests/kernels/test_budget.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["shrink", "expand", "outer", "output_pass", "input_pass"]
Units = Literal["bf16", "tf32"]


@dataclass(frozen=True)
class Tile:
    """One program's share: BLOCK_M rows, BLOCK_C columns of the wide tensor (K or N), BLOCK_R of the rank."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


# kernel -> rank class -> tile. The rank class is the rank rounded up to a power of two, at most the last one listed;
# higher ranks take several blocks of it.
TILES: dict[Kernel, dict[int, Tile]] = {
    "shrink": {
        16: Tile(64, 32, 16, 4, 3),
        32: Tile(64, 64, 32, 8, 2),
        64: Tile(64, 32, 64, 8, 2),
    },
    "expand": {
        16: Tile(64, 128, 16, 8, 1),
        32: Tile(64, 64, 32, 8, 2),
        64: Tile(64, 32, 64, 8, 2),
    },
    "outer": {
        16: Tile(64, 64, 16, 8, 2),
        32: Tile(32, 64, 32, 8, 2),
        64: Tile(16, 64, 64, 8, 2),
    },
}

# Kernels that do the work of two in one pass, where rows are contiguous and the whole rank is one block. What has no
# entry runs as two kernels. The output pass pays where its planes of dS, 8Mr bytes for every BLOCK_C columns, cost less
# than the second read of dout that it saves, 2MN in 16 bits: BLOCK_C > 4r. No tile of r = 32 is that wide and spills
# nothing.
FUSED_TILES: dict[Kernel, dict[Units, dict[int, Tile]]] = {
    "output_pass": {
        "bf16": {16: Tile(64, 128, 16, 4, 2)},
        "tf32": {16: Tile(64, 64, 16, 8, 2)},
    },
    "input_pass": {
        "bf16": {16: Tile(32, 128, 16, 8, 2), 32: Tile(32, 64, 32, 8, 2), 64: Tile(64, 32, 64, 8, 2)},
        "tf32": {16: Tile(64, 64, 16, 8, 2), 32: Tile(32, 64, 32, 8, 1)},
    },
}

ROWS_PER_PLANE = 512  # the fewest rows that one fp32 plane of a split reduction over M sums
PROGRAMS = 512  # with that many the largest GPU is busy: more planes than it takes to get there only cost bytes
SPLIT_K_BELOW = 64  # programs: with fewer, shrink splits K as well
MOST_SPLITS = 16  # of K; whoever reads S sums them


def rank_class(r: int) -> int:
    """The rank rounded up to a power of two between 16, the smallest dot, and 64."""
    return min(64, max(16, 1 << (r - 1).bit_length()))


def tile(kernel: Kernel, r: int) -> Tile:
    return TILES[kernel][rank_class(r)]


def units(wide: torch.dtype, narrow: torch.dtype) -> Units:
    """The matrix units' number format for the exact product of two dtypes: what decides how many registers it takes."""
    return "bf16" if wide == torch.bfloat16 or wide == narrow != torch.float32 else "tf32"


def fused_tile(kernel: Kernel, wide: torch.dtype, narrow: torch.dtype, r: int) -> Tile | None:
    """The tile of a kernel that does two products in one pass; None where two kernels do better."""
    found = FUSED_TILES[kernel][units(wide, narrow)].get(rank_class(r))
    return found if found and r <= found.BLOCK_R else None


def row_bands(M: int, column_blocks: int, BLOCK_M: int) -> tuple[int, int]:
    """(bands, rows of each): how a sum over M rows is split when `column_blocks` programs share each band.

    A band leaves one plane of partial sums: few, and a function of the shape alone, so that the bits are too.
    """
    bands = max(1, min(_cdiv(M, ROWS_PER_PLANE), _cdiv(PROGRAMS, column_blocks)))
    rows = _cdiv(max(1, _cdiv(M, bands)), BLOCK_M) * BLOCK_M
    return max(1, _cdiv(M, rows)), rows


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
