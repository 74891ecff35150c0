"""Batches of mixed adapters: which adapter each row, or each token, takes.

A `Routing` has the names; for every layer it gives the numbers that the routed ops work with (fastpeft_kernels.routed).
While `routed` lasts, every tuner layer that this thread calls follows it. `model(**batch, adapter_names=[...])` and
`generate` enter it by themselves.
"""

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastpeft.utils.saved_tensors import hooks_around, in_backward, is_checkpoint

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
        self.entries = _entries_of_rows(adapters)
        self.names = tuple(dict.fromkeys([*names, *(entry.name for row in self.entries for entry in row)]))
        self._lengths = None if lengths is None else list(lengths)
        self._kept = None if kept is None else torch.as_tensor(kept, device="cpu", dtype=torch.int64)
        self._expansions = frozenset({1})
        self._tables: dict[Any, RoutingTables] = {}

    @classmethod
    def by_row(cls, adapters: Sequence[RowAdapters], names: Sequence[str] = ()) -> "Routing":
        """Row i of the batch, with all its tokens, takes adapters[i].

        Args:
            adapters: for each row the name of an adapter, "__base__" or None for none, or several with their weights:
                {"a": 0.7, "b": 0.3} adds 0.7 times what a adds, and 0.3 times what b adds.
            names: adapters that a `refill` may bring in.

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

        Raises:
            TypeError, ValueError: that is not what was given.
        """
        if len(adapters) != len(lengths) or any(length < 0 for length in lengths):
            raise ValueError(
                f"by_token needs one length of 0 or more for each of the {len(adapters)} sequences, got {lengths}"
            )
        return cls(adapters, lengths, kept if kept is None else torch.as_tensor(kept).tolist())

    def expanded(self, *factors: int) -> "Routing":
        """The same for a model that may see every row `factor` times in a row: beams, several returned sequences."""
        other = Routing.__new__(Routing)
        other.__dict__.update(self.__dict__, _expansions=self._expansions.union(factors), _tables={})
        return other

    def refill(self, adapters: Sequence[RowAdapters]) -> None:
        """Let the rows take other adapters, in the tensors that layers were given already.

        For what keeps these tensors: a CUDA graph replays, and a compiled model runs on, with the new routing.

        Args:
            adapters: one for each row or sequence, as before; names out of `names`, not more of them a row than any row
                had at first, and with weights only if some had.

        Raises:
            TypeError, ValueError: that is not what was given; nothing has changed then.
        """
        entries = _entries_of_rows(adapters)
        names = {entry.name for row in entries for entry in row}
        most, weighted = _passes(self.entries), _weighted(self.entries)
        if len(entries) != len(self.entries) or not names.issubset(self.names):
            raise ValueError(
                f"this routing is refilled with {len(self.entries)} rows of {shortened(self.names)}; got "
                f"{len(entries)} of {shortened(sorted(names))}"
            )
        if _passes(entries) > most or (_weighted(entries) and not weighted):
            raise ValueError(
                f"this routing has room for {most} adapters a row, {'with' if weighted else 'without'} weights: make "
                "a new one"
            )
        for (rows, M, names_here, device), tables in self._tables.items():
            shape = (rows, M // max(rows, 1))
            fresh = self._make_tables(entries, shape, names_here, device, len(tables.rows), tables.weights is not None)
            for old, new in zip(tables, fresh, strict=True):
                if old is not None and new is not None:
                    old.copy_(new)
        self.entries = entries

    @property
    def is_by_row(self) -> bool:
        return self._lengths is None

    def __repr__(self) -> str:
        by = "row" if self.is_by_row else "token"
        return f"Routing.by_{by}({len(self.entries)} rows, adapters {shortened(list(self.names))})"

    # For layers.

    def tables(self, shape: Sequence[int], names: tuple[str, ...], device: torch.device) -> RoutingTables:
        """Numbers for the routed ops, slot i being names[i]; rows of other adapters have no entry.

        Args:
            shape: of the batch, the features left out: (rows, ...) or, by token, any of as many tokens.

        Raises:
            ValueError: the batch does not have the rows that this routing is for.
        """
        key = (shape[0], math.prod(shape), names, device)
        found = self._tables.get(key)
        if found is None:
            if len(self._tables) >= MOST_TABLES:  # a routing that is used for batches of ever new lengths
                self._tables.clear()
            with torch.inference_mode(False), torch.no_grad():  # they may be kept for a forward with gradients
                weighted = _weighted(self.entries)
                found = self._make_tables(self.entries, shape, names, device, _passes(self.entries), weighted)
                self._tables[key] = found
        return found

    def _make_tables(
        self,
        entries: Sequence[Sequence[Entry]],
        shape: Sequence[int],
        names: tuple[str, ...],
        device: torch.device,
        passes: int,
        weighted: bool,
    ) -> RoutingTables:
        slots, none = {name: slot for slot, name in enumerate(names)}, len(names)
        entries = [[entry for entry in row if entry.name in slots] for row in entries]
        slot = torch.full((passes, len(entries)), none, dtype=torch.int32, device="cpu")
        weight = torch.ones((passes, len(entries)), dtype=torch.float32, device="cpu")
        for row, own in enumerate(entries):
            for p, entry in enumerate(own):
                slot[p, row], weight[p, row] = slots[entry.name], entry.weight
        units = self._unit_of_each_row(shape)
        slot = slot[:, units]
        ordered, order = slot.sort(dim=1, stable=True)
        bounds = torch.arange(none + 1, dtype=torch.int32, device="cpu").expand(passes, -1).contiguous()
        starts = torch.searchsorted(ordered, bounds, out_int32=True)
        weights = weight[:, units].gather(1, order) if weighted else None
        return RoutingTables(_upload(order.int(), device), _upload(starts, device), _upload(weights, device))

    def _unit_of_each_row(self, shape: Sequence[int]) -> Tensor:
        """For each flattened row of a batch the place of its adapters in `entries`: (M,)."""
        units, M = len(self.entries), math.prod(shape)
        if self._lengths is None:
            if not any(shape[0] == units * factor for factor in self._expansions):
                raise ValueError(
                    f"adapter_names needs one name per row of the batch: expected {shape[0]} names, got {units}. "
                    f"Rows that should take no adapter are named {BASE!r}."
                )
            return torch.arange(units, device="cpu").repeat_interleave(M // max(units, 1))
        lengths = torch.tensor(self._lengths, dtype=torch.int64, device="cpu")
        tokens = torch.arange(units, device="cpu").repeat_interleave(lengths)
        if len(tokens) == M:
            return tokens
        if self._kept is not None and len(self._kept) == M:
            return tokens[self._kept]
        kept = "" if self._kept is None else f" or the {len(self._kept)} kept ones"
        raise ValueError(
            f"this routing is for batches of {sum(self._lengths)} tokens{kept}, and a layer was called on {M}"
        )


def as_routing(adapter_names: Any) -> Routing:
    """What a model was given as `adapter_names`: a list with a name per row, or a Routing."""
    if isinstance(adapter_names, Routing):
        return adapter_names
    if isinstance(adapter_names, str | Mapping) or not isinstance(adapter_names, Collection):
        raise TypeError(f"adapter_names needs one name per row of the batch, got {shortened(adapter_names)}")
    return Routing.by_row(list(adapter_names))


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


def _entries_of(row: RowAdapters) -> tuple[Entry, ...]:
    if row is None or row == BASE:
        return ()
    if isinstance(row, str):
        return (Entry(row, 1.0),)
    if not isinstance(row, Mapping):
        raise TypeError(f"a row of adapter_names is a name or a dict of names and weights, got {shortened(row)}")
    for name, weight in row.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        if not isinstance(name, str) or not number:
            raise ValueError(f"the adapters of a row need names and finite weights, got {shortened(row)}")
    return tuple(Entry(name, float(weight)) for name, weight in row.items() if weight != 0 and name != BASE)


def _entries_of_rows(adapters: Sequence[RowAdapters]) -> list[tuple[Entry, ...]]:
    if isinstance(adapters, str | Mapping):
        raise TypeError(f"adapter_names needs one name per row of the batch, got {shortened(adapters)}")
    return [_entries_of(row) for row in adapters]


def _passes(entries: Sequence[Sequence[Entry]]) -> int:
    """The most adapters that a row has, at least one."""
    return max([1, *map(len, entries)])


def _weighted(entries: Sequence[Sequence[Entry]]) -> bool:
    return any(entry.weight != 1.0 for row in entries for entry in row)


def _upload(t: Any, device: torch.device) -> Any:
    """Without a wait of the host."""
    if t is None or device.type == "cpu":
        return t
    return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)


# The routing in force.


class _Current(threading.local):
    routing: Routing | None = None
    recorded = False  # whether gradients were recorded where it was entered
    carried = False  # whether a checkpoint would bring it back


_current = _Current()
_any_unrecorded = False
_unrecorded: WeakSet[nn.Module] = WeakSet()  # layers that followed a routing where a checkpoint may have hidden it


@contextmanager
def routed(routing: Routing | None) -> Iterator[None]:
    """In this block of code every tuner layer that this thread calls follows `routing`; with None, none."""
    with _set(routing, torch.is_grad_enabled(), False):
        yield


@contextmanager
def _set(routing: Routing | None, recorded: bool, carried: bool) -> Iterator[None]:
    before = _current.routing, _current.recorded, _current.carried
    _current.routing, _current.recorded, _current.carried = routing, recorded, carried
    try:
        yield
    finally:
        _current.routing, _current.recorded, _current.carried = before


def routing_for(layer: nn.Module) -> Routing | None:
    """The routing that a layer, about to compute, has to follow.

    Raises:
        RuntimeError: an activation checkpoint that knows nothing of it will run, or runs, this forward once more.
    """
    global _any_unrecorded
    routing = _current.routing
    if routing is None and not _any_unrecorded:  # as for every token of a model that was never routed
        return None
    if torch.compiler.is_compiling():
        return routing
    if routing is None:
        if layer in _unrecorded and torch.is_grad_enabled() and in_backward():
            raise RuntimeError(_UNKNOWN_CHECKPOINT)
    elif not _current.carried and _current.recorded:
        if not torch.is_grad_enabled():
            _unrecorded.add(layer)  # a reentrant checkpoint, or a part of the model that is not trained
            _any_unrecorded = True
        elif is_checkpoint(hooks_around()):
            raise RuntimeError(_UNKNOWN_CHECKPOINT)
    return routing


_UNKNOWN_CHECKPOINT = (
    "adapter_names cannot reach the recomputation of an activation checkpoint that the model makes by itself: switch "
    "checkpointing on with the model's gradient_checkpointing_enable(), or off"
)


@contextmanager
def carried_by_checkpoints(model: nn.Module) -> Iterator[None]:
    """In this block, transformers' own checkpoints bring the routing back when they recompute."""
    wrapped = []
    try:
        if torch.is_grad_enabled():
            for module in model.modules():
                checkpoint = module.__dict__.get("_gradient_checkpointing_func")
                if checkpoint is not None and getattr(module, "gradient_checkpointing", False):
                    module._gradient_checkpointing_func = partial(_checkpoint_routed, checkpoint)  # type: ignore[assignment]
                    wrapped.append((module, checkpoint))
        yield
    finally:
        for module, checkpoint in wrapped:
            module._gradient_checkpointing_func = checkpoint


def _checkpoint_routed(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(_run_routed, _current.routing, function), *args, **kwargs)


def _run_routed(routing: Routing | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _set(routing, torch.is_grad_enabled(), True):
        return function(*args, **kwargs)
