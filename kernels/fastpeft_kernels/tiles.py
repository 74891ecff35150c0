"""Tile sizes of the Triton kernels, by kernel and rank class, and how rows and columns are split over programs.

An entry is here because it compiles for sm_80, sm_90 and sm_100 without spills and fits the shared memory of all of
them (tests/kernels/test_compile.py builds every one). None has been timed on a GPU yet: a commit that changes an entry
for speed shows what it won, on which device. Bytes are counted on any machine (tests/kernels/test_budget.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["shrink", "drawing_shrink", "expand", "outer", "output_pass", "input_pass"]
GroupKernel = Literal["shrink", "input_pass"]
RoutedKernel = Literal["shrink", "expand", "outer"]
Units = Literal["bf16", "tf32"]


@dataclass(frozen=True)
class Tile:
    """One program's share: BLOCK_M rows, BLOCK_C columns of the wide tensor (K or N), BLOCK_R of the rank."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GroupTile(Tile):
    """A tile for layers that share their input: at most `members` of them in one launch, the others in another."""

    members: int


# kernel -> rank class -> tile. The rank class is the rank rounded up to a power of two, at most the last one listed;
# higher ranks take several blocks of it.
TILES: dict[Kernel, dict[int, Tile]] = {
    "shrink": {
        16: Tile(64, 32, 16, 4, 3),
        32: Tile(64, 64, 32, 8, 2),
        64: Tile(64, 32, 64, 8, 2),
    },
    "drawing_shrink": {  # as many words of the mask as threads, or nearly: more threads would draw the same words
        16: Tile(64, 64, 16, 4, 2),
        32: Tile(128, 32, 32, 8, 2),
        64: Tile(128, 32, 64, 8, 2),
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
# than the second read of dout that it saves, 2MN in 16 bits: BLOCK_C > 4r. For ranks over 16 none is
# listed: gpu/_lora_backward.py says why.
FUSED_TILES: dict[Kernel, dict[Units, dict[int, Tile]]] = {
    "output_pass": {
        "bf16": {16: Tile(64, 128, 16, 4, 2)},
        "tf32": {16: Tile(64, 64, 16, 8, 1)},
    },
    "input_pass": {
        "bf16": {16: Tile(32, 128, 16, 8, 2), 32: Tile(32, 64, 32, 8, 2), 64: Tile(64, 32, 64, 8, 2)},
        "tf32": {16: Tile(64, 64, 16, 8, 2), 32: Tile(32, 64, 32, 8, 1)},
    },
}

# Kernels that take a tile of the shared input through every member of a group, each with a block of the rank to itself:
# of the rank class of the largest. Tiles are small, because the masks and factors of all members are held at once.
GROUP_TILES: dict[GroupKernel, dict[Units, dict[int, GroupTile]]] = {
    "shrink": {
        "bf16": {
            16: GroupTile(64, 32, 16, 8, 2, members=3),
            32: GroupTile(64, 32, 32, 8, 2, members=2),
            64: GroupTile(64, 32, 64, 8, 2, members=1),
        },
        "tf32": {
            16: GroupTile(64, 32, 16, 8, 2, members=3),
            32: GroupTile(32, 32, 32, 8, 2, members=2),
            64: GroupTile(32, 32, 64, 8, 2, members=1),
        },
    },
    "input_pass": {
        "bf16": {
            16: GroupTile(32, 32, 16, 8, 2, members=3),
            32: GroupTile(16, 32, 32, 8, 2, members=2),
            64: GroupTile(64, 32, 64, 8, 2, members=1),
        },
        "tf32": {16: GroupTile(16, 32, 16, 8, 1, members=3), 32: GroupTile(32, 64, 32, 8, 1, members=1)},
    },
}

# Kernels of routed batches, by whether rows are few (decoding) or many. Every slot's rank is gone through in blocks of
# BLOCK_R, whatever the ranks are: a row's bits must not depend on the others' adapters.
ROUTED_TILES: dict[RoutedKernel, dict[Literal["few", "many"], Tile]] = {
    "shrink": {"few": Tile(16, 64, 16, 4, 4), "many": Tile(64, 32, 16, 8, 2)},
    "expand": {"few": Tile(16, 128, 16, 4, 1), "many": Tile(64, 128, 16, 8, 1)},
    "outer": {"few": Tile(32, 64, 16, 8, 2), "many": Tile(32, 64, 16, 8, 2)},
}
FEW_ROUTED_ROWS = 1024  # from which on they are many

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


def group_tile(kernel: GroupKernel, wide: torch.dtype, narrow: torch.dtype, largest_rank: int) -> GroupTile | None:
    """The tile of a kernel that serves a group in one pass; None where each member takes a pass of its own."""
    found = GROUP_TILES[kernel][units(wide, narrow)].get(rank_class(largest_rank))
    return found if found and largest_rank <= found.BLOCK_R else None


def routed_tile(kernel: RoutedKernel, M: int) -> Tile:
    """The tile of a batch of M rows, whatever they carry."""
    return ROUTED_TILES[kernel]["few" if M < FEW_ROUTED_ROWS else "many"]


def group_launches(members: int, most: int) -> list[slice]:
    """Which members go together, at most so many: as few launches as can be, of nearly equal size."""
    launches = _cdiv(members, most)
    ends = [members * (i + 1) // launches for i in range(launches)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def row_bands(M: int, column_blocks: int, BLOCK_M: int) -> tuple[int, int]:
    """(bands, rows of each): how a sum over M rows is split when `column_blocks` programs share each band.

    A band leaves one plane of partial sums: few, and a function of the shape alone, so that the bits are too.
    """
    bands = max(1, min(_cdiv(M, ROWS_PER_PLANE), _cdiv(PROGRAMS, column_blocks)))
    rows = _cdiv(max(1, _cdiv(M, bands)), BLOCK_M) * BLOCK_M
    return max(1, _cdiv(M, rows)), rows


def split_columns(M: int, K: int, t: Tile) -> tuple[int, int, int]:
    """(row blocks, splits of K, columns of each split) of a pass over M rows that sums over K."""
    row_blocks = _cdiv(M, t.BLOCK_M)
    splits = max(1, min(SPLIT_K_BELOW // max(row_blocks, 1), MOST_SPLITS, _cdiv(K, 4 * t.BLOCK_C)))
    k_per_split = _cdiv(_cdiv(K, splits), t.BLOCK_C) * t.BLOCK_C
    return row_blocks, _cdiv(K, k_per_split), k_per_split


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


# The base product of a LoRA linear, out = x Wᵀ + bias + drop(S Bᵀ), and that of its dx: who computes it.


@dataclass(frozen=True)
class LinearTile:
    """One tile of the own product: BLOCK_M x BLOCK_N of out, BLOCK_K of the sum a step, out stored in SLICES parts.

    max_rank: ranks whose low-rank part fits beside the accumulator; max_rank_tf32: where its operands are split in
    tf32, at twice the registers (fp16 beside fp32); 0: none.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SLICES: int
    num_warps: int
    num_stages: int
    max_rank: int
    max_rank_tf32: int


# Major compute capability -> tiles of the own product, the widest first. An architecture that is not here has no own
# product: 8.x lacks the bulk copy engine, 12.x the matrix instructions of 9.x and 10.x.
LINEAR_TILES: dict[int, tuple[LinearTile, ...]] = {
    9: (LinearTile(128, 256, 64, 4, 8, 4, 32, 32), LinearTile(128, 128, 64, 2, 8, 4, 64, 32)),
    10: (LinearTile(128, 256, 64, 4, 8, 4, 32, 16), LinearTile(128, 128, 64, 2, 8, 4, 64, 32)),
}

ProductBy = Literal["library", "own"]
SumClass = Literal["few rows", "short", "medium", "long"]

# Major compute capability -> class of the product -> who computes it where nobody asks for one by name. The library's
# way writes and reads a C operand, which is a share of the whole that falls with the length of the sum; the own one
# may be slower in the sum itself. Nothing was measured on a GPU yet: an entry moves to "own" with the commit that
# shows the figures of `bench/gpu.py --suites own-gemm`.
PRODUCTS: dict[int, dict[SumClass, ProductBy]] = {
    9: {"few rows": "library", "short": "library", "medium": "library", "long": "library"},
    10: {"few rows": "library", "short": "library", "medium": "library", "long": "library"},
}


def sum_class(M: int, K: int) -> SumClass:
    """The class of a product of M rows that sums over K."""
    if M < 1024:
        return "few rows"
    return "short" if K <= 2048 else "medium" if K <= 8192 else "long"


def product_of(arch: int, M: int, K: int) -> ProductBy:
    """Who computes a base product of M rows that sums over K, on major compute capability `arch`."""
    return PRODUCTS[arch][sum_class(M, K)] if arch in PRODUCTS else "library"


def linear_tiles(arch: int, r: int, tf32: bool) -> tuple[LinearTile, ...]:
    """The tiles that take this rank, the widest first."""
    return tuple(t for t in LINEAR_TILES.get(arch, ()) if r <= (t.max_rank_tf32 if tf32 else t.max_rank))


def linear_tile(fitting: tuple[LinearTile, ...], M: int, N: int, processors: int) -> LinearTile:
    """The widest of these tiles that leaves no processor without one, else the narrowest."""
    for t in fitting:
        tiles = -(-M // t.BLOCK_M) * -(-N // t.BLOCK_N)
        if tiles >= processors:
            return t
    return fitting[-1]
