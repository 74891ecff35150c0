"""Adapters trained together are what each would be alone: losses, weights, schedules, clipping, checkpoints."""

import dataclasses
import logging
import math

import peft
import pytest
import torch
from joint_runs import alone, arguments, joint, logged, make_model, rows, weights
from models import batch, tiny_bert_classifier, tiny_llama

from fastpeft import LoraConfig, PeftModel, get_peft_model
from fastpeft.joint import AdapterTraining, JointTrainer

# fp32, a few steps of AdamW. A sum in another order moves a loss by a bit or two; AdamW's division may make more of it.
LOSS_BOUND = 1e-5  # relative
WEIGHT_BOUND = 1e-3  # of the largest distance that a weight of the adapter moved

TRAININGS = {
    "w": AdapterTraining(train_dataset=rows(10, 1), learning_rate=3e-3),
    "x": AdapterTraining(
        train_dataset=rows(7, 2), learning_rate=2e-2, per_device_train_batch_size=2, max_grad_norm=0.3
    ),
    "y": AdapterTraining(
        train_dataset=rows(20, 3, 5, 5), lr_scheduler_type="cosine", warmup_steps=2, max_steps=9, data_seed=7
    ),
    "z": AdapterTraining(train_dataset=rows(5, 4), weight_decay=0.0, num_train_epochs=2),
}  # fmt: skip


def assert_as_alone(together, trainings, folder, names="", **more):
    """Every adapter of a finished joint run against Trainer itself on that adapter."""
    for name in names or trainings:
        single = alone(name, folder, trainings[name], **more)
        start = weights(single.model, name)
        single.train()
        ours, theirs = logged(together, f"loss/{name}"), logged(single, "loss")
        assert len(ours) == len(theirs) >= 4
        assert ours == pytest.approx(theirs, rel=LOSS_BOUND)
        assert theirs[0] != theirs[-1]
        assert logged(together, f"learning_rate/{name}") == pytest.approx(logged(single, "learning_rate"), rel=1e-12)
        assert logged(together, f"grad_norm/{name}") == pytest.approx(logged(single, "grad_norm"), rel=1e-4)
        ended, wanted = weights(together.model, name), weights(single.model, name)
        moved = max((wanted[key] - start[key]).abs().max() for key in start)
        assert moved > 0
        for key in start:
            assert (ended[key] - wanted[key]).abs().max() <= WEIGHT_BOUND * moved, key


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_adapter_ends_as_trainer_alone_leaves_it(accumulation, tmp_path):
    more = {"gradient_accumulation_steps": accumulation}
    longer = dataclasses.replace(TRAININGS["z"], num_train_epochs=2 * accumulation)  # four updates
    trainings = TRAININGS | {"z": longer}
    together = joint(tmp_path, trainings, **more)
    base = {key: p.clone() for key, p in together.model.named_parameters() if "lora_" not in key}
    together.train()
    assert together.state.global_step == 9  # as long as the longest; z is done before
    assert len(logged(together, "loss/z")) == 4
    assert max(logged(together, "grad_norm/x")) > 0.3  # so that clipping has something to do
    left = {key: p for key, p in together.model.named_parameters() if "lora_" not in key}
    assert all(torch.equal(left[key], p) for key, p in base.items())
    assert_as_alone(together, trainings, tmp_path, **more)


@pytest.mark.parametrize("accumulation", [4, 7])
def test_an_update_may_have_fewer_rows_than_accumulation_steps(accumulation, tmp_path, caplog, monkeypatch):
    """Of 10 rows the last update of an epoch has 2, or 3; x, of 3 rows, is done before."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    more = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1, "max_steps": -1}
    more |= {"include_num_input_tokens_seen": "all", "max_grad_norm": 0.3, "num_train_epochs": 2}
    trainings = {
        "w": AdapterTraining(train_dataset=rows(10, 1), learning_rate=3e-3),
        "x": AdapterTraining(train_dataset=rows(3, 2), num_train_epochs=4),
    }
    together = joint(tmp_path, trainings, **more)
    together.train()
    assert together.state.global_step == 2 * math.ceil(10 / accumulation)
    assert len(logged(together, "loss/x")) == 4
    assert min(together.train_dataset.rows) < accumulation
    assert "Tried to track the number of tokens" not in caplog.text
    assert_as_alone(together, trainings, tmp_path, **more)


def test_the_last_rows_of_an_epoch_are_dropped_where_trainer_drops_them(tmp_path):
    names = {name: TRAININGS[name] for name in "xz"}
    more = {"dataloader_drop_last": True, "train_sampling_strategy": "sequential", "max_steps": 5}
    trainings = {name: dataclasses.replace(t, num_train_epochs=None) for name, t in names.items()}
    together = joint(tmp_path, trainings, **more)
    together.train()
    assert_as_alone(together, trainings, tmp_path, **more)


def test_an_adapters_dropout_is_its_own(tmp_path):
    """x draws masks; w has none and is as alone without any."""
    model = make_model("w")
    torch.manual_seed(ord("x"))
    config = LoraConfig(r=5, lora_alpha=40, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    model.add_adapter("x", config)
    trainings = {name: TRAININGS[name] for name in "wx"}
    together = joint(tmp_path, trainings, model)
    together.train()
    assert_as_alone(together, trainings, tmp_path, "w")
    without = alone("x", tmp_path, trainings["x"])
    without.train()
    assert logged(together, "loss/x")[1:] != pytest.approx(logged(without, "loss")[1:], rel=1e-3)


def gradients(model, names, inputs):
    """Each adapter's gradient after the backward of the sum of all rows' losses."""
    model.zero_grad(set_to_none=True)
    model.set_requires_grad(["w", "x"], True)
    logits = model(**inputs, adapter_names=names).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten(), reduction="sum").backward()
    return {
        name: {key: p.grad.clone() for key, p in model.named_parameters() if f".{name}." in key and p.grad is not None}
        for name in "wx"
    }


def test_a_gradient_does_not_see_the_rows_of_others():
    model = make_model("wx").train()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.1)
    inputs = batch("llama", rows=4)
    inputs.pop("labels")
    names = ["w", "x", "x", "w"]
    first = gradients(model, names, inputs)
    inputs["input_ids"][1:3] = 7
    second = gradients(model, names, inputs)
    for key, gradient in first["w"].items():
        torch.testing.assert_close(second["w"][key], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    assert any((second["x"][key] - gradient).abs().max() > 0.1 for key, gradient in first["x"].items())


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path):
    trainings = {name: TRAININGS[name] for name in "wxz"}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = joint(tmp_path / "whole", trainings, make_model("wxz", dropout=0.2), **saving)
    whole.train()
    again = joint(tmp_path / "again", trainings, make_model("wxz", dropout=0.2), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step == 6
    for name in "wxz":
        assert logged(again, f"loss/{name}") == logged(whole, f"loss/{name}")  # the first three are the checkpoint's
        ended, wanted = weights(again.model, name), weights(whole.model, name)
        assert all(torch.equal(ended[key], wanted[key]) for key in wanted)

    folder = tmp_path / "whole" / "checkpoint-6"
    assert not list(folder.glob("*.safetensors"))  # no base, and every adapter in its own folder
    for library in (peft.PeftModel, PeftModel):
        loaded = library.from_pretrained(tiny_llama(), folder / "x", adapter_name="x")
        found, wanted = weights(loaded, "x"), weights(whole.model, "x")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("used", [False, True])
def test_a_run_goes_on_whatever_order_its_adapters_are_named_in(used, tmp_path):
    """Optimizer, schedules and dropout's random state are restored by position. A used trainer has an optimizer."""
    trainings = {name: TRAININGS[name] for name in "xwz"}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = joint(tmp_path / "whole", trainings, make_model("wxz", dropout=0.2), **saving)
    whole.train()
    named = {name: trainings[name] for name in "zwx"}
    again = joint(tmp_path / "again", named, make_model("zxw", dropout=0.2), **saving)
    if used:
        again.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name in "wxz":
        for key in ("loss", "learning_rate", "grad_norm"):
            assert logged(again, f"{key}/{name}") == logged(whole, f"{key}/{name}")
        ended, wanted = weights(again.model, name), weights(whole.model, name)
        assert all(torch.equal(ended[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("saved", "resumed", "more", "message"),
    [
        ("w", "wx", {}, "it has no 'x'; resume with the adapters that it has"),
        ("wx", "x", {}, "it also has 'w'; resume"),
        ("wx", "xyz", {}, "it has no 'y', 'z' and also has 'w'; resume"),
        ("w", "wx", {"save_only_model": True}, "has no weights of adapter 'x'"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused(saved, resumed, more, message, tmp_path):
    joint(tmp_path, {n: TRAININGS[n] for n in saved}, save_strategy="steps", save_steps=3, max_steps=3, **more).train()
    again = joint(tmp_path, {name: TRAININGS[name] for name in resumed}, make_model("wxyz"))
    with pytest.raises(ValueError, match=message):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_trainer_alone_is_refused(tmp_path):
    alone("w", tmp_path, TRAININGS["w"], save_strategy="steps", save_steps=3, max_steps=3).train()
    with pytest.raises(ValueError, match="the optimizer of a run that was no joint run; train anew"):
        joint(tmp_path, {"w": TRAININGS["w"]}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("learning_rate", [1e19, 1e38])
def test_an_adapter_that_diverges_leaves_and_the_others_go_on(learning_rate, tmp_path):
    trainings = {name: TRAININGS[name] for name in "wxy"}
    trainings["x"] = dataclasses.replace(trainings["x"], learning_rate=learning_rate)
    together = joint(tmp_path, trainings, save_strategy="steps", save_steps=4)
    together.train()
    assert together.diverged == {"x"}
    gone = next(record["step"] for record in together.state.log_history if "diverged/x" in record)
    assert gone < 4
    assert len(logged(together, "loss/x")) == gone
    assert all(math.isfinite(loss) for name in trainings for loss in logged(together, f"loss/{name}"))
    if learning_rate < 1e38:  # else the last step itself overflowed
        assert all(weight.isfinite().all() for weight in weights(together.model, "x").values())
    assert_as_alone(together, trainings, tmp_path, "wy")

    resumed = joint(tmp_path, trainings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.diverged == {"x"}
    assert len(logged(resumed, "loss/x")) == gone
    assert logged(resumed, "loss/w") == logged(together, "loss/w")


def test_who_is_well_beside_a_broken_adapter_is_not_stepped_with_what_is_not_finite(tmp_path):
    """Both gradients are NaN in the second update, and x's weights too: w goes on with the weights that it had."""
    together = joint(tmp_path, {name: TRAININGS[name] for name in "wx"}, max_grad_norm=1.0)
    first = {name: together.parameters_of[name][0] for name in "wx"}
    calls = {"w": 0, "x": 0}

    def spoil(name):
        def hook(gradient):
            calls[name] += 1
            if calls[name] != 2:
                return gradient
            if name == "x":
                with torch.no_grad():
                    first["x"].view(-1)[0] = torch.nan
            return gradient * torch.nan

        return hook

    for name in "wx":
        first[name].register_hook(spoil(name))
    together.train()
    assert together.diverged == {"x"}
    assert all(weight.isfinite().all() for weight in weights(together.model, "w").values())
    losses = logged(together, "loss/w")
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_a_run_ends_when_all_have_diverged(tmp_path):
    trainings = {name: dataclasses.replace(TRAININGS[name], learning_rate=1e38) for name in "wx"}
    together = joint(tmp_path, trainings)
    together.train()
    assert together.diverged == {"w", "x"}
    assert together.state.global_step < 6


def test_each_adapter_is_measured_on_its_own_rows(tmp_path):
    held = {"w": rows(5, 11), "y": rows(4, 12)}
    trainings = {n: dataclasses.replace(TRAININGS[n], eval_dataset=held.get(n)) for n in "wxy"}
    together = joint(tmp_path, trainings, per_device_eval_batch_size=2)
    together.train()
    metrics = together.evaluate()
    assert "eval_x_loss" not in metrics
    for name in "wy":
        single = alone(name, tmp_path, trainings[name], per_device_eval_batch_size=2)
        single.train()
        wanted = single.evaluate(held[name])["eval_loss"]
        assert metrics[f"eval_{name}_loss"] == pytest.approx(wanted, rel=1e-4)
        given = together.evaluate({name: held[name]})  # rows of the caller's
        assert given[f"eval_{name}_loss"] == pytest.approx(wanted, rel=1e-4)
        predicted, ours = single.predict(held[name]), together.predict({name: held[name]})
        assert ours.metrics["test_loss"] == pytest.approx(predicted.metrics["test_loss"], rel=1e-4)
        assert ours.predictions == pytest.approx(predicted.predictions, rel=1e-2, abs=1e-3)
    for measure in (together.evaluate, together.predict):
        with pytest.raises(ValueError, match=r"expected \{adapter name: rows\} .* got a list; say whose"):
            measure(held["w"])
        with pytest.raises(ValueError, match="with names of w, x, y, got names other"):
            measure({"other": held["w"]})
    with pytest.raises(ValueError, match="rows of one adapter, got 2"):
        together.predict(held)


def test_the_log_has_each_adapters_figures_and_the_sum(tmp_path):
    together = joint(tmp_path, {name: TRAININGS[name] for name in "wx"}, logging_steps=2)
    together.train()
    first = together.state.log_history[0]
    assert {"loss", "step", "epoch"} <= first.keys()
    assert not {"learning_rate", "grad_norm"} & first.keys()
    assert first["loss"] == pytest.approx(first["loss/w"] + first["loss/x"], rel=1e-5)
    assert first["tokens_per_second/w"] > 0
    single = alone("w", tmp_path, TRAININGS["w"], logging_steps=2)
    single.train()
    assert logged(together, "loss/w") == pytest.approx(logged(single, "loss"), rel=LOSS_BOUND)


def test_operations_are_counted_as_trainer_counts_them(tmp_path):
    together = joint(tmp_path, {"w": TRAININGS["w"]}, max_steps=3)
    together.train()
    single = alone("w", tmp_path, TRAININGS["w"], max_steps=3)
    single.train()
    assert together.state.total_flos == single.state.total_flos > 0


def classifier(names):
    model = None
    for name in names:
        config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
        torch.manual_seed(ord(name))
        if model is None:
            model = get_peft_model(tiny_bert_classifier(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


@pytest.mark.parametrize("own_loss", [False, True])
def test_classifiers_train_a_head_each(own_loss, tmp_path):
    """modules_to_save, one label a row, and a loss that the user gives."""
    from transformers import Trainer, default_data_collator

    def smooth(outputs, labels, num_items_in_batch):
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2, reduction="sum")
        return loss / num_items_in_batch

    data = {}
    for seed, name in enumerate("wx"):
        columns = batch("bert_classifier", rows=8, seed=seed)
        data[name] = [{key: column[i] for key, column in columns.items()} for i in range(8)]
    trainings = {name: AdapterTraining(train_dataset=rows_) for name, rows_ in data.items()}
    func = smooth if own_loss else None
    shared = {"data_collator": default_data_collator, "compute_loss_func": func}
    together = JointTrainer(classifier("wx"), arguments(tmp_path), trainings, **shared)
    together.train()
    for name in "wx":
        single = Trainer(classifier(name), arguments(tmp_path), train_dataset=data[name], **shared)
        start = weights(single.model, name)
        single.train()
        assert logged(together, f"loss/{name}") == pytest.approx(logged(single, "loss"), rel=LOSS_BOUND)
        ended, wanted = weights(together.model, name), weights(single.model, name)
        assert any("classifier" in key for key in wanted)
        for key in wanted:
            assert not torch.equal(wanted[key], start[key])
            torch.testing.assert_close(ended[key], wanted[key], rtol=1e-3, atol=1e-5)


def test_adapters_outside_the_run_stay_as_they_are(tmp_path):
    model = make_model("wxy")
    before = weights(model, "y")
    together = joint(tmp_path, {name: TRAININGS[name] for name in "wx"}, model)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".y." in key)
    together.train()
    assert all(torch.equal(p, before[key]) for key, p in weights(model, "y").items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "compute_loss_func"),
        ({"neftune_noise_alpha": 5.0}, "noise by the longest row of all adapters"),
        ({"auto_find_batch_size": True}, "set the batch sizes"),
        ({"save_strategy": "epoch"}, "count save, eval and logging in steps"),
        ({"train_sampling_strategy": "group_by_length"}, "random or sequential"),
    ],
)
def test_arguments_without_a_meaning_are_refused(more, message, tmp_path):
    trainings = {"w": AdapterTraining(train_dataset=rows(8, 1))}
    with pytest.raises(ValueError, match=message):
        joint(tmp_path, trainings, **more)


def test_what_cannot_be_trained_apart_is_refused(tmp_path):
    trainings = {"w": TRAININGS["w"]}
    with pytest.raises(ValueError, match=r"no adapter 'other'; this model has 'w', 'x'"):
        joint(tmp_path, {"other": TRAININGS["w"]}, make_model("wx"))
    with pytest.raises(ValueError, match="adapter 'w': its train_dataset has no rows"):
        joint(tmp_path, {"w": AdapterTraining(train_dataset=[])})
    model = make_model("wx")
    model.base_model.model.lm_head.weight.requires_grad = True
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"lm_head.weight and 0 more are trainable and belong to no adapter"):
        joint(tmp_path, trainings, model)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before
    with pytest.raises(ValueError, match="lr_scheduler_type=reduce_lr_on_plateau needs more than the number"):
        joint(
            tmp_path,
            {"w": dataclasses.replace(TRAININGS["w"], lr_scheduler_type="reduce_lr_on_plateau")},
            eval_strategy="no",
        ).train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows(3, 1))


@pytest.mark.parametrize("make", [Stream, lambda: iter(rows(3, 1)), lambda: None], ids=["stream", "iterator", "none"])
def test_rows_that_only_come_one_after_another_are_refused(make, tmp_path):
    message = "{}: expected rows with a length and an index, .* got (Stream|list_iterator|NoneType); give list"
    with pytest.raises(ValueError, match=message.format("adapter 'w', train_dataset")):
        joint(tmp_path, {"w": AdapterTraining(train_dataset=make())})
    together = joint(tmp_path, {"w": TRAININGS["w"]})
    for measure in (together.evaluate, together.predict):
        with pytest.raises(ValueError, match=message.format("adapter 'w', rows to evaluate")):
            measure({"w": make()})
    if make() is not None:
        with pytest.raises(ValueError, match=message.format("adapter 'w', rows to evaluate")):
            joint(tmp_path, {"w": dataclasses.replace(TRAININGS["w"], eval_dataset=make())})


def test_rows_without_labels_are_named(tmp_path):
    trainer = JointTrainer(
        make_model("w"), arguments(tmp_path), {"w": AdapterTraining(train_dataset=[{"input_ids": [3, 4]}] * 4)}
    )
    with pytest.raises(ValueError, match=r'needs "labels" .* the data collator made input_ids'):
        trainer.train()
