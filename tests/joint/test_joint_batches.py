"""Which rows a joint run takes, and what a batch of them looks like."""

import pytest
import torch
from joint_runs import PAD, alone, arguments, rows
from torch.utils.data import DataLoader

from fastpeft.joint import AdapterTraining
from fastpeft.joint.batches import JointBatches, JointCollator, Row, TaggedRows, slices_by_adapter, without
from fastpeft.joint.settings import Schedule


def test_an_adapters_rows_come_in_the_order_of_trainer_alone(tmp_path):
    data = rows(11, 0, 4, 4)
    training = AdapterTraining(train_dataset=data, num_train_epochs=3, data_seed=5, per_device_train_batch_size=4)
    single = alone("w", tmp_path, training)
    loader = single.get_train_dataloader()
    wanted = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        wanted += [batch["input_ids"].tolist() for batch in loader]
    schedule = Schedule.of("w", training, single.args)
    batches = JointBatches({"w": data, "x": data[:3]}, {"w": schedule, "x": Schedule(3, 1, 5, 0)})
    ours = [[row.features["input_ids"] for row in batch if row.adapter == "w"] for batch in batches]
    assert ours == wanted
    assert len(batches) == schedule.updates == 9
    assert [len([row for row in batch if row.adapter == "x"]) for batch in batches] == [1] * 5 + [0] * 4


def test_an_update_is_cut_into_batches_of_equal_size():
    data = {"w": list(range(7)), "x": list(range(100, 105))}
    schedules = {"w": Schedule(7, 4, 4, None), "x": Schedule(5, 3, 2, None)}
    whole = JointBatches(data, schedules)
    cut = JointBatches(data, schedules, accumulation=3)
    assert [[row.features for row in batch] for batch in whole] == [
        [0, 1, 2, 3, 100, 101, 102], [4, 5, 6, 103, 104], [0, 1, 2, 3], [4, 5, 6],
    ]  # fmt: skip
    for update, together in enumerate(whole):
        parts = [cut[3 * update + part] for part in range(3)]
        assert [row for part in parts for row in part] == together
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(parts)
    few = JointBatches(data, schedules, accumulation=5)
    assert [[row.features for row in few[3 * 5 + part]] for part in range(5)] == [[], [4], [], [5], [6]]


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 9])
def test_the_rows_of_each_update_are_counted_without_taking_them(batch):
    schedules = {"w": Schedule(7, batch, 11, None), "x": Schedule(4, 2, 3, 0)}
    batches = JointBatches({"w": list(range(7)), "x": list(range(4))}, schedules)
    assert batches.rows == [len(rows_) for rows_ in batches]


def test_batches_are_the_same_whatever_was_asked_for_before():
    """A resumed run begins in the middle, and a worker sees every second batch."""
    batches = [JointBatches({"w": list(range(10))}, {"w": Schedule(10, 3, 9, 1)}) for _ in range(2)]
    forwards = [batches[0][i] for i in range(9)]
    assert [batches[1][i] for i in reversed(range(9))] == forwards[::-1]
    assert sorted(row.features for batch in forwards[:4] for row in batch) == list(range(10))
    loader = DataLoader(batches[1], batch_size=1, num_workers=2, collate_fn=lambda items: items[0])
    assert list(loader) == forwards


def test_the_collator_says_whose_row_each_is():
    collate = JointCollator(PAD)
    data = rows(3, 0)
    batch = collate([[Row("w", data[0]), Row("x", data[1]), Row("x", data[2])]])
    assert batch["adapter_names"] == ["w", "x", "x"]
    assert batch["input_ids"].shape == batch["labels"].shape
    tagged = TaggedRows("x", data)
    assert collate([tagged[0], tagged[2]])["adapter_names"] == ["x", "x"]  # evaluation has rows for items
    assert collate([[]]) == {"adapter_names": []}  # a part of an update that has fewer rows than parts
    assert without({"adapter_names": []}, set()) is None
    with pytest.raises(ValueError, match=r'needs "labels" with one row for each of the 1 rows .* made input_ids'):
        JointCollator(lambda items: {"input_ids": torch.ones(1, 2)})([Row("w", {})])


def test_rows_of_an_adapter_can_be_taken_out_of_a_batch():
    batch = {"input_ids": torch.arange(8).view(4, 2), "scale": torch.tensor(2.0), "adapter_names": list("wxxy")}
    assert slices_by_adapter(batch["adapter_names"]) == {"w": slice(0, 1), "x": slice(1, 3), "y": slice(3, 4)}
    left = without(batch, {"x"})
    assert left["adapter_names"] == ["w", "y"]
    assert left["input_ids"].tolist() == [[0, 1], [6, 7]]
    assert left["scale"] is batch["scale"]
    assert without(batch, {"other"}) == batch
    assert without(batch, {"w", "x", "y"}) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train_dataset": []}, "has no rows"),
        ({"per_device_train_batch_size": 0}, "must be at least 1, got 0"),
        ({"num_train_epochs": 0.0}, "num_train_epochs=0.0 leaves nothing to train"),
    ],
)
def test_a_schedule_without_updates_is_refused(more, message, tmp_path):
    training = AdapterTraining(**{"train_dataset": rows(3, 0)} | more)
    with pytest.raises(ValueError, match=message):
        Schedule.of("w", training, training.arguments(arguments(tmp_path)))
