"""Batches of mixed adapters: which adapter each row, or each token, takes.

A `Routing` has the names; for every layer it gives the numbers that the routed ops work with (fastpeft_kernels.routed).
How it gets to the layers is in fastpeft.routing_scope; `model(**batch, adapter_names=[...])` and `generate` see to it.
"""

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

BASE = "__base__"  # this row takes no adapter

MOST_TABLES = 256  # that a routing keeps

RowAdapters = str | None | Mapping[str, float]


class Entry(NamedTuple):
    """One adapter of a row."""

    name: str
    weight: float


class RoutingTables(NamedTuple):
    """What the routed ops take: see fastpeft_kernels.reference_routed."""

    rows: Tensor
    starts: Tensor
    weights: Tensor | None


@dataclass
class _Kept:
    """Tables for one shape of batch and one set of slots."""

    tables: RoutingTables
    bounds: list[list[int]]  # `starts`, for the host
    ready: Any = None  # the CUDA event after which they are there
    streams: set[int] = field(default_factory=set)  # those that waited for it


@dataclass
class _Contents:
    """What a `refill` changes, shared by a routing and its expansions."""

    entries: list[tuple[Entry, ...]]
    passes: int  # the most adapters of a row that there is room for
    weighted: bool
    fills: int = 0
    kept: dict[Any, _Kept] = field(default_factory=dict)
    forgot: bool = False  # tables that somebody may still hold
    is_closed: bool = False  # nothing more is kept now


class Routing:
    """Which adapter each row of a batch takes. Make one with `by_row` or `by_token`.

    Attributes:
        names: the adapters that occur, or may later, by first appearance.
    """

    def __init__(
        self,
        adapters: Sequence[RowAdapters],
        lengths: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        entries = _entries_of_rows(adapters)
        self.names = tuple(dict.fromkeys([*names, *(entry.name for row in entries for entry in row)]))
        self._lengths = None if lengths is None else list(lengths)
        self._kept_tokens = None if kept is None else torch.tensor(kept, device="cpu", dtype=torch.int64)
        self._expansions = frozenset({1})
        self._contents = _Contents(entries, _passes(entries), _weighted(entries))

    @classmethod
    def by_row(cls, adapters: Sequence[RowAdapters], names: Sequence[str] = ()) -> "Routing":
        """Row i of the batch, with all its tokens, takes adapters[i].

        Args:
            adapters: for each row the name of an adapter, "__base__" or None for none, or several with their weights:
                {"a": 0.7, "b": 0.3} adds 0.7 times what a adds, and 0.3 times what b adds.
            names: adapters that a `refill` may bring in. In distributed training, all that are trained: their gradients
                are then made, as zeros, also where a process has no row of theirs.

        Raises:
            TypeError, ValueError: that is not what was given.
        """
        return cls(adapters, names=names)

    @classmethod
    def by_token(
        cls, adapters: Sequence[RowAdapters], lengths: Sequence[int], kept: Sequence[int] | Tensor | None = None
    ) -> "Routing":
        """Packed sequences: the first lengths[0] tokens take adapters[0], the next lengths[1] take adapters[1], ...

        Args:
            adapters: as in `by_row`, one a sequence.
            lengths: tokens of each sequence; they add up to the tokens of the batch, padding included.
            kept: numbers of the tokens that reach layers behind a selection (a head that computes some logits only).
                All of them can only be kept in their order.

        Raises:
            TypeError, ValueError: that is not what was given.
        """
        whole = [length for length in lengths if isinstance(length, Integral) and length >= 0]
        if len(adapters) != len(lengths) or len(whole) != len(lengths):
            raise ValueError(
                f"by_token needs one whole length of 0 or more for each of the {len(adapters)} sequences, got "
                f"{shortened(lengths)}"
            )
        total = sum(lengths)
        numbers = None if kept is None else [int(token) for token in kept]
        if numbers is not None:
            unordered = len(numbers) == total and numbers != list(range(total))
            if unordered or not all(0 <= token < total for token in numbers):
                raise ValueError(
                    f"kept must name some of the {total} tokens from 0 on, or all in their order; got "
                    f"{shortened(numbers)}"
                )
        return cls(adapters, [int(length) for length in lengths], numbers)

    def expanded(self, *factors: int) -> "Routing":
        """The same for a model that may see every row `factor` times in a row: beams, several returned sequences."""
        other = Routing.__new__(Routing)
        other.__dict__.update(self.__dict__, _expansions=self._expansions.union(factors))
        return other

    def refill(self, adapters: Sequence[RowAdapters]) -> None:
        """Let the rows take other adapters, in the tensors that layers were given already.

        For what keeps these tensors: a CUDA graph replays, and a compiled model runs on, with the new routing. After
        the backward of a forward, not before it.

        Args:
            adapters: one for each row or sequence, as before; names out of `names`, not more of them a row than any row
                had at first, and with weights only if some had.

        Raises:
            TypeError, ValueError: that is not what was given; nothing has changed then.
            RuntimeError: it was used for so many shapes that some tables were forgotten.
        """
        entries, contents = _entries_of_rows(adapters), self._contents
        names = {entry.name for row in entries for entry in row}
        if len(entries) != len(contents.entries) or not names.issubset(self.names):
            raise ValueError(
                f"this routing is refilled with {len(contents.entries)} rows of {shortened(self.names)}; got "
                f"{len(entries)} of {shortened(sorted(names))}"
            )
        if _passes(entries) > contents.passes or (_weighted(entries) and not contents.weighted):
            weights = "with" if contents.weighted else "without"
            raise ValueError(
                f"this routing has room for {contents.passes} adapters a row, {weights} weights: make a new one"
            )
        if contents.forgot:
            raise RuntimeError(f"this routing was used for more than {MOST_TABLES} shapes of batches: make a new one")
        contents.entries, contents.fills = entries, contents.fills + 1
        for (rows, M, names_here, device), kept in contents.kept.items():
            fresh = self._make(rows, M, names_here, device)
            kept.bounds = fresh.bounds
            for old, new in zip(kept.tables, fresh.tables, strict=True):
                if old is not None and new is not None:
                    old.copy_(new, non_blocking=True)

    @property
    def entries(self) -> list[tuple[Entry, ...]]:
        """The adapters of each row, or of each sequence."""
        return self._contents.entries

    @property
    def fills(self) -> int:
        """How often it was refilled."""
        return self._contents.fills

    @property
    def is_by_row(self) -> bool:
        return self._lengths is None

    def __repr__(self) -> str:
        by = "row" if self.is_by_row else "token"
        return f"Routing.by_{by}({len(self.entries)} rows, adapters {shortened(list(self.names))})"

    # For layers.

    @contextmanager
    def closed(self, x: Any) -> Iterator[None]:
        """Let no layer keep tables in this context, which is a checkpoint's: a compiler refuses to trace that.

        Args:
            x: what the checkpoint is given; the tables for its rows are made before.
        """
        fits = isinstance(x, Tensor) and x.dim() > 1 and self._obstacle(x.shape[0], math.prod(x.shape[:-1])) is None
        if fits:
            self.tables(x.shape[:-1], self.names, x.device)
        self._contents.is_closed = True
        try:
            yield
        finally:
            self._contents.is_closed = False

    def tables(self, shape: Sequence[int], names: tuple[str, ...], device: torch.device) -> RoutingTables:
        """Numbers for the routed ops, slot i being names[i]; rows of other adapters have no entry.

        Args:
            shape: of the batch, the features left out: (rows, ...) or, by token, any of as many tokens.

        Raises:
            ValueError: the batch does not have the rows that this routing is for.
        """
        return self._find(shape, names, device).tables

    def bounds(self, shape: Sequence[int], names: tuple[str, ...], device: torch.device) -> list[list[int]]:
        """The `starts` of `tables`, pass by pass, without a wait for the device."""
        kept = self._find(shape, names, device)
        if not kept.bounds:  # they were made while a model was compiled
            kept.bounds = kept.tables.starts.tolist()
        return kept.bounds

    def _find(self, shape: Sequence[int], names: tuple[str, ...], device: torch.device) -> _Kept:
        rows, M, all_kept = shape[0] if len(shape) else 1, math.prod(shape), self._contents.kept
        if (obstacle := self._obstacle(rows, M)) is not None:
            raise ValueError(obstacle)
        key = (rows, M, names, device)
        kept = all_kept.get(key)
        if kept is None or _is_of_no_use(kept):
            if len(all_kept) >= MOST_TABLES:  # a routing that is used for batches of ever new lengths
                all_kept.clear()
                self._contents.forgot = True
            with torch.inference_mode(False), torch.no_grad():  # they may be kept for a forward with gradients
                kept = self._make(rows, M, names, device)
            # a fake one must not outlive its mode, nor one of a checkpoint's graph the checkpoint
            if type(kept.tables.rows) is Tensor and not self._contents.is_closed:
                all_kept[key] = kept
        if kept.ready is not None:
            _wait_for(kept)
        return kept

    def _make(self, rows: int, M: int, names: tuple[str, ...], device: torch.device) -> _Kept:
        contents = self._contents
        slots, none = {name: slot for slot, name in enumerate(names)}, len(names)
        entries = [[entry for entry in row if entry.name in slots and entry.weight] for row in contents.entries]
        passes = range(contents.passes)
        slot_lists = [[slots[own[p].name] if p < len(own) else none for own in entries] for p in passes]
        weight_lists = [[own[p].weight if p < len(own) else 1.0 for own in entries] for p in passes]
        slot = torch.tensor(slot_lists, dtype=torch.int32, device="cpu")
        weight = torch.tensor(weight_lists, dtype=torch.float32, device="cpu")
        units = self._unit_of_each_row(M)
        ordered, order = slot[:, units].sort(dim=1, stable=True)
        bounds = torch.arange(none + 1, dtype=torch.int32, device="cpu").expand(contents.passes, -1).contiguous()
        starts = torch.searchsorted(ordered, bounds, out_int32=True)
        weights = weight[:, units].gather(1, order) if contents.weighted else None
        tables = RoutingTables(upload(order.int(), device), upload(starts, device), upload(weights, device))
        host_bounds = [] if torch.compiler.is_compiling() else starts.tolist()
        if device.type != "cuda" or torch.compiler.is_compiling():
            return _Kept(tables, host_bounds)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "this CUDA graph would be captured with a routing that was never used: run the step once, as a warm-up"
            )
        return _Kept(tables, host_bounds, torch.cuda.current_stream(device).record_event())

    def _obstacle(self, rows: int, M: int) -> str | None:
        """Why this is not the routing of a batch, None if it is."""
        if self._lengths is None:
            if any(rows == len(self.entries) * factor for factor in self._expansions):
                return None
            return (
                f"adapter_names needs one name per row of the batch: expected {rows} names, got {len(self.entries)}. "
                f"Rows that should take no adapter are named {BASE!r}."
            )
        if sum(self._lengths) == M or (self._kept_tokens is not None and len(self._kept_tokens) == M):
            return None
        kept = "" if self._kept_tokens is None else f" or the {len(self._kept_tokens)} kept ones"
        return f"this routing is for batches of {sum(self._lengths)} tokens{kept}, and a layer was called on {M}"

    def _unit_of_each_row(self, M: int) -> Tensor:
        """For each flattened row of a batch the place of its adapters in `entries`: (M,)."""
        units = torch.arange(len(self.entries), device="cpu")
        if self._lengths is None:
            return units.repeat_interleave(M // max(len(units), 1))
        tokens = units.repeat_interleave(torch.tensor(self._lengths, dtype=torch.int64, device="cpu"))
        return tokens if self._kept_tokens is None or len(tokens) == M else tokens[self._kept_tokens]


def as_routing(adapter_names: Any) -> Routing:
    """What a model was given as `adapter_names`: a list with a name per row, or a Routing."""
    if isinstance(adapter_names, Routing):
        return adapter_names
    unordered = isinstance(adapter_names, str | Mapping | set | frozenset)
    if unordered or not isinstance(adapter_names, Collection):
        raise TypeError(f"adapter_names needs one name per row of the batch, got {shortened(adapter_names)}")
    rows = tuple(adapter_names)
    if not torch.compiler.is_compiling() and all(row is None or type(row) is str for row in rows):
        return _routing_of_names(rows)
    return Routing.by_row(rows)


@functools.lru_cache(32)
def _routing_of_names(names: tuple[str | None, ...]) -> Routing:
    """Asked for step after step with the same names, whose tables are then there. Nobody refills it."""
    return Routing.by_row(names)


def check_names(routing: Routing, known: Collection[str]) -> None:
    """Raises ValueError for a name that no adapter of the model has."""
    unknown = [name for name in routing.names if name not in known]
    if unknown:
        raise ValueError(
            f"adapter_names: no adapter {shortened(unknown)}; there are {shortened(sorted(known))}, and {BASE!r} for "
            "none"
        )


def shortened(value: Any, most: int = 200) -> str:
    """repr(value) for an error message, which must not be flooded by what a request brings."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def upload(t: Any, device: torch.device) -> Any:
    """A CPU tensor, or None, on the device: without a wait of the host."""
    if t is None or device.type == "cpu":
        return t
    return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)


def _is_of_no_use(kept: _Kept) -> bool:
    """Made by a compiled forward in inference mode, and wanted for one with gradients."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and kept.tables.rows.is_inference()


def _wait_for(kept: _Kept) -> None:
    """Let the current stream wait until the tables are there, once. Before a capture everything is."""
    stream = torch.cuda.current_stream(kept.tables.rows.device)
    if torch.cuda.is_current_stream_capturing() or stream.cuda_stream in kept.streams:
        return
    stream.wait_event(kept.ready)
    for t in kept.tables:
        if t is not None:
            t.record_stream(stream)
    kept.streams.add(stream.cuda_stream)


def _entries_of_rows(adapters: Sequence[RowAdapters]) -> list[tuple[Entry, ...]]:
    if isinstance(adapters, str | Mapping):
        raise TypeError(f"adapter_names needs one name per row of the batch, got {shortened(adapters)}")
    return [_entries_of(row) for row in adapters]


def _entries_of(row: RowAdapters) -> tuple[Entry, ...]:
    if row is None or row == BASE:
        return ()
    if isinstance(row, str):
        return (Entry(row, 1.0),)
    if not isinstance(row, Mapping):
        raise TypeError(f"a row of adapter_names is a name or a dict of names and weights, got {shortened(row)}")
    if not all(isinstance(name, str) and _is_weight(weight) for name, weight in row.items()):
        raise ValueError(f"the adapters of a row need names and finite weights, got {shortened(row)}")
    return tuple(Entry(name, float(weight)) for name, weight in row.items() if name != BASE)


def _is_weight(weight: Any) -> bool:
    """A number that is finite in fp32."""
    if not isinstance(weight, Real) or isinstance(weight, bool):
        return False
    try:
        return abs(float(weight)) <= torch.finfo(torch.float32).max
    except OverflowError:
        return False


def _passes(entries: Sequence[Sequence[Entry]]) -> int:
    """The most adapters that a row has, at least one."""
    return max([1, *map(len, entries)])


def _weighted(entries: Sequence[Sequence[Entry]]) -> bool:
    return any(entry.weight != 1.0 for row in entries for entry in row)
