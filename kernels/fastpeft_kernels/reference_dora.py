"""DoRA in plain torch: the specification of fastpeft_kernels.dora, and its path on a CPU.

    norm = ‖W + s B A‖ of each row     (N,)     without a gradient
    g    = magnitude / norm            (N,)
    S    = s · drop(x) Aᵀ              (M, r)   `shrink`
    z    = drop(x) Wᵀ                  (M, N)
    out  = (x - c drop(x)) Wᵀ + bias + c g · (z + S Bᵀ)              `expand_`

    T    = doutᵀ S                     (N, r)   dS = s · dout (c g · B)        `output_pass`
    dB   = c g · T                     (N, r)   dA = dSᵀ drop(x)               `outer`
    dmagnitude = c (Σ_m dout · z + Σ_r T · B) / norm
    dx   = dout W + drop'(c (g - 1) · dout W + dS A)                           `expand_`

drop zeroes what the mask drops and no more; c = 1 / (1 - p) is `keep_scale`. Without dropout drop(x) is x, c is 1, and
one product each way is left: out = g · (z + S Bᵀ) + bias and dx = (g · dout) W + dS A. z is kept without the low-rank
part, so that only the base product is rounded to x's dtype in dmagnitude. arXiv:2402.09353 sections 4.1 to 4.3.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.low_rank import accumulate_, expand_, outer, output_pass, row_chunks, shrink
from fastpeft_kernels.masks import apply_mask
from fastpeft_kernels.reference import add_dx_

CHUNK = 1 << 17  # elements: widened to fp32, 512 KB that stay in the second-level cache with their temporaries


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """What norms and column factors are computed in: fp32, or fp64 where something is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · B A‖ of each row: (N,) in fp32, or fp64. One pass over W, tile by tile.

    A row of zeros gets the smallest number instead: its magnitude is 0 as well, and 0 / 0 would be NaN.

    Summing ‖W‖² + 2s (W Aᵀ) · B + s² B (A Aᵀ) · B instead would need no product of W's size, but cancels where the
    update undoes most of a row.
    """
    wide = wide_dtype(W, A)
    A, B = A.to(wide).contiguous(), (B.to(wide) * scaling).contiguous()
    norm = torch.empty(W.shape[0], dtype=wide, device=W.device)
    for rows in _chunks(W):
        V = W[rows].to(wide, copy=True, memory_format=torch.contiguous_format)
        accumulate_(V, B[rows], A.t())
        norm[rows] = torch.linalg.vector_norm(V, dim=1)
    return norm.clamp_min_(torch.finfo(wide).tiny)


def dora_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    mask: Tensor | None,
    scaling: float,
    keep_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, S, z, norm): (M, N) in x's dtype, (M, r) in A's, (M, N) in x's and (N,)."""
    norm = dora_norm(W, A, B, scaling)
    factor = magnitude.to(norm.dtype) / norm * keep_scale
    dropped = x if mask is None else _dropped(x, mask)
    S = shrink(dropped, A, None, scaling)
    z = torch.mm(dropped, W.t())
    if mask is None:
        out = _scaled_columns(z, factor, bias)
    else:
        rest = torch.sub(x, dropped, alpha=keep_scale, out=dropped)
        out = _add_scaled_columns_(F.linear(rest, W, bias), z, factor)
    return expand_(out, S, (B * factor.unsqueeze(1)).to(B.dtype)), S, z, norm


def dora_linear_backward(
    dout: Tensor,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    S: Tensor,
    z: Tensor,
    norm: Tensor,
    mask: Tensor | None,
    scaling: float,
    keep_scale: float,
    need_dx: bool,
    need_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dB, dmagnitude); dx is empty, of shape (0,), where it is not needed, and so are all the others."""
    g = magnitude.to(norm.dtype) / norm
    factor = (g * keep_scale).unsqueeze(1)
    weighted = (B * factor).to(B.dtype)
    columns = g if mask is None else (g - 1) * keep_scale
    of_W = dout.shape[0] > W.shape[1]  # the smaller of dout and W is scaled
    need_scaled = need_dx and not of_W
    if need_factors:
        dS, T = output_pass(dout, weighted, S, scaling)
        dB, dA = (T * factor).to(B.dtype), outer(x, dS, mask)
        scaled, total = _column_pass(dout, z, columns, need_scaled)
        total += (T.to(norm.dtype) * B).sum(1)
        dmagnitude = (total * keep_scale / norm).to(magnitude.dtype)
    else:
        dS = shrink(dout, weighted.t(), None, scaling)
        scaled = _scaled_columns(dout, columns, None) if need_scaled else dout.new_empty(0)
        dA, dB, dmagnitude = (t.new_empty(0) for t in (A, B, magnitude))
    if not need_dx:
        return x.new_empty(0), dA, dB, dmagnitude
    dx = add_dx_(torch.mm(dout, _scaled_rows(W, columns)) if of_W else torch.mm(scaled, W), dS, A, None)
    if mask is not None:
        dx = _add_dropped_(torch.mm(dout, W), dx, mask)
    return dx, dA, dB, dmagnitude


def _chunks(t: Tensor) -> Iterator[slice]:
    return row_chunks(t.shape[0], t.shape[1], CHUNK)


# A chunk of rows at a time: column factors are fp32 where x is 16 bits wide, and masks widen to x's size.


def _dropped(x: Tensor, mask: Tensor) -> Tensor:
    """drop(x): (M, K), contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in _chunks(x):
        out[rows] = apply_mask(x[rows], mask[rows])
    return out


def _add_dropped_(out: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """out += drop(x) in place."""
    for rows in _chunks(x):
        out[rows] += apply_mask(x[rows], mask[rows])
    return out


def _scaled_columns(z: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """factor · z + bias: (M, N) in z's dtype."""
    if z.dtype == factor.dtype:
        return torch.mul(z, factor) if bias is None else torch.addcmul(bias, z, factor)
    out = torch.empty_like(z)
    wide_bias = None if bias is None else bias.to(factor.dtype)
    for rows in _chunks(z):
        scaled = z[rows] * factor
        out[rows] = scaled if wide_bias is None else scaled.add_(wide_bias)
    return out


def _add_scaled_columns_(out: Tensor, z: Tensor, factor: Tensor) -> Tensor:
    """out += factor · z in place."""
    if z.dtype == factor.dtype:
        return out.addcmul_(z, factor)
    for rows in _chunks(z):
        out[rows] += z[rows] * factor
    return out


def _scaled_rows(W: Tensor, factor: Tensor) -> Tensor:
    """W with row n multiplied by factor[n]: (N, K) in W's dtype."""
    out = torch.empty_like(W)
    for rows in _chunks(W):
        torch.mul(W[rows], factor[rows].unsqueeze(1), out=out[rows])
    return out


def _column_pass(dout: Tensor, z: Tensor, factor: Tensor, need_scaled: bool) -> tuple[Tensor, Tensor]:
    """(factor · dout, Σ_m dout · z): (M, N) in dout's dtype, empty where it is not needed, and (N,) in factor's."""
    scaled = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device) if need_scaled else dout.new_empty(0)
    total = torch.zeros_like(factor)
    for rows in _chunks(dout):
        tile = dout[rows].to(factor.dtype)
        total += (tile * z[rows]).sum(0)
        if need_scaled:
            scaled[rows] = tile * factor
    return scaled, total
