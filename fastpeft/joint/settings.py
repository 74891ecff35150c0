"""What one adapter of a joint run trains on, and how: its own dataset, and its own copy of the TrainingArguments."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset


@dataclass(frozen=True, kw_only=True)
class AdapterTraining:
    """One adapter of a joint run. What is None is as the run's TrainingArguments, or its JointTrainer, say.

    Attributes:
        train_dataset: its rows; anything with a length and an index.
        eval_dataset: such rows, that `evaluate` measures it on; its metrics begin with eval_<adapter name>.
        learning_rate, lr_scheduler_type, lr_scheduler_kwargs, warmup_steps: its schedule, over its own steps.
        weight_decay, max_grad_norm: of its own parameters; its gradient is clipped by its own norm.
        per_device_train_batch_size: its rows in a batch; an update takes gradient_accumulation_steps as many.
        num_train_epochs, max_steps: how long it trains. Once it is done, the others go on without its rows.
        data_seed: of the order of its rows.
        compute_loss_func: (outputs, labels, num_items_in_batch) of its rows -> its loss, divided by num_items_in_batch,
            the number of its labels in the update. None: the JointTrainer's.
    """

    train_dataset: Any
    eval_dataset: Any = None
    learning_rate: float | None = None
    lr_scheduler_type: str | None = None
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    warmup_steps: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    per_device_train_batch_size: int | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    data_seed: int | None = None
    compute_loss_func: Callable[..., Tensor] | None = None

    def arguments(self, shared: Any) -> Any:
        """The TrainingArguments with which a run of this adapter alone would be started.

        Args:
            shared: the joint run's TrainingArguments; not changed.
        """
        own = copy.copy(shared)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name not in ("train_dataset", "eval_dataset", "compute_loss_func"):
                setattr(own, field.name, value)
        if self.num_train_epochs is not None and self.max_steps is None:
            own.max_steps = -1  # its own number of epochs goes before the run's number of steps
        return own


def check_rows(owner: str, dataset: Any) -> None:
    """Refuse a dataset that cannot be asked for its length and for row i: rows are taken in an order of the run's.

    Args:
        owner: whose and which dataset it is, for the message.

    Raises:
        ValueError: with what to do instead.
    """
    reads_on = isinstance(dataset, IterableDataset)  # which inherits an index that raises
    if reads_on or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"{owner}: expected rows with a length and an index, such as a list or a datasets.Dataset, got "
            f"{type(dataset).__name__}; give list(rows), or datasets.Dataset.from_generator for more than memory holds"
        )


@dataclass(frozen=True)
class Schedule:
    """Which rows an adapter's updates take, as with transformers' Trainer alone.

    Attributes:
        rows: length of its dataset.
        batch: rows of an update: batch size times accumulation.
        updates: how many updates it makes.
        seed: of the order; None: the dataset's own order.
    """

    rows: int
    batch: int
    updates: int
    seed: int | None

    @classmethod
    def of(cls, name: str, training: AdapterTraining, args: Any) -> "Schedule":
        """The schedule that an adapter's own arguments give.

        Raises:
            ValueError: rows without a length or an index, no rows, a batch size below 1, or nothing to train.
        """
        check_rows(f"adapter {name!r}, train_dataset", training.train_dataset)
        rows, size = len(training.train_dataset), args.per_device_train_batch_size
        if size < 1:
            raise ValueError(f"adapter {name!r}: per_device_train_batch_size must be at least 1, got {size}")
        if args.dataloader_drop_last:
            rows -= rows % size
        if rows < 1:
            what = f"fewer rows than one batch of {size}" if len(training.train_dataset) else "no rows"
            raise ValueError(f"adapter {name!r}: its train_dataset has {what}; give it some, or leave it out")
        batch = size * args.gradient_accumulation_steps
        updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(rows / batch))
        if updates < 1:
            raise ValueError(f"adapter {name!r}: num_train_epochs={args.num_train_epochs} leaves nothing to train")
        if getattr(args, "train_sampling_strategy", "random") == "sequential":
            return cls(rows, batch, updates, None)
        return cls(rows, batch, updates, args.seed if args.data_seed is None else args.data_seed)

    @property
    def updates_an_epoch(self) -> int:
        return math.ceil(self.rows / self.batch)
