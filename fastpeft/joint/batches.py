"""The batches of a joint run: each adapter's own rows, in the order in which a run of it alone would take them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastpeft.joint.settings import Schedule, check_rows


class Row(NamedTuple):
    """A row of some adapter's dataset, and the adapter's name."""

    adapter: str
    features: Any


class TaggedRows(Dataset[Row]):
    """A dataset whose rows carry the name of the adapter that they belong to; they are there to be evaluated.

    Raises:
        ValueError: the dataset has no length or no index.
    """

    def __init__(self, adapter: str, dataset: Any) -> None:
        check_rows(f"adapter {adapter!r}, rows to evaluate", dataset)
        self.adapter = adapter
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return Row(self.adapter, self.dataset[index])


class JointBatches(Dataset[list[Row]]):
    """Item i is the i-th batch of the run: rows of all adapters that still train, adapter after adapter.

    An update is cut into `accumulation` batches of equal size, give or take a row; of fewer rows than that, the first
    batches are empty.

    Args:
        datasets: by adapter.
        schedules: by adapter, in the same order.
        accumulation: batches of an update.
    """

    def __init__(self, datasets: Mapping[str, Any], schedules: Mapping[str, Schedule], accumulation: int = 1) -> None:
        self.datasets = dict(datasets)
        self.schedules = dict(schedules)
        self.accumulation = accumulation
        self.updates = max(schedule.updates for schedule in schedules.values())
        self.rows = _rows_by_update(schedules.values(), self.updates)
        self._orders: dict[str, tuple[int, Sequence[int]]] = {}  # adapter -> (epoch, its order), the last one asked for

    def __len__(self) -> int:
        return self.updates * self.accumulation

    def __getitem__(self, index: int) -> list[Row]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        update, part = divmod(index, self.accumulation)
        places = list(self._places(update))
        first, end = (len(places) * cut // self.accumulation for cut in (part, part + 1))
        return [Row(name, self.datasets[name][place]) for name, place in places[first:end]]

    def _places(self, update: int) -> Iterator[tuple[str, int]]:
        """(adapter, index into its dataset) of all rows of an update."""
        for name, schedule in self.schedules.items():
            taken = _taken(schedule, update)
            if taken:
                order = self._order(name, schedule, update // schedule.updates_an_epoch)
                yield from ((name, order[place]) for place in taken)

    def _order(self, name: str, schedule: Schedule, epoch: int) -> Sequence[int]:
        """The order of an epoch: accelerate's SeedableRandomSampler's, so that a run alone takes the same rows."""
        if schedule.seed is None:
            return range(schedule.rows)
        if self._orders.get(name, (None, ()))[0] != epoch:
            generator = torch.Generator().manual_seed(schedule.seed + epoch)
            self._orders[name] = epoch, torch.randperm(len(self.datasets[name]), generator=generator).tolist()
        return self._orders[name][1]


def _taken(schedule: Schedule, update: int) -> range:
    """Places in the epoch's order that an update takes; none once the schedule is over."""
    if update >= schedule.updates:
        return range(0)
    first = update % schedule.updates_an_epoch * schedule.batch
    return range(first, min(first + schedule.batch, schedule.rows))


def _rows_by_update(schedules: Iterable[Schedule], updates: int) -> list[int]:
    """How many rows each update has, all adapters together: the sum of what `_taken` gives."""
    counts = torch.zeros(updates, dtype=torch.int64)
    for schedule in schedules:
        own, epoch = counts[: schedule.updates], schedule.updates_an_epoch
        own += schedule.batch
        own[epoch - 1 :: epoch] += schedule.rows - epoch * schedule.batch  # the last one of an epoch may be smaller
    rows: list[int] = counts.tolist()
    return rows


class JointCollator:
    """Puts the rows of all adapters into one batch, which says under "adapter_names" whose row each is.

    Of no rows it is {"adapter_names": []}: a collator need not know what an empty batch is.

    Args:
        collator: makes a batch of tensors of a list of rows, padding included, and keeps their order.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator
        self.tokenizer = getattr(collator, "tokenizer", None)  # Trainer saves it beside the adapters

    def __call__(self, items: Sequence[Row | list[Row]]) -> dict[str, Any]:
        rows = [row for item in items for row in (item if isinstance(item, list) else [item])]
        if not rows:
            return {"adapter_names": []}
        batch = dict(self.collator([row.features for row in rows]))
        if len(batch.get("labels", ())) != len(rows):
            raise ValueError(
                f'joint training needs "labels" with one row for each of the {len(rows)} rows of a batch; the data '
                f"collator made {', '.join(batch) or 'nothing'}. Put labels into the rows, or use a collator that "
                "makes them"
            )
        return batch | {"adapter_names": [row.adapter for row in rows]}


def slices_by_adapter(adapter_names: Sequence[str]) -> dict[str, slice]:
    """Where each adapter's rows are in a batch of a JointCollator: one run of rows each."""
    slices, start = {}, 0
    for name, group in groupby(adapter_names):
        end = start + len(list(group))
        slices[name] = slice(start, end)
        start = end
    return slices


def split_rows(value: Any, slices: Mapping[str, slice], B: int) -> Sequence[Any]:
    """For each adapter its rows of a tensor of B rows; any other value for all of them."""
    if not _has_rows(value, B):
        return [value] * len(slices)
    parts: Sequence[Tensor] = value.split([rows.stop - rows.start for rows in slices.values()])
    return parts


def _has_rows(value: Any, B: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == B


def without(inputs: Mapping[str, Any], adapters: set[str]) -> dict[str, Any] | None:
    """A batch without the rows of some adapters; None if no row is left. Unchanged if none of them has rows in it."""
    names = inputs["adapter_names"]
    rows = [row for row, name in enumerate(names) if name not in adapters]
    if not rows:
        return None
    if len(rows) == len(names):
        return dict(inputs)

    rest = {key: value[rows] if _has_rows(value, len(names)) else value for key, value in inputs.items()}
    return rest | {"adapter_names": [names[row] for row in rows]}
