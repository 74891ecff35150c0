"""The ops of scale.py in plain torch: the specification, and the path on a CPU. IA³: arXiv:2205.05638 section 3.3.

    out    = x · scale                (M, N)        out    = (x · scale) Wᵀ + bias    (M, N)
    dx     = dout · scale             (M, N)        g      = dout W                   (M, K)
    dscale = Σ_m dout · x             (N,)          dx     = g · scale                (M, K)
                                                    dscale = Σ_m g · x                (K,)

Written for caches: 16-bit rows are widened tile by tile in a buffer that the next tile uses again; of x · scale and g
in front of and behind a base product, only a block of rows is ever there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.low_rank import split
from fastpeft_kernels.scratch import scratch

TILE = 1 << 17  # elements: 512 KB once widened to fp32, so that two of them stay in a second-level cache
FEWEST_ROWS, MOST_ROWS = 64, 256  # of a tile: each adds a row to the planes of dscale, and longer sums are noisier
PRODUCT_ROWS = 512  # of a base product: enough for the full speed of torch.mm


def scale_columns(x: Tensor, scale: Tensor) -> Tensor:
    """x · scale: x (M, N) of any strides, scale of N entries -> (M, N) in x's dtype, contiguous, rounded once."""
    if x.numel() <= TILE and x.is_contiguous():
        return _scale_tile(x, scale)
    return _scale_into(torch.empty(x.shape, dtype=x.dtype, device=x.device), x, scale)


def scale_columns_backward(dout: Tensor, x: Tensor | None, scale: Tensor, need_dx: bool) -> tuple[Tensor, Tensor]:
    """(dx, dscale): (M, N) in dout's dtype and scale's shape in its dtype.

    Without x no dscale is computed; what is not computed is of shape (0,).
    """
    dx = torch.empty(dout.shape if need_dx else 0, dtype=dout.dtype, device=dout.device)
    planes = _gradients(dout, x, scale, dx if need_dx else None)
    return dx, scale.new_empty(0) if x is None else _sum_planes(planes, scale)


def scale_linear(x: Tensor, scale: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """(x · scale) Wᵀ + bias: x (M, K), scale of K entries, W (N, K) -> (M, N) in x's dtype."""
    M, K = x.shape
    if M <= PRODUCT_ROWS:
        return F.linear(scale_columns(x, scale), W, bias)
    out = torch.empty((M, W.shape[0]), dtype=x.dtype, device=x.device)
    buffer = torch.empty((PRODUCT_ROWS, K), dtype=x.dtype, device=x.device)  # too large to be kept between calls
    for x_rows, out_rows in zip(split(x, PRODUCT_ROWS), split(out, PRODUCT_ROWS), strict=True):
        scaled = _scale_into(buffer[: len(x_rows)], x_rows, scale)
        if bias is None:
            torch.mm(scaled, W.t(), out=out_rows)
        else:
            torch.addmm(bias, scaled, W.t(), out=out_rows)
    return out


def scale_linear_backward(
    dout: Tensor, x: Tensor | None, scale: Tensor, W: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dscale) as of `scale_columns_backward`, with g = dout W in the place of dout."""
    M, K = dout.shape[0], W.shape[1]
    dx = torch.empty((M, K) if need_dx else 0, dtype=dout.dtype, device=dout.device)
    buffer = torch.empty((min(PRODUCT_ROWS, M), K), dtype=dout.dtype, device=dout.device)
    planes = [torch.zeros((1, K), dtype=_wide_dtype(dout, scale), device=dout.device)]  # all there is without rows
    for start in range(0, M, PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        g = torch.mm(dout[rows], W, out=buffer[: M - start])
        planes.append(_gradients(g, None if x is None else x[rows], scale, dx[rows] if need_dx else None))
    return dx, scale.new_empty(0) if x is None else _sum_planes(torch.cat(planes), scale)


def _wide_dtype(x: Tensor, scale: Tensor) -> torch.dtype:
    """What is computed in: fp32, or fp64 where one of them is."""
    return torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)


def _scale_tile(x: Tensor, scale: Tensor) -> Tensor:
    """x · scale in as few of torch's operators as go: for a single row these are what takes the time."""
    return (x * scale.reshape(-1)).to(x.dtype)


def _scale_into(out: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    wide = _wide_dtype(x, scale)
    scale = scale.reshape(-1).to(wide)
    if x.dtype == wide:
        return torch.mul(x, scale, out=out)
    if x.numel() <= TILE:
        return out.copy_(_scale_tile(x, scale))
    rows = _tile_rows(x)
    buffer = scratch("scale-tile", (rows, x.shape[1]), wide, x)
    for x_tile, out_tile in zip(split(x, rows), split(out, rows), strict=True):
        out_tile.copy_(buffer[: len(x_tile)].copy_(x_tile).mul_(scale))
    return out


def _gradients(dout: Tensor, x: Tensor | None, scale: Tensor, dx: Tensor | None) -> Tensor:
    """dx = dout · scale where `dx` is given; returns the planes of Σ_m dout · x, one a tile: (tiles, N)."""
    wide, rows, (M, N) = _wide_dtype(dout, scale), _tile_rows(dout), dout.shape
    scale = scale.reshape(-1).to(wide)
    d_buffer, x_buffer = scratch("scale-tile", (2, min(rows, M), N), wide, dout)
    planes = torch.empty((0 if x is None else -(-M // rows), N), dtype=wide, device=dout.device)
    for i, start in enumerate(range(0, M, rows)):
        tile = slice(start, start + rows)
        d = dout[tile]
        if ours := d.dtype != wide:  # widened once, for both products
            d = d_buffer[: len(d)].copy_(d)
        if x is not None:
            torch.sum(_product(x[tile], d, x_buffer[: len(d)]), 0, out=planes[i])
        if dx is not None:
            dx[tile].copy_(d.mul_(scale)) if ours else torch.mul(d, scale, out=dx[tile])
    return planes


def _product(a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:
    """a · b in b's dtype; a may be narrower."""
    return torch.mul(a, b, out=buffer) if a.dtype == b.dtype else buffer.copy_(a).mul_(b)


def _sum_planes(planes: Tensor, scale: Tensor) -> Tensor:
    return planes.sum(0).to(scale.dtype).view(scale.shape)


def _tile_rows(x: Tensor) -> int:
    return max(FEWEST_ROWS, min(MOST_ROWS, TILE // max(x.shape[1], 1)))
