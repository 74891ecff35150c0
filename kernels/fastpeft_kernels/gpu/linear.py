"""The base product with the low-rank part in its epilogue: out = x Wᵀ + bias + drop(S Bᵀ), in one kernel of our own.

The alternative to the library's product with the low-rank part as its C operand (gpu/lora.py), which writes and reads
C, 4MN bytes in the forward and 4MK for dx: here nothing as large as out is touched beside out itself. Bytes beyond the
base product's own: S, B and the mask (MN/8), which neighbouring tiles find in L2. A LoRA linear keeps its passes over
x and dout: 4MK + 2MN, forward + backward in 16 bits, where dS and dB share one, and with dropout 3MK/8, for the mask is
written once and read by dA and by dx (counted in tests/kernels/test_budget.py). dx takes the same kernel: dx = dout W +
drop(dS A) is the product of dout with Wᵀ, read where it lies.

The kernel is persistent and loads through the GPU's bulk copy engine (TMA): compute capability 9 and 10, rows that are
contiguous and 16-byte aligned. The low-rank part is added after the sum over K, slice by slice, by warp-level matrix
instructions. An accumulator that started with it would have to be ready before the first product, and the loads of the
next tile could not run ahead through the epilogue of this one; a warp-group instruction there would make the assembler
wait for each one of the main loop's (seen in the code of 9.0; the compile tests look for both).
`dispatch.product` and the table in tiles.py decide which of the two products runs.
"""

import functools
from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpeft_kernels.dispatch import current_product, interpreting
from fastpeft_kernels.gpu._compile import CompileCase
from fastpeft_kernels.gpu._numerics import _dot16, product_for, round_to
from fastpeft_kernels.tiles import LINEAR_TILES, LinearTile, linear_tile, linear_tiles, product_of

BLOCK_R = 16  # the smallest dot: a rank is cut into blocks of it, so that S and B fit beside the accumulator
WARP_ROWS = tl.constexpr(16)  # of a warp-level matrix instruction, and of a warp's share of the accumulator
GROUP_M = 8  # rows of tiles that are walked together, so that L2 serves what they share
INTERPRETED_PROCESSORS = 3  # fewer than tiles: the loop over tiles is walked in the interpreter too
INTERPRETED_ARCH = 9


@triton.jit
def _tile_at(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Where tile `index` of out begins: down GROUP_M rows of tiles, then one column on."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    top = index // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(rows - top, GROUP_M)
    index %= GROUP_M * columns
    return (top + index % height) * BLOCK_M, index // height * BLOCK_N


@triton.jit
def _halves(x):
    """The left and the right half of x's columns; in a matrix unit's layout no value moves."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _slices(x, SLICES: tl.constexpr):
    """x's columns in SLICES equal parts, 2 or 4."""
    left, right = _halves(x)
    if SLICES == 2:
        return left, right
    else:
        return _halves(left) + _halves(right)


@triton.jit
def _low_rank(s, b, low, dtype: tl.constexpr):
    """low + s b, by warp-level instructions: a batch of one product for each warp's 16 rows of the accumulator."""
    WARPS: tl.constexpr = s.shape[0] // WARP_ROWS
    low = tl.reshape(low, (WARPS, WARP_ROWS, b.shape[1]))
    s_rows = tl.reshape(s, (WARPS, WARP_ROWS, s.shape[1]))
    b_rows = tl.broadcast_to(b[None, :, :], (WARPS, b.shape[0], b.shape[1]))
    return tl.reshape(product_for(s_rows, b_rows, low, dtype), (WARPS * WARP_ROWS, b.shape[1]))


@triton.jit
def _mask_words(mask_ptr, stride_mask, offs_m, first, inside_m, words, COUNT: tl.constexpr):
    """COUNT words of each row's packed mask, from word `first` on: one load serves 32 columns."""
    found = ()
    for i in tl.static_range(COUNT):
        inside = inside_m & (first + i < words)
        found += (tl.load(mask_ptr + offs_m * stride_mask + first + i, mask=inside, other=0),)  # type: ignore[assignment]
    return found


@triton.jit
def _kept(x, words, COUNT: tl.constexpr):
    """x (rows, 32 COUNT) where its bit is 1, else 0."""
    column = tl.arange(0, 32 * COUNT)[None, :]
    word = words[0][:, None]
    for i in tl.static_range(1, COUNT):
        word = tl.where(column < 32 * i, word, words[i][:, None])
    return tl.where((word >> (column % 32)) & 1 != 0, x, 0.0)


@triton.jit
def _linear_kernel(
    x_desc, w_desc, out_desc,  # (M, K), (N, K) or (K, N), (M, N)
    bias_ptr, s_ptr, b_ptr, mask_ptr,  # (N,), (M, r), (N, r), (M, ⌈N / 32⌉)
    M, N, K, r,
    stride_bias, stride_sm, stride_sr, stride_bn, stride_br, stride_mask,
    W_ROWS_ARE_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    dtype = out_desc.dtype
    SLICE: tl.constexpr = BLOCK_N // SLICES
    steps = tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)  # else the compiler adds a second kernel for K = 0
    first, programs = tl.program_id(0), tl.num_programs(0)
    stored = first - programs  # counted apart from `index`, which runs ahead of it in the pipeline
    for index in tl.range(first, tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), programs, flatten=True):
        m, n = _tile_at(index, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            x = x_desc.load([m, step * BLOCK_K])
            if W_ROWS_ARE_N:
                w = w_desc.load([n, step * BLOCK_K]).T
            else:
                w = w_desc.load([step * BLOCK_K, n])
            acc = _dot16(x, w, acc)

        stored += programs
        m, n = _tile_at(stored, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside_m = offs_m < M
        s_blocks = ()
        for block in tl.static_range(RANK_BLOCKS):
            offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
            s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
            inside = inside_m[:, None] & (offs_r < r)[None, :]
            s_blocks += (tl.load(s_ptrs, mask=inside, other=0.0),)  # type: ignore[assignment]
        parts = _slices(acc, SLICES)
        for i in tl.static_range(SLICES):
            offs_n = n + i * SLICE + tl.arange(0, SLICE)
            inside_n = offs_n < N
            if HAS_MASK:
                words = _mask_words(
                    mask_ptr, stride_mask, offs_m, (n + i * SLICE) // 32, inside_m, tl.cdiv(N, 32), SLICE // 32
                )
            low = tl.zeros((BLOCK_M, SLICE), tl.float32)
            for block in tl.static_range(RANK_BLOCKS):
                offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
                b_ptrs = b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br
                b = tl.load(b_ptrs, mask=inside_n[None, :] & (offs_r < r)[:, None], other=0.0)  # (BLOCK_R, SLICE)
                low = _low_rank(s_blocks[block], b, low, dtype)
            if HAS_MASK:
                low = _kept(low, words, SLICE // 32)
            part = parts[i] + low  # (BLOCK_M, SLICE)
            if HAS_BIAS:
                part += tl.load(bias_ptr + offs_n * stride_bias, mask=inside_n, other=0.0).to(tl.float32)[None, :]
            out_desc.store([m, n + i * SLICE], round_to(part, dtype))


def linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    S: Tensor,
    B: Tensor,
    mask: Tensor | None = None,
    tile: LinearTile | None = None,
) -> Tensor:
    """x Wᵀ + bias + drop(S Bᵀ): (M, N) in x's dtype, rounded once. Where `obstacle` finds none.

    Args:
        x: (M, K), bf16 or fp16.
        W: (N, K) in x's dtype, its rows or its columns contiguous.
        bias: (N,) in x's dtype, or None.
        S, B: (M, r) and (N, r) of one dtype, fp32 or x's; any strides.
        mask: (M, ⌈N / 32⌉), packed, or None: what of S Bᵀ is kept.
        tile: None takes that of tiles.py; benches name others.
    """
    (M, K), N, r = x.shape, W.shape[0], S.shape[1]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    t = tile or linear_tile(tiles_for(x, S), M, N, _processors(x.device))
    w_rows_are_n = W.stride(1) == 1
    w_desc = _descriptor(W, t.BLOCK_N, t.BLOCK_K) if w_rows_are_n else _descriptor(W.t(), t.BLOCK_K, t.BLOCK_N)
    tiles = triton.cdiv(M, t.BLOCK_M) * triton.cdiv(N, t.BLOCK_N)
    with torch.cuda.device_of(x):
        _linear_kernel[(min(tiles, _processors(x.device)),)](
            _descriptor(x, t.BLOCK_M, t.BLOCK_K), w_desc, _descriptor(out, t.BLOCK_M, t.BLOCK_N // t.SLICES),
            S if bias is None else bias, S, B, S if mask is None else mask, M, N, K, r,
            0 if bias is None else bias.stride(0), *S.stride(), *B.stride(), 0 if mask is None else mask.stride(0),
            w_rows_are_n, bias is not None, mask is not None, _rank_blocks(r),
            t.BLOCK_M, t.BLOCK_N, t.BLOCK_K, BLOCK_R, t.SLICES, GROUP_M,
            num_warps=t.num_warps, num_stages=t.num_stages,
        )  # fmt: skip
    return out


def _descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])


def _rank_blocks(r: int) -> int:
    """Blocks of the rank, a power of two: three kernels serve all ranks."""
    return int(triton.next_power_of_2(triton.cdiv(r, BLOCK_R)))


def tiles_for(x: Tensor, S: Tensor) -> tuple[LinearTile, ...]:
    """The tiles that this kernel may take for x and S; none on other GPUs, and for ranks that fit in none."""
    tf32 = x.dtype == torch.float16 and S.dtype == torch.float32  # fp16 has no range for the parts of an fp32 operand
    return linear_tiles(_arch(x.device), S.shape[1], tf32)


# Whether this kernel runs.


def takes_product(x: Tensor, W: Tensor, S: Tensor) -> bool:
    """Whether `linear` computes this base product: as `dispatch.product` says, else as the table of tiles.py does.

    Raises:
        RuntimeError: "own" was demanded by name and cannot be.
    """
    wanted = current_product()
    if wanted == "library":
        return False
    if wanted == "auto" and product_of(_arch(x.device), *x.shape) == "library":
        return False
    problem = obstacle(x, W, S)
    if problem and wanted == "own":
        raise RuntimeError(f'product "own" cannot run here: {problem}. Take product "auto" or "library"')
    return problem is None


def obstacle(x: Tensor, W: Tensor, S: Tensor) -> str | None:
    """Why `linear` cannot compute x Wᵀ + S Bᵀ; None where it can."""
    if _arch(x.device) not in LINEAR_TILES:
        known = " and ".join(f"{arch}.x" for arch in LINEAR_TILES)
        return f"it needs an NVIDIA GPU of compute capability {known}, this is {_arch_name(x.device)}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs x in bfloat16 or float16, got {x.dtype}"
    if not tiles_for(x, S):
        return f"no tile of it takes rank {S.shape[1]} with x in {x.dtype} and adapters in {S.dtype}"
    if x.shape[0] == 0 or W.shape[0] == 0:
        return None  # nothing is launched
    if W.shape[0] % 8:
        return f"rows of the output must be 16-byte aligned: a multiple of 8 columns, got {W.shape[0]}"
    return _unloadable("x", x) or (None if _unloadable("W", W.t()) is None else _unloadable("W", W))


def _unloadable(name: str, t: Tensor) -> str | None:
    """Why the bulk copy engine cannot load (rows, columns) `t`; None where it can."""
    rows, columns = t.shape
    if not columns:
        return f"{name} has no columns"
    if max(rows, columns) >= 2**31:
        return f"{name} of {rows} x {columns} is larger than 32-bit coordinates reach"
    if t.stride(1) != 1 or t.stride(0) < columns:
        return f"rows of {name} must be contiguous and apart from each other, got strides {t.stride()}"
    if t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16:
        return (
            f"rows of {name} must be 16-byte aligned, got a stride of {t.stride(0)} elements from address "
            f"{t.data_ptr():#x}"
        )
    return None


@functools.cache
def _arch(device: torch.device) -> int:
    """Major compute capability of an NVIDIA GPU; 0 for others. The interpreter stands in for a Hopper."""
    if interpreting():
        return INTERPRETED_ARCH
    if device.type != "cuda" or torch.version.hip:
        return 0
    return int(torch.cuda.get_device_capability(device)[0])


def _arch_name(device: torch.device) -> str:
    if not _arch(device):
        return str(device)
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _processors(device: torch.device) -> int:
    if interpreting():
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# What the compile tests build: every tile, for every mix of dtypes and every rank class that the launcher accepts.


def _case(arch: int, t: LinearTile, wide: str, narrow: str, blocks: int, forward: bool, full: bool) -> CompileCase:
    """The forward's or dx's product; `full`: with bias in the forward, with mask in dx."""
    pointers = {"bias_ptr": wide, "s_ptr": narrow, "b_ptr": narrow, "mask_ptr": "i32"}
    w_shape = (t.BLOCK_N, t.BLOCK_K) if forward else (t.BLOCK_K, t.BLOCK_N)
    shapes = {
        "x_desc": (t.BLOCK_M, t.BLOCK_K), "w_desc": w_shape, "out_desc": (t.BLOCK_M, t.BLOCK_N // t.SLICES),
    }  # fmt: skip
    constexprs: dict[str, object] = {
        "W_ROWS_ARE_N": forward, "HAS_BIAS": forward and full, "HAS_MASK": full and not forward,
        "RANK_BLOCKS": blocks, "BLOCK_M": t.BLOCK_M, "BLOCK_N": t.BLOCK_N, "BLOCK_K": t.BLOCK_K, "BLOCK_R": BLOCK_R,
        "SLICES": t.SLICES, "GROUP_M": GROUP_M,
        "stride_sr": 1, "stride_br" if forward else "stride_bn": 1,  # as Triton specialises strides of 1
    }  # fmt: skip

    def kind(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name in shapes:
            return f"tensordesc<{wide}[{shapes[name][0]}, {shapes[name][1]}]>"
        return f"*{pointers[name]}" if name in pointers else "i32"

    form = f"{'forward' if forward else 'dx'}{'' if full else '-bare'}"
    return CompileCase(
        f"{form}-{t.BLOCK_M}x{t.BLOCK_N}-r{blocks * BLOCK_R}-{wide}-{narrow}-on-{arch}", _linear_kernel,
        {name: kind(name) for name in _linear_kernel.arg_names}, constexprs, t.num_warps, t.num_stages,
        capabilities=(10 * arch,), unaligned=("r",), pipelined=True,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    mixes = (("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"))  # fp16 alone costs what bf16 alone does
    for arch, tiles in LINEAR_TILES.items():
        for t, (wide, narrow), forward in product(tiles, mixes, (True, False)):
            max_rank = t.max_rank_tf32 if (wide, narrow) == ("fp16", "fp32") else t.max_rank
            for blocks in (1, 2, 4):
                if blocks * BLOCK_R <= max_rank:
                    yield _case(arch, t, wide, narrow, blocks, forward, full=True)
        for forward in (True, False):
            yield _case(arch, tiles[0], "bf16", "fp32", 1, forward, full=False)
