"""Every op in plain torch: the specification, and the path on a CPU.

Written for caches. x and dout go through in tiles that stay in the second-level cache and are widened to the adapters'
dtype there; each output is rounded once where it is written; nothing with M rows is ever held in fp32 beside S.

    S    = scale · drop(x) Aᵀ          (M, r)   `shrink`
    out  = x Wᵀ + bias + S Bᵀ          (M, N)   `expand`
    dS   = scale · dout B              (M, r)   `shrink`
    dB   = doutᵀ S                     (N, r)   `outer`
    dA   = dSᵀ drop(x)                 (r, K)   `outer`
    dx   = dout W + drop'(dS A)        (M, K)   `expand`

drop zeroes what the mask drops and no more: its factor 1 / (1 - p) is part of `scale`. LoRA: arXiv:2106.09685,
section 4.1.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1 << 19  # elements: 2 MB once widened to fp32, a second-level cache or little more
TILE_COLUMNS, SUMMED_ROWS = 1536, 256  # longer sums in one go are noisier than torch.mm's own

FEW_ROWS = 16  # decoding: bound by the number of torch's operators, not by what they move

MASK_BITS = 32  # columns in one word of a mask
KEEP_LEVELS = 1 << 16  # the probability to keep an element is a multiple of 1 / KEEP_LEVELS


# Dropout masks: one bit an element, bit j of word w is column 32 w + j, 1 keeps.


def keep_level(p: float) -> int:
    """The probability to keep an element under dropout `p`, in units of 1 / KEEP_LEVELS; at least one unit."""
    return max(1, round((1.0 - p) * KEEP_LEVELS))


def mask_words(columns: int) -> int:
    return -(-columns // MASK_BITS)


def draw_mask(M: int, K: int, p: float, device: torch.device) -> Tensor:
    """Independent Bernoulli bits from torch's generator: (M, ⌈K / 32⌉) int32, each bit 1 with probability 1 - p.

    Bit-sliced: from the lowest binary digit of the level up, a 1 takes `acc | word`, a 0 `acc & word`, which makes 64
    draws out of 16 random words. The stock `bernoulli_` takes six times as long on a CPU.
    """
    level, words = keep_level(p), M * mask_words(K)
    acc = torch.full(((words + 1) // 2,), -1 if level == KEEP_LEVELS else 0, dtype=torch.int64, device=device)
    digits = range((level & -level).bit_length() - 1, KEEP_LEVELS.bit_length() - 1)  # zeros at the end change nothing
    for digit in digits:
        word = torch.empty_like(acc).random_(-(1 << 63), None)
        acc = acc.bitwise_or_(word) if level >> digit & 1 else acc.bitwise_and_(word)
    return acc.view(torch.int32)[:words].view(M, mask_words(K))


def _byte_lanes(itemsize: int, device: torch.device) -> Tensor:
    """For each byte of a mask its eight bits as lanes of `itemsize` bytes, all ones or all zeros: (256, itemsize)."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1  # (256, 8)
    return (-bits).to(_LANES[itemsize]).view(torch.int64)


_kept_byte_lanes = functools.cache(_byte_lanes)
_LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask keeps, 0 where it drops (also where x is not finite): (M, K) in x's dtype."""
    M, K = x.shape
    lanes_dtype = _LANES[x.element_size()]
    table = _kept_byte_lanes if type(mask) is Tensor else _byte_lanes  # a fake tensor must not outlive its mode
    indices = mask.contiguous().view(torch.uint8).reshape(-1).int()
    lanes = table(x.element_size(), x.device).index_select(0, indices).view(lanes_dtype)
    return (x.view(lanes_dtype) & lanes.view(M, mask.shape[1] * MASK_BITS)[:, :K]).view(x.dtype)


def dropout(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """scale · drop(x): (M, K) in x's dtype."""
    return apply_mask(x, mask).mul_(scale)


# The low-rank products.


def _row_chunks(M: int, columns: int) -> Iterator[slice]:
    rows = max(64, TILE // max(columns, 1) // 64 * 64)
    return (slice(start, start + rows) for start in range(0, M, rows))


def _split(t: Tensor, size: int, dim: int = 0) -> tuple[Tensor, ...]:
    if t.shape[dim] <= size:
        return (t,)  # the usual case, and torch's own split is slow Python
    return t.split(size, dim)  # type: ignore[no-untyped-call,no-any-return]


def _tile_shape(x: Tensor, most_rows: int) -> tuple[int, int]:
    """(rows, columns) of the tiles of x: as few column blocks as go, of even width."""
    K = x.shape[1]
    width = -(-K // max(1, -(-K // TILE_COLUMNS)))
    width = max(1, -(-width // MASK_BITS)) * MASK_BITS
    return min(most_rows, max(64, TILE // width // 64 * 64)), width


def _tiles(x: Tensor, mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> Iterator[Iterator[Tensor]]:
    """Block of columns by block, the tiles of drop(x) from the first row to the last: in `dtype`, contiguous."""
    rows, columns = shape
    if mask is None:
        for block in _split(x, columns, dim=1):
            yield (tile.to(dtype).contiguous() for tile in _split(block, rows))
        return
    for block, bits in zip(_split(x, columns, dim=1), _split(mask, columns // MASK_BITS, dim=1), strict=True):
        pairs = zip(_split(block, rows), _split(bits, rows), strict=True)
        yield (apply_mask(tile, tile_bits).to(dtype) for tile, tile_bits in pairs)


def shrink(x: Tensor, A: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """S = scale · drop(x) Aᵀ: x (M, K), A (r, K) of any strides -> (M, r) in A's dtype."""
    if mask is None and (x.dtype == A.dtype or x.shape[0] <= FEW_ROWS):
        return torch.mm(x.to(A.dtype), A.t()).mul_(scale)
    rows, columns = shape = _tile_shape(x, most_rows=TILE)
    S = torch.zeros((x.shape[0], A.shape[0]), dtype=_sum_dtype(A), device=x.device)
    for A_block, tiles in zip(_split(A, columns, dim=1), _tiles(x, mask, A.dtype, shape), strict=True):
        A_block = A_block.contiguous()
        for S_rows, tile in zip(_split(S, rows), tiles, strict=True):
            S_rows.add_(_product(tile, A_block))
    return S.mul_(scale).to(A.dtype)


def outer(x: Tensor, S: Tensor, mask: Tensor | None) -> Tensor:
    """Sᵀ drop(x): x (M, K), S (M, r) -> (r, K) in S's dtype."""
    if mask is None and x.dtype == S.dtype and _onednn(S) is None:
        return torch.mm(S.t(), x)
    rows, columns = shape = _tile_shape(x, most_rows=SUMMED_ROWS)
    total = torch.zeros((S.shape[1], x.shape[1]), dtype=_sum_dtype(S), device=x.device)
    St = [part.t().contiguous() for part in _split(S, rows)]
    for total_block, tiles in zip(_split(total, columns, dim=1), _tiles(x, mask, S.dtype, shape), strict=True):
        for St_rows, tile in zip(St, tiles, strict=True):
            total_block.add_(_product(St_rows, tile.t()))
    return total.to(S.dtype)


def _output_pass(dout: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(dS, dB) with each tile of dout widened once for both: (M, r) and (N, r) in S's dtype."""
    if dout.dtype == S.dtype:
        return shrink(dout, B.t(), None, scale), outer(dout, S, None).t().contiguous()
    rows, columns = shape = _tile_shape(dout, most_rows=SUMMED_ROWS)
    dS = torch.zeros_like(S, dtype=_sum_dtype(S))
    dB = torch.zeros((S.shape[1], dout.shape[1]), dtype=_sum_dtype(S), device=S.device)
    St = [part.t().contiguous() for part in _split(S, rows)]
    blocks = zip(_split(B, columns), _split(dB, columns, dim=1), _tiles(dout, None, S.dtype, shape), strict=True)
    for B_block, dB_block, tiles in blocks:
        Bt_block = B_block.t().contiguous()
        for dS_rows, St_rows, tile in zip(_split(dS, rows), St, tiles, strict=True):
            dS_rows.add_(_product(tile, Bt_block))
            dB_block.add_(_product(St_rows, tile.t()))
    return dS.mul_(scale).to(S.dtype), dB.t().contiguous().to(S.dtype)


def _sum_dtype(t: Tensor) -> torch.dtype:
    """What a sum over tiles is kept in: each addition to a 16-bit sum would round, until no tile moves it at all."""
    return torch.promote_types(t.dtype, torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ: a contiguous, b contiguous or the transpose of a contiguous tensor."""
    onednn = _onednn(a)
    return torch.mm(a, b.t()) if onednn is None else onednn(a, b, None, "none", [], "")


def _onednn(t: Tensor) -> Callable[..., Tensor] | None:
    """oneDNN's fp32 product a bᵀ on a CPU with AVX-512; None elsewhere.

    torch.mm hands fp32 to MKL, which takes twice as long for these narrow shapes on processors of other makers
    (512 x 16 x 512, one Zen 5 core: 94 against 49 us). torch's compiler takes the same way past it for linear layers.
    """
    return _onednn_linear() if t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() else None


@functools.cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    if not torch._C._has_mkldnn or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default  # which costs half a packet's call


def expand_(out: Tensor, S: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    """out += drop(S Bᵀ) in place: out (M, N), S (M, r), B (N, r) of any strides, S and B of one dtype."""
    if mask is None and S.dtype != out.dtype and out.shape[0] <= FEW_ROWS:
        return out.add_(torch.mm(S, B.t()))
    if S.dtype == torch.float32 and out.dtype == torch.bfloat16:
        # One bf16 product, summed in fp32. B's rounding weighs as much as that of the output, at most: 1.41 x eager's
        # error where nothing but the low-rank part is there, less wherever the base's own rounding comes in.
        narrow = B.to(torch.bfloat16)
        S, B = _bf16_halves(S), torch.cat([narrow, narrow], dim=1)
    if S.dtype == out.dtype:
        if mask is None:
            return out.addmm_(S, B.t())
        for rows in _row_chunks(*out.shape):
            out[rows].add_(apply_mask(torch.mm(S[rows], B.t()), mask[rows]))
        return out
    for rows in _row_chunks(*out.shape):
        delta = torch.mm(S[rows], B.t())
        out[rows].add_(delta if mask is None else apply_mask(delta, mask[rows]))
    return out


def _bf16_halves(t: Tensor) -> Tensor:
    """(M, r) fp32 as (M, 2r) bf16: t = high + low, 16 bits of it, side by side."""
    high = t.to(torch.bfloat16)
    return torch.cat([high, (t - high).to(torch.bfloat16)], dim=1)


# The ops: a LoRA linear that owns the base product, and the LoRA part added onto somebody's output.


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, S): (M, N) in x's dtype and (M, r) in A's."""
    out = F.linear(x, W, bias)
    S = shrink(x, A, mask, scale)
    return expand_(out, S, B), S


def lora_linear_backward(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    mask: Tensor | None,
    scale: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB); dx is empty, of shape (0,), where it is not needed."""
    dS, dB = _output_pass(dout, B, S, scale)
    dx = _add_dx_(torch.mm(dout, W), dS, A, mask) if need_dx else x.new_empty(0)
    return dx, outer(x, dS, mask), dB


def lora_add(out: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out + S Bᵀ, S): (M, N) in out's dtype and (M, r) in A's."""
    S = shrink(x, A, mask, scale)
    return expand_(out.clone(memory_format=torch.contiguous_format), S, B), S


def lora_add_backward(
    dout: Tensor, x: Tensor, A: Tensor, B: Tensor, S: Tensor, mask: Tensor | None, scale: float, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) of the low-rank part alone; dx is empty, of shape (0,), where it is not needed."""
    dS, dB = _output_pass(dout, B, S, scale)
    dx = _add_dx_(torch.zeros(x.shape, dtype=x.dtype, device=x.device), dS, A, mask) if need_dx else x.new_empty(0)
    return dx, outer(x, dS, mask), dB


def _add_dx_(dx: Tensor, dS: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """dx += drop'(dS A) in place. Eager torch rounds this product to bf16 before it adds it: bf16 factors will do."""
    if dx.dtype == torch.bfloat16:
        dS, A = dS.to(dx.dtype), A.to(dx.dtype)
    return expand_(dx, dS, A.t(), mask)
