"""Multi-adapter batches in plain torch: the specification of the routed ops, and their path on a CPU.

Every row of a batch may take another adapter, several, or none. An adapter is a slot, a number; three tensors say who
takes what:

    rows     (P, M) int32      pass p's order of all M rows: those with a p-th entry first, by slot, the others last
    starts   (P, A + 1) int32  the entries of slot j in pass p are rows[p, starts[p, j] : starts[p, j + 1]]
    weights  (P, M) fp32       of each entry, in the order of `rows`; None where all are 1

P is the largest number of entries that a row has, 1 in all but weighted batches. S is kept by entry, (P, M, R): line e
of pass p belongs to row rows[p, e], columns past its slot's rank are zero, lines without an entry too.

Slot by slot: the rows of a slot are a slice where they follow one another, else a part of one gathered copy. Small
batches whose slots have equally many rows, in order, go through batched products instead (routed_even, and routed_pairs
in training), and inference on few rows a slot has ways of its own (routed_few).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels import low_rank, routed_even
from fastpeft_kernels.reference import add_dx_
from fastpeft_kernels.routed_few import add_to_few_
from fastpeft_kernels.routed_passes import Pass, passes_of


def _even(passes: Sequence[Pass], t: Tensor, factors: Sequence[Tensor], rank_dim: int) -> list[int] | None:
    """The slots of a batch that `routed_even` takes, in its order; None for any other batch. t is x or out."""
    dtype = factors[0].dtype  # in which it computes: a wider out would be rounded to it
    if len(passes) != 1 or not passes[0].is_even or torch.promote_types(t.dtype, dtype) != dtype:
        return None
    slots = [segment.slot for segment in passes[0].segments]
    return (
        slots
        if routed_even.is_worth_it(t.shape[0], t.shape[1], [factors[slot].shape[rank_dim] for slot in slots])
        else None
    )


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


# LoRA: S = weight · scale · drop(x) Aᵀ, out = base + S Bᵀ.


def shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """S: (P, M, R) in the factors' dtype, R the largest rank; x (M, K), factors (r_j, K)."""
    passes = passes_of(rows, starts)
    slots = _even(passes, x, factors, 0)
    if slots is not None:
        narrow = routed_even.shrink(x, [factors[slot] for slot in slots], [scales[slot] for slot in slots], mask)
        S = _padded(narrow, max(map(len, factors))).unsqueeze(0)
        return S if weights is None else S.mul_(weights.unsqueeze(2))
    S = _new_S(factors, rows)
    for S_lines, taken in zip(S, passes, strict=True):
        for segment, part, bits in zip(taken.segments, taken.take(x), taken.take(mask), strict=True):
            assert part is not None
            A = factors[segment.slot]
            S_lines[segment.begin : segment.end, : len(A)] = low_rank.shrink(part, A, bits, scales[segment.slot])
    return S if weights is None else S.mul_(weights.unsqueeze(2))


def shrink_backward(
    dS: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(dx, [dA_j]); dx is empty, of shape (0,), where it is not needed."""
    if weights is not None:
        dS = (dS * weights.unsqueeze(2)).to(dS.dtype)
    passes = passes_of(rows, starts)
    slots = _even(passes, x, factors, 0)
    if slots is not None:
        own = [factors[slot] for slot in slots]
        its_dS = dS[0, :, : max(map(len, own))]
        dx, found = routed_even.shrink_backward(its_dS, x, own, [scales[slot] for slot in slots], mask, need_dx)
        return dx, _of_all(factors, slots, found)
    dAs: list[Tensor | None] = [None] * len(factors)
    dx_dtype = x.dtype if len(rows) == 1 else _wide(x)
    dx = torch.zeros(x.shape if need_dx else 0, dtype=dx_dtype, device=x.device)
    for dS_lines, taken in zip(dS, passes, strict=True):
        parts = zip(taken.segments, taken.take(x), taken.take(mask), taken.take(dx if need_dx else None), strict=True)
        for segment, part, bits, dx_part in parts:
            assert part is not None
            A = factors[segment.slot]
            dS_part = dS_lines[segment.begin : segment.end, : len(A)] * scales[segment.slot]
            dAs[segment.slot] = _sum(dAs[segment.slot], low_rank.outer(part, dS_part, bits))
            if dx_part is not None:
                dtype = torch.promote_types(dx.dtype, A.dtype) if len(rows) > 1 else A.dtype
                taken.give_back_(dx, segment, add_dx_(dx_part, dS_part.to(dtype), A.to(dtype), bits))
    return dx.to(x.dtype), [A.new_zeros(A.shape) if dA is None else dA for A, dA in zip(factors, dAs, strict=True)]


def expand(base: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor) -> Tensor:
    """base + the sum over each row's entries of S Bᵀ, rounded once: (M, N) in base's dtype; factors (N, r_j)."""
    return expand_(base.clone(memory_format=torch.contiguous_format), S, factors, rows, starts)


def expand_(out: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor) -> Tensor:
    """`expand` in place."""
    passes = passes_of(rows, starts)
    slots = _even(passes, out, factors, 1)
    if slots is not None:
        own = [factors[slot] for slot in slots]
        return routed_even.expand_(out, S[0, :, : max(B.shape[1] for B in own)], own)
    total = out if len(passes) == 1 else out.to(_wide(out))
    for S_lines, taken in zip(S, passes, strict=True):
        for segment, part in zip(taken.segments, taken.take(total), strict=True):
            assert part is not None
            B = factors[segment.slot]
            low_rank.expand_(part, S_lines[segment.begin : segment.end, : B.shape[1]], B)
            taken.give_back_(total, segment, part)
    return out if total is out else out.copy_(total)


def expand_backward(
    dout: Tensor, S: Tensor, factors: Sequence[Tensor], rows: Tensor, starts: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(dS, [dB_j])."""
    passes = passes_of(rows, starts)
    slots = _even(passes, dout, factors, 1)
    if slots is not None:
        own = [factors[slot] for slot in slots]
        r = max(B.shape[1] for B in own)
        narrow, found = routed_even.expand_backward(dout, S[0, :, :r], own)
        return _padded(narrow, S.shape[2]).unsqueeze(0), _of_all(factors, slots, found)
    dS = torch.zeros(S.shape, dtype=S.dtype, device=S.device)
    dBs: list[Tensor | None] = [None] * len(factors)
    for dS_lines, S_lines, taken in zip(dS, S, passes, strict=True):
        for segment, part in zip(taken.segments, taken.take(dout), strict=True):
            assert part is not None
            slot, lines = segment.slot, slice(segment.begin, segment.end)
            B = factors[slot]
            r = B.shape[1]
            dS_lines[lines, :r], dB = low_rank.output_pass(part, B, S_lines[lines, :r].contiguous(), 1.0)
            dBs[slot] = _sum(dBs[slot], dB)
    return dS, [B.new_zeros(B.shape) if dB is None else dB for B, dB in zip(factors, dBs, strict=True)]


def lora_(
    out: Tensor,
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """`expand_` of `shrink`, for inference."""
    in_factors_dtype = torch.promote_types(out.dtype, As[0].dtype) == As[0].dtype
    is_plain = mask is None and weights is None and len(rows) == 1 and in_factors_dtype
    if is_plain and add_to_few_(out, x, As, Bs, scales, passes_of(rows, starts)[0]):
        return out
    return expand_(out, shrink(x, As, scales, rows, starts, weights, mask), Bs, rows, starts)


# LoRA on embeddings: S = weight · scale · (columns `ids` of A)ᵀ.


def gather(
    ids: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """S: (P, M, R) in the factors' dtype; ids (M,), factors (r_j, V)."""
    S = _new_S(factors, rows)
    for S_lines, taken in zip(S, passes_of(rows, starts), strict=True):
        for segment, part in zip(taken.segments, taken.take(ids), strict=True):
            assert part is not None
            A = factors[segment.slot]
            S_lines[segment.begin : segment.end, : len(A)] = F.embedding(part, A.t()) * scales[segment.slot]
    return S if weights is None else S.mul_(weights.unsqueeze(2))


def gather_backward(
    dS: Tensor,
    ids: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
) -> list[Tensor]:
    """[dA_j]."""
    if weights is not None:
        dS = (dS * weights.unsqueeze(2)).to(dS.dtype)
    dAs = [A.new_zeros(A.shape) for A in factors]
    for dS_lines, taken in zip(dS, passes_of(rows, starts), strict=True):
        for segment, part in zip(taken.segments, taken.take(ids), strict=True):
            assert part is not None
            dA = dAs[segment.slot]
            dA.index_add_(1, part, dS_lines[segment.begin : segment.end, : len(dA)].t(), alpha=scales[segment.slot])
    return dAs


# A scale for each column and slot: out = (y - bias) · f + bias, f = 1 - Σ weight + Σ weight · vector.


def scale(
    y: Tensor,
    vectors: Sequence[Tensor | None],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """(M, C) in y's dtype, rounded once; rows without an entry whose slot has a vector keep their bits."""
    factor, touched = _factors(y, vectors, rows, starts, weights)
    scaled = _scaled(y.index_select(0, touched), factor, bias)
    return y.clone(memory_format=torch.contiguous_format).index_copy_(0, touched, scaled.to(y.dtype))


def scale_backward(
    dout: Tensor,
    y: Tensor,
    vectors: Sequence[Tensor | None],
    rows: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """(dy, [dl_j]), of a slot without a vector an empty tensor."""
    factor, touched = _factors(y, vectors, rows, starts, weights)
    dy = dout.clone(memory_format=torch.contiguous_format)
    dy.index_copy_(0, touched, (dout.index_select(0, touched) * factor).to(dout.dtype))
    grads = [y.new_empty(0) if vector is None else vector.new_zeros(vector.shape) for vector in vectors]
    for p, taken in enumerate(passes_of(rows, starts)):
        line_weights = None if weights is None else taken.split(weights[p, : taken.entries])
        for i, (segment, dpart, part) in enumerate(zip(taken.segments, taken.take(dout), taken.take(y), strict=True)):
            vector = vectors[segment.slot]
            if vector is None or dpart is None or part is None:
                continue
            wide = _wide(y, vector)
            product = dpart.to(wide) * (part.to(wide) if bias is None else part.to(wide) - bias)
            if line_weights is not None:
                product *= line_weights[i].unsqueeze(1)
            grads[segment.slot] += product.sum(0).to(vector.dtype)
    return dy, grads


def _factors(
    y: Tensor, vectors: Sequence[Tensor | None], rows: Tensor, starts: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(f, the rows that it is for): (m, C) in fp32 at least, and (m,)."""
    wide = _wide(y, *(vector for vector in vectors if vector is not None))
    parts, touched = [], []
    for p, taken in enumerate(passes_of(rows, starts)):
        for segment in taken.segments:
            vector = vectors[segment.slot]
            if vector is None:
                continue
            lines = slice(segment.begin, segment.end)
            touched.append(taken.index[lines])
            vector = vector.to(wide).expand(segment.end - segment.begin, -1)
            parts.append(vector if weights is None else 1 + weights[p, lines].unsqueeze(1) * (vector - 1))
    if not touched:
        return y.new_empty((0, y.shape[1]), dtype=wide), torch.empty(0, dtype=torch.int64, device=y.device)
    index, factor = torch.cat(touched), torch.cat(parts)
    if len(rows) == 1:
        return factor, index
    index, entry = torch.unique(index, return_inverse=True)
    total = torch.ones((len(index), y.shape[1]), dtype=wide, device=y.device)
    return total.index_add_(0, entry, factor - 1), index


def _scaled(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    y = y.to(factor.dtype)
    return y * factor if bias is None else (y - bias) * factor + bias


def _new_S(factors: Sequence[Tensor], rows: Tensor) -> Tensor:
    R = max(len(A) for A in factors)
    return torch.zeros((*rows.shape, R), dtype=factors[0].dtype, device=factors[0].device)


def _padded(S: Tensor, R: int) -> Tensor:
    return S if S.shape[1] == R else F.pad(S, (0, R - S.shape[1]))


def _of_all(factors: Sequence[Tensor], slots: Sequence[int], found: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of some slots' factors, and zeros for the others."""
    grads: dict[int, Tensor] = dict(zip(slots, found, strict=True))
    return [grads[slot] if slot in grads else factor.new_zeros(factor.shape) for slot, factor in enumerate(factors)]


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
