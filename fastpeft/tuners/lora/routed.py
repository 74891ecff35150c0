"""A LoRA layer in a batch of mixed adapters: every row takes those that the routing in force names.

The base layer runs as it is. What the routed ops may compute (plain factors that nobody watches) takes them, whatever
the number of adapters; other adapters are added one after the other, through their own modules, to the rows they have.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.routing import Routing, RoutingTables, upload
from fastpeft.tuners.bases import EmbeddingBase
from fastpeft.tuners.eligibility import base_parts, is_ordinary
from fastpeft.tuners.lora.fused import PlainFactors, adapter_parts, plain_factors
from fastpeft.tuners.lora.routed_sharing import group_for_kernels
from fastpeft.utils.saved_tensors import is_dispatch_watched
from fastpeft_kernels import expand_routed, gather_routed, lora_routed, scale_routed
from fastpeft_kernels.dropout import draw_mask, dropout_scale


class _Adapter(NamedTuple):
    """An adapter that the routed ops may read."""

    name: str
    A: Tensor
    B: Tensor
    dropout_p: float


class _Adapters(NamedTuple):
    """Several of them, in one dtype."""

    names: Sequence[str]
    As: Sequence[Tensor]
    Bs: Sequence[Tensor]
    ps: Sequence[float]
    are_sums: bool = False  # all of them, for sure

    @classmethod
    def of(cls, adapters: Sequence[_Adapter]) -> "_Adapters":
        names, As, Bs, ps = zip(*adapters, strict=True)
        return cls(names, As, Bs, ps)


def routed_forward(layer: Any, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output, in the base layer's output dtype; rows without an adapter have the base's own bits.

    Raises:
        ValueError: the batch has other rows than the routing, or an adapter is merged.
    """
    if layer.merged:
        raise ValueError(f"adapter_names cannot be used while {layer.merged_adapters} are merged; unmerge them first")
    plain_call = not args and not kwargs and not torch.compiler.is_compiling()
    group = group_for_kernels(layer, x) if plain_call else None
    if group is not None and (out := group.take(routing, x)) is not None:
        return out
    if plain_call and (out := layer.repeated_batch.forward(layer, routing, x, group)) is not None:
        return out  # type: ignore[no-any-return]
    base = layer.base_layer(x, *args, **kwargs)
    shape = x.shape if isinstance(layer.base, EmbeddingBase) else x.shape[:-1]
    names = tuple([name for name in routing.names if name in layer.r])
    tables = routing.tables(shape, names, x.device)  # the rows must fit, even where this layer has nothing to add
    if not names:
        return base  # type: ignore[no-any-return]
    if (plain := _plain_adapters(layer, names, x, base)) is not None:
        is_fresh = _is_fresh(layer)
        if is_fresh and plain_call and not any(plain.ps):
            together = None if group is None else group.compute(routing, names, tables, x, base, plain)
            if together is not None:
                return together
            if (found := layer.repeated_batch.remember(layer, routing, names, tables, x)) is not None:
                return found.add_to(base, routing, x)  # type: ignore[no-any-return]
        return _add_together(layer, _Adapters(names, *plain, are_sums=True), tables, base, x, is_fresh)
    readable = _adapters_for_ops(layer, names, x, base)
    dtypes = dict.fromkeys(adapter.A.dtype for adapter in readable)
    if len(readable) == len(names) and len(dtypes) == 1:
        return _add_together(layer, _Adapters.of(readable), tables, base, x, _is_fresh(layer))
    out = base
    sums = [adapter for adapter in readable if layer.variants[adapter.name].is_a_sum]  # others scale what is there
    for dtype in dtypes:
        if of_dtype := [adapter for adapter in sums if adapter.A.dtype == dtype]:
            tables = routing.tables(shape, tuple(adapter.name for adapter in of_dtype), x.device)
            out = _add_together(layer, _Adapters.of(of_dtype), tables, out, x)
    for name in [name for name in names if all(adapter.name != name for adapter in sums)]:
        lines = _lines_of(routing, shape, name, x.device)
        if len(lines.rows) or torch.is_grad_enabled():  # distributed training wants a gradient of everybody
            out = _add_alone(layer, name, lines, base, out, x)
    return out  # type: ignore[no-any-return]


def _is_fresh(layer: Any) -> bool:
    """Whether nobody but us holds the output that the base layer has just returned."""
    return not torch.is_grad_enabled() and not isinstance(base_parts(layer), str) and not is_dispatch_watched()


def _plain_adapters(layer: Any, names: Sequence[str], x: Tensor, base: Tensor) -> PlainFactors | None:
    """Those of all adapters, where all are the usual kind on a linear layer: looked at together."""
    if torch.compiler.is_compiling() or not (is_ordinary(x) and is_ordinary(base)):
        return None
    plain = plain_factors(layer, names)
    return None if plain is None or plain.As[0].dtype not in (x.dtype, torch.float32) else plain


def _adapters_for_ops(layer: Any, names: Sequence[str], x: Tensor, base: Tensor) -> list[_Adapter]:
    if not (is_ordinary(x) and is_ordinary(base)):
        return []
    found = _embedding_adapter if isinstance(layer.base, EmbeddingBase) else _linear_adapter
    adapters = [found(layer, name, x.dtype) for name in names]
    return [adapter for adapter in adapters if adapter is not None]


def _linear_adapter(layer: Any, name: str, x_dtype: torch.dtype) -> _Adapter | None:
    parts = adapter_parts(layer, name)
    if isinstance(parts, str):
        return None
    A, B, p = parts
    variant = layer.variants[name]
    if not variant.is_a_sum:
        base = base_parts(layer)
        if p > 0 or variant.obstacle(layer, name) or isinstance(base, str):
            return None  # with dropout, DoRA's base product is one of its own
        if base[1] is not None and base[1].requires_grad and torch.is_grad_enabled():
            return None  # scale_routed has no gradient for the bias
    return _Adapter(name, A, B, p) if A.dtype in (x_dtype, torch.float32) else None


def _embedding_adapter(layer: Any, name: str, _: torch.dtype) -> _Adapter | None:
    module, (A, B) = layer.get_base_layer(), layer.base.factors(layer, name)
    special = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    padded = module.padding_idx is not None and torch.is_grad_enabled()  # that row must get no gradient
    plain = all(type(factor) is nn.Parameter and not factor.is_meta for factor in (A, B))
    return _Adapter(name, A, B, 0.0) if plain and A.dtype == B.dtype and not special and not padded else None


def _add_together(
    layer: Any,
    adapters: _Adapters,
    tables: RoutingTables,
    out: Tensor,
    x: Tensor,
    overwrite: bool = False,
) -> Tensor:
    """out with these adapters, by the routed ops; `overwrite`: they may change out itself."""
    names, As, Bs, ps, _ = adapters
    flat = out.reshape(-1, out.shape[-1])
    scales = [layer.scaling[name] for name in names]
    if isinstance(layer.base, EmbeddingBase):
        rows, starts, weights = tables
        S = gather_routed(x.reshape(-1), As, scales, rows, starts, weights)
        factor = layer.base.embed_scale(layer.get_base_layer())
        return expand_routed(flat, S if factor is None else S * factor.to(S.dtype), Bs, rows, starts).view(out.shape)
    vectors = [] if adapters.are_sums else _row_scales(layer, names)
    bias = layer.get_base_layer().bias if vectors else None
    bias = None if bias is None else bias.detach()
    if vectors and tables.weights is not None:  # each adds (g - 1) · base + g · s B A x, times its weight
        flat = scale_routed(flat, vectors, *tables, bias)
        Bs = [B if g is None else (B * g.unsqueeze(1)).to(B.dtype) for B, g in zip(Bs, vectors, strict=True)]
    x = x.reshape(-1, x.shape[-1])
    if any(ps):
        flat = _add_with_dropout(flat, x, As, Bs, scales, ps, tables)
    else:
        flat = lora_routed(flat, x, As, Bs, scales, *tables, overwrite=overwrite)
    if vectors and tables.weights is None:  # g · (base + s B A x)
        flat = scale_routed(flat, vectors, *tables, bias)
    return flat.view(out.shape)


def _row_scales(layer: Any, names: Sequence[str]) -> list[Tensor | None]:
    """g = magnitude / norm of each DoRA adapter; an empty list where there is none."""
    if all(layer.variants[name].is_a_sum for name in names):
        return []
    return [None if layer.variants[name].is_a_sum else layer.variants[name].row_scale(layer, name) for name in names]


def _add_with_dropout(
    out: Tensor,
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    ps: Sequence[float],
    tables: RoutingTables,
) -> Tensor:
    """A row's adapters drop independently: those of another pass draw another mask."""
    rows, starts, weights = tables
    dtype = out.dtype
    if len(rows) > 1:  # one rounding at the end, whatever the number of passes
        out = out.to(torch.promote_types(dtype, torch.float32))
    scales = [scale * dropout_scale(p) for scale, p in zip(scales, ps, strict=True)]
    for p in range(len(rows)):
        line = slice(p, p + 1)
        mask = _mask(x, ps, rows[p], starts[p])
        line_weights = None if weights is None else weights[line]
        out = lora_routed(out, x, As, Bs, scales, rows[line], starts[line], line_weights, mask)
    return out.to(dtype)


def _mask(x: Tensor, ps: Sequence[float], rows: Tensor, starts: Tensor) -> Tensor:
    """One draw over all rows for each probability that occurs, whatever the number of adapters."""
    different = list(dict.fromkeys(ps))
    if len(different) == 1:
        return draw_mask(x, different[0])
    lengths = torch.cat([starts.diff(), (len(rows) - starts[-1]).reshape(1)]).long()
    which = upload(torch.tensor([*(different.index(p) for p in ps), 0], device="cpu"), x.device)
    of_line = torch.repeat_interleave(which, lengths, output_size=len(rows))
    of_row = torch.empty_like(of_line).index_copy_(0, rows.long(), of_line).unsqueeze(1)
    mask = None
    for i, p in enumerate(different):
        drawn = draw_mask(x, p) if p > 0 else x.new_full((1, 1), -1, dtype=torch.int32)
        mask = drawn.expand(len(x), -(-x.shape[1] // 32)) if mask is None else torch.where(of_row == i, drawn, mask)
    assert mask is not None
    return mask.contiguous()


class _Lines(NamedTuple):
    """The rows that one adapter is for, and its weight in each."""

    rows: Tensor
    weights: Tensor | None
    taken: Tensor | None  # a compiler knows no number but that of all rows: which of them it is for


def _lines_of(routing: Routing, shape: Sequence[int], name: str, device: torch.device) -> _Lines:
    rows, starts, weights = routing.tables(shape, (name,), device)  # one adapter is in the first pass
    line_weights = None if weights is None else weights[0]
    if torch.compiler.is_compiling():
        taken = torch.arange(rows.shape[1], device=device) < starts[0, 1]
        return _Lines(rows[0].long(), line_weights, taken)
    count = routing.bounds(shape, (name,), device)[0][1]
    return _Lines(rows[0, :count].long(), None if line_weights is None else line_weights[:count], None)


def _add_alone(layer: Any, name: str, lines: _Lines, base: Tensor, out: Tensor, x: Tensor) -> Tensor:
    """out with one adapter, through its own modules, on the rows that take it."""
    index, weights, taken = lines
    flat, flat_base = out.reshape(-1, out.shape[-1]), base.reshape(-1, base.shape[-1])
    x = x.reshape(-1) if isinstance(layer.base, EmbeddingBase) else x.reshape(-1, x.shape[-1])
    rows, base_rows = flat[index], flat_base[index]
    if layer.variants[name].is_a_sum and weights is None:
        added = layer._add(rows, x[index], [name])
    else:  # what it adds to the base alone, as one summand of the row
        wide = torch.promote_types(base_rows.dtype, torch.float32)
        delta = layer._add(base_rows.to(wide), x[index], [name]) - base_rows
        added = (rows + (delta if weights is None else delta * weights.unsqueeze(1))).to(out.dtype)
    if taken is not None:
        added = torch.where(taken.unsqueeze(1), added, rows)
    return flat.index_copy(0, index, added).view(out.shape)
