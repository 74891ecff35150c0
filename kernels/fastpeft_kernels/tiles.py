"""Tile sizes of the Triton kernels, by kernel and rank class.

An entry is here because it compiles for sm_80, sm_90 and sm_100 without spills and fits the shared memory of all of
them (tests/kernels/test_compile.py builds every one). None has been timed on a GPU yet: a commit that changes an entry
for speed shows what it won, on which device.
"""

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["shrink", "expand", "outer"]


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

ROWS_PER_PLANE = 512  # rows that one fp32 plane of a split reduction over M sums
SPLIT_K_BELOW = 64  # programs: with fewer, shrink splits K as well


def rank_class(r: int) -> int:
    """The rank rounded up to a power of two between 16, the smallest dot, and 64."""
    return min(64, max(16, 1 << (r - 1).bit_length()))


def tile(kernel: Kernel, r: int) -> Tile:
    return TILES[kernel][rank_class(r)]
