"""The products of a wide matrix and a rank-r one, in plain torch: what the reference ops are made of.

Written for caches. x and dout go through in tiles that stay in the second-level cache, or little more, and are widened
to the adapters' dtype there; each output is rounded once where it is written; nothing with M rows is ever held in fp32
beside S.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.dispatch import FEW_ROWS, MOST_ELEMENTS
from fastpeft_kernels.masks import MASK_BITS, apply_mask
from fastpeft_kernels.scratch import scratch

TILE = 1 << 19  # elements: 2 MB once widened to fp32
TILE_COLUMNS = 1536
ONEDNN_ROWS = 256  # oneDNN's sums over more rows are noisier than torch.mm's

WIDENED_ROWS = 128  # so few rows are widened whole: three operators, and fp32's own product
THIN = 16  # MKL and oneDNN give fewer columns than these in one and a half to four times the time of as many rows


def shrink(x: Tensor, A: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """S = scale · drop(x) Aᵀ: x (M, K), A (r, K) of any strides -> (M, r) in A's dtype."""
    if mask is None and x.shape[0] <= FEW_ROWS:
        return F.linear(x.to(A.dtype), A).mul_(scale)
    if mask is None and x.dtype == A.dtype:
        return _product(x, A, scale)
    rows, columns = shape = _tile_shape(x, most_rows=TILE)
    if mask is None and _is_one_tile(x, A, shape):
        return _product(_widened(x, A.dtype), A, scale)
    S = _no_sums(x.shape[0], A)
    for A_block, tiles in zip(split(A, columns, dim=1), _tiles(x, mask, A.dtype, shape), strict=True):
        A_block = A_block.contiguous()
        for S_rows, tile in zip(split(S, rows), tiles, strict=True):
            _add_product_(S_rows, tile, A_block)
    return S.mul_(scale).to(A.dtype).contiguous()


def outer(x: Tensor, S: Tensor, mask: Tensor | None) -> Tensor:
    """Sᵀ drop(x): x (M, K), S (M, r) -> (r, K) in S's dtype."""
    if mask is None and x.dtype == S.dtype and _onednn(S) is None:
        return torch.mm(S.t(), x)
    rows, columns = shape = _tile_shape(x, most_rows=_most_summed_rows(S))
    if mask is None and _is_one_tile(x, S, shape):
        return torch.mm(S.t(), _widened(x, S.dtype))
    total = torch.zeros((S.shape[1], x.shape[1]), dtype=_sum_dtype(S), device=x.device)
    St = [part.t().contiguous() for part in split(S, rows)]
    for total_block, tiles in zip(split(total, columns, dim=1), _tiles(x, mask, S.dtype, shape), strict=True):
        for St_rows, tile in zip(St, tiles, strict=True):
            accumulate_(total_block, St_rows, tile.t())
    return total.to(S.dtype)


def output_pass(dout: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(scale · dout B, doutᵀ S), each tile of dout widened once for both: (M, r) and (N, r) in S's dtype."""
    if dout.dtype == S.dtype:
        return shrink(dout, B.t(), None, scale), outer(dout, S, None).t().contiguous()
    rows, columns = shape = _tile_shape(dout, most_rows=_most_summed_rows(S))
    if _is_one_tile(dout, S, shape):
        tile = _widened(dout, S.dtype)
        return _product(tile, B.t(), scale), torch.mm(S.t(), tile).t().contiguous()
    dS = _no_sums(dout.shape[0], B.t())
    dB = torch.zeros((S.shape[1], dout.shape[1]), dtype=_sum_dtype(S), device=S.device)
    St = [part.t().contiguous() for part in split(S, rows)]
    blocks = zip(split(B, columns), split(dB, columns, dim=1), _tiles(dout, None, S.dtype, shape), strict=True)
    for B_block, dB_block, tiles in blocks:
        Bt_block = B_block.t().contiguous()
        for dS_rows, St_rows, tile in zip(split(dS, rows), St, tiles, strict=True):
            _add_product_(dS_rows, tile, Bt_block)
            accumulate_(dB_block, St_rows, tile.t())
    return dS.mul_(scale).to(S.dtype).contiguous(), dB.t().contiguous().to(S.dtype)


def expand_(out: Tensor, S: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    """out += drop(S Bᵀ) in place: out (M, N), S (M, r), B (N, r) of any strides, S and B of one dtype."""
    if mask is None and _is_wider(S, out) and out.shape[0] <= WIDENED_ROWS:
        return out.copy_(out.to(S.dtype).addmm_(S, B.t()))
    if S.dtype == torch.float32 and out.dtype == torch.bfloat16:
        # One bf16 product, summed in fp32. B's rounding weighs as much as that of the output, at most: 1.41 x eager's
        # error where nothing but the low-rank part is there, less wherever the base's own rounding comes in.
        narrow = B.to(torch.bfloat16)
        S, B = _bf16_halves(S), torch.cat([narrow, narrow], dim=1)
    if S.dtype == out.dtype and mask is None:
        return out.addmm_(S, B.t())
    for rows in row_chunks(*out.shape):
        part = out[rows]
        delta = torch.mm(S[rows], B.t(), out=scratch("tile", part.shape, S.dtype, part))
        part.add_(delta if mask is None else apply_mask(delta, mask[rows], out=delta))
    return out


def _is_wider(t: Tensor, than: Tensor) -> bool:
    return t.dtype != than.dtype and torch.promote_types(t.dtype, than.dtype) == t.dtype


def _bf16_halves(t: Tensor) -> Tensor:
    """(M, r) fp32 as (M, 2r) bf16: t = high + low, 16 bits of it, side by side."""
    high = t.to(torch.bfloat16)
    return torch.cat([high, (t - high).to(torch.bfloat16)], dim=1)


# Tiles.


def row_chunks(M: int, columns: int, tile: int | None = None) -> Iterator[slice]:
    """Rows of an (M, columns) tensor, `tile` elements at a time, TILE unless given; 64 rows at least."""
    rows = max(64, (tile or TILE) // max(columns, 1) // 64 * 64)
    return (slice(start, start + rows) for start in range(0, M, rows))


def split(t: Tensor, size: int, dim: int = 0) -> tuple[Tensor, ...]:
    """Views of t, `size` long in `dim`, the last one perhaps shorter."""
    if t.shape[dim] <= size:
        return (t,)  # the usual case, and torch's own split is slow Python
    return t.split(size, dim)  # type: ignore[no-untyped-call,no-any-return]


def _tile_shape(x: Tensor, most_rows: int) -> tuple[int, int]:
    """(rows, columns) of the tiles of x: as few column blocks as go, of even width."""
    K = x.shape[1]
    width = -(-K // max(1, -(-K // TILE_COLUMNS)))
    width = max(1, -(-width // MASK_BITS)) * MASK_BITS
    return min(most_rows, max(64, TILE // width // 64 * 64)), width


def _is_one_tile(x: Tensor, narrow: Tensor, shape: tuple[int, int]) -> bool:
    """Whether one product by torch.mm does: there is nothing to add up, so the narrow dtype is that of the sum too."""
    fits = all(size <= most for size, most in zip(x.shape, shape, strict=True))
    return fits and narrow.dtype == _sum_dtype(narrow) and _onednn(narrow) is None


def _tiles(x: Tensor, mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> Iterator[Iterator[Tensor]]:
    """Block of columns by block, the tiles of drop(x) from the first row to the last: in `dtype`, contiguous.

    A tile is valid until the next one is taken.
    """
    rows, columns = shape
    if mask is None:
        for block in split(x, columns, dim=1):
            yield (_widened(tile, dtype) for tile in split(block, rows))
        return
    for block, bits in zip(split(x, columns, dim=1), split(mask, columns // MASK_BITS, dim=1), strict=True):
        pairs = zip(split(block, rows), split(bits, rows), strict=True)
        yield (_widened(_dropped(tile, tile_bits), dtype) for tile, tile_bits in pairs)


def _dropped(tile: Tensor, mask: Tensor) -> Tensor:
    return apply_mask(tile, mask, out=scratch("dropped", tile.shape, tile.dtype, tile))


def _widened(tile: Tensor, dtype: torch.dtype) -> Tensor:
    if tile.dtype == dtype and tile.is_contiguous():
        return tile
    return scratch("tile", tile.shape, dtype, tile).copy_(tile)


# Products of few columns: rows of the transposed product, wherever that is faster.


def _is_thin(A: Tensor) -> bool:
    return A.shape[0] < THIN and _onednn(A) is None


def _product(x: Tensor, A: Tensor, scale: float) -> Tensor:
    """scale · x Aᵀ, contiguous. Few rows have the same bits as where torch differentiates (dispatch.are_few)."""
    if _is_thin(A) and x.numel() > MOST_ELEMENTS:
        return torch.mm(A, x.t()).mul_(scale).t().contiguous()
    return F.linear(x, A).mul_(scale)


def _no_sums(M: int, A: Tensor) -> Tensor:
    """Zeros for the sum x Aᵀ of M rows, laid out for `_add_product_`."""
    shape = (M, A.shape[0])
    if _is_thin(A):
        return torch.zeros(shape[::-1], dtype=_sum_dtype(A), device=A.device).t()
    return torch.zeros(shape, dtype=_sum_dtype(A), device=A.device)


def _add_product_(total: Tensor, x: Tensor, A: Tensor) -> None:
    """total += x Aᵀ: rows of `_no_sums`, x contiguous, A (r, K) contiguous."""
    if _is_thin(A):
        accumulate_(total.t(), A, x)
    else:
        accumulate_(total, x, A)


# Which library multiplies.


def _sum_dtype(t: Tensor) -> torch.dtype:
    """What a sum over tiles is kept in: each addition to a 16-bit sum would round, until no tile moves it at all."""
    return torch.promote_types(t.dtype, torch.float32)


def accumulate_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a bᵀ: a contiguous, b contiguous or the transpose of a contiguous tensor."""
    onednn = _onednn(a)
    if onednn is not None:
        total.add_(onednn(a, b, None, "none", [], ""))
    elif a.dtype == total.dtype:
        total.addmm_(a, b.t())
    else:
        total.add_(torch.mm(a, b.t()))


def _most_summed_rows(S: Tensor) -> int:
    return TILE if _onednn(S) is None else ONEDNN_ROWS


def _onednn(t: Tensor) -> Callable[..., Tensor] | None:
    """oneDNN's fp32 product a bᵀ where it is faster than torch.mm; None elsewhere."""
    return _onednn_linear() if t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() else None


@functools.cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    """torch.mm hands fp32 to MKL, which takes AVX2 on processors of other makers than its own. Zen 5, the first of them
    with full-width AVX-512, loses half its speed that way (512 x 16 x 512, one core: 94 against 49 us); Zen 4 loses
    nothing. torch's compiler takes the same way past MKL for linear layers.
    """
    if not torch._C._has_mkldnn or "AVX512" not in torch.backends.cpu.get_cpu_capability() or not _is_zen5_or_newer():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default  # which costs half a packet's call


def _is_zen5_or_newer() -> bool:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return False
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    family = facts.get("cpu family", "")
    return facts.get("vendor_id") == "AuthenticAMD" and family.isdigit() and int(family) >= 26
