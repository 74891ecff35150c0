"""fastpeft train: what it writes, data formats, resume."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from inspect import signature

import pytest
from safetensors.torch import load_file

from fastpeft.cli.settings import FIXED_ON_RESUME, TrainSettings
from fastpeft.cli.train import train
from fastpeft.demo import BASE

QUICK = ("--max-steps", 2, "--batch-size", 2, "--block-size", 32, "--rank", 4, "--log-steps", 1, "--dtype", "fp32")


def test_train_writes_adapter_curves_and_record(adapter):
    assert {p.name for p in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "loss.png"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(BASE.resolve())

    rows = list(csv.DictReader((adapter / "loss.csv").open()))
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2"]
    assert float(next(row["eval_loss"] for row in rows if row["eval_loss"])) > 0

    record = json.loads((adapter / "training.json").read_text())
    assert record["result"]["steps"] == 2
    assert record["result"]["tokens"] == 2 * 2 * 32
    files = {p.name for p in (adapter / "checkpoints" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


def test_reference_peft_loads_what_train_wrote(adapter):
    import torch
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    import fastpeft

    ids = torch.arange(10, 30)[None]
    logits = []
    for library in (fastpeft, peft):
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        logits.append(library.PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_train_prints_speed_and_time_left(cli, documents, tmp_path):
    answer = cli("train", BASE, "--data", documents, "--output", tmp_path / "out", *QUICK)
    assert answer.code == 0, answer.err
    assert "tokens/s" in answer.out
    assert "s left" in answer.out
    assert "held-out loss" in answer.out
    assert f"adapter: {tmp_path / 'out'}" in answer.out


@pytest.mark.parametrize("kind", ["txt", "prompts", "folder", "datasets"])
def test_train_reads(kind, cli, documents, tmp_path):
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()[:12]]
    path = tmp_path / ("data." + {"txt": "txt", "prompts": "jsonl"}.get(kind, "d"))
    if kind == "txt":
        path.write_text("\n\f\n".join(texts))
    elif kind == "prompts":
        path.write_text("\n".join(json.dumps({"prompt": t[:20], "completion": t[20:]}) for t in texts))
    elif kind == "folder":
        path.mkdir()
        (path / "one.txt").write_text(texts[0])
        (path / "two.jsonl").write_text(json.dumps({"text": texts[1]}))
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(path))
    answer = cli("train", BASE, "--data", path, "--output", tmp_path / "out", *QUICK)
    assert answer.code == 0, answer.err
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_lora_options_reach_the_config(cli, documents, tmp_path):
    options = (
        "--target-modules",
        "q_proj,up_proj",
        "--layers",
        "0-1,3",
        "--rslora",
        "--dora",
        "--alpha",
        3,
        "--dropout",
        0.1,
    )
    patterns = ("--rank-pattern", '{"up_proj": 2}', "--alpha-pattern", '{"up_proj": 5}', "--init", "gaussian")
    answer = cli("train", BASE, "--data", documents, "--output", tmp_path / "out", *QUICK, *options, *patterns)
    assert answer.code == 0, answer.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "up_proj"}
    assert config["layers_to_transform"] == [0, 1, 3]
    assert config["use_rslora"] is True
    assert config["use_dora"] is True
    assert (config["lora_alpha"], config["lora_dropout"]) == (3, 0.1)
    assert config["alpha_pattern"] == {"up_proj": 5}
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {name.split(".")[-3]: len(value) for name, value in weights.items() if ".lora_A." in name}
    assert ranks == {"q_proj": 4, "up_proj": 2}
    assert len(weights) == 3 * 2 * 3  # lora_A, lora_B and the magnitudes


def test_training_options_run(cli, documents, tmp_path):
    options = ("--autocast", "bf16", "--gradient-checkpointing", "--accumulation", 2, "--load-best", "--no-pack")
    more = ("--eval-fraction", 0.2, "--eval-steps", 1, "--save-steps", 1, "--schedule", "linear", "--optimizer", "sgd")
    answer = cli("train", BASE, "--data", documents, "--output", tmp_path / "out", *QUICK, *options, *more)
    assert answer.code == 0, answer.err


def test_killed_run_resumes_to_the_same_adapter(cli, documents, tmp_path):
    """Killed between two checkpoints, and gone on with, the run ends where the unbroken one does."""
    options = [*QUICK[2:], "--max-steps", 16, "--save-steps", 2, "--dropout", 0.1, "--eval-fraction", 0, "--lr", 0.01]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli("train", BASE, "--data", documents, "--output", whole, *options).code == 0

    command = [str(a) for a in ("train", BASE, "--data", documents, "--output", broken, *options)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastpeft.cli", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (broken / "checkpoints" / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "adapter_model.safetensors").exists(), "the run was over before the kill"
    for name in ("trainer_state.json", "optimizer.pt"):  # as if killed while it wrote a later one
        (broken / "checkpoints" / "checkpoint-999").mkdir(exist_ok=True)
        (broken / "checkpoints" / "checkpoint-999" / name).write_text("{")

    answer = cli("train", BASE, "--data", documents, "--output", broken, *options, "--resume")
    assert answer.code == 0, answer.err
    assert "going on from step" in answer.out
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (broken, whole))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    steps = [row["step"] for row in csv.DictReader((broken / "loss.csv").open())]
    assert steps == [str(i) for i in range(1, 17)]  # the curve has both parts


@pytest.mark.parametrize(("every", "logged"), [(10, ["3"]), (2, ["2", "3"])])
def test_the_last_step_is_logged(cli, documents, tmp_path, every, logged):
    """Also where the run is shorter than the steps between two logs, which is so for a small first file."""
    command = ("train", BASE, "--data", documents, "--output", tmp_path / "out", *QUICK)
    answer = cli(*command, "--max-steps", 3, "--log-steps", every)
    assert answer.code == 0, answer.err
    rows = list(csv.DictReader((tmp_path / "out" / "loss.csv").open()))
    assert [row["step"] for row in rows if row["loss"]] == logged
    assert f"training loss {float(rows[-2]['loss'] or rows[-1]['loss']):.3f}" in answer.out


def test_resume_refuses_other_settings(cli, documents, adapter, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in adapter.rglob("*")}
    answer = cli("train", BASE, "--data", documents, "--output", adapter, *QUICK, "--rank", 8, "--resume")
    assert answer.code == 2
    assert "rank: 4 then, 8 now" in answer.err
    assert "alpha: 8 then, 16 now" in answer.err
    other = tmp_path / "other.txt"
    other.write_text("Other text.\n\n" * 50)
    answer = cli("train", BASE, "--data", other, "--output", adapter, *QUICK, "--eval-fraction", 0.1, "--resume")
    assert "content of the data files" in answer.err
    assert before == {p: p.stat().st_mtime_ns for p in adapter.rglob("*")}


def test_overwrite_replaces_a_run_and_nothing_else(cli, documents, tmp_path, monkeypatch):
    command = ("train", BASE, "--data", documents, "--output", tmp_path / "out", *QUICK)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for more in ((), ("--overwrite",)):  # not an earlier run: never
        answer = cli(*command, *more)
        assert answer.code == 2
        assert "holds no earlier run" in answer.err
    (tmp_path / "out" / "mine.txt").unlink()
    assert cli(*command).code == 0
    first = (tmp_path / "out" / "training.json").read_text()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "--overwrite" in cli(*command).err

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for wrong in (("--target-modules", "q_prj"), ("--optimizer", "adamw_bnb_8bit")):
        answer = cli(*command, "--overwrite", *wrong)  # refused: the earlier run must still be there
        assert answer.code == 2
        assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}

    assert cli(*command, "--overwrite", "--seed", 1).code == 0
    assert (tmp_path / "out" / "training.json").read_text() != first
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_failure_in_the_first_step_leaves_no_folder(cli, documents, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fastpeft.cli.data.PadRight.__call__", fail)
    answer = cli("train", BASE, "--data", documents, "--output", tmp_path / "out", *QUICK)
    assert answer.code == 1
    assert "lower --batch-size" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_run_that_began_there_meanwhile_is_not_overwritten(cli, documents, tmp_path, monkeypatch):
    from fastpeft.cli import data

    collate = data.PadRight.__call__

    def begin(*arguments: object) -> object:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "training.json").write_text("theirs")
        return collate(*arguments)

    monkeypatch.setattr("fastpeft.cli.data.PadRight.__call__", begin)
    answer = cli("train", BASE, "--data", documents, "--output", tmp_path / "out", *QUICK)
    assert (answer.code, "is not empty" in answer.err) == (2, True)
    assert (tmp_path / "out" / "training.json").read_text() == "theirs"


def test_a_finished_run_can_go_further(cli, documents, tmp_path):
    command = ("train", BASE, "--data", documents, "--output", tmp_path / "out", *QUICK)
    assert cli(*command).code == 0
    weights = tmp_path / "out" / "adapter_model.safetensors"
    trained = weights.read_bytes()
    weights.unlink()  # as if killed after the last checkpoint, before the adapter was saved
    assert cli(*command, "--resume").code == 0
    assert weights.read_bytes() == trained
    assert json.loads((tmp_path / "out" / "training.json").read_text())["result"]["steps"] == 2
    assert cli(*command, "--resume", "--max-steps", 3).code == 0
    assert json.loads((tmp_path / "out" / "training.json").read_text())["result"]["steps"] == 3


def test_a_diverged_training_is_not_saved(cli, documents, tmp_path):
    answer = cli("train", BASE, "--data", documents, "--output", tmp_path / "out", *QUICK, "--lr", 1e30)
    assert answer.code == 1
    assert "the training diverged" in answer.err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_options_and_settings_agree():
    """`train` hands its arguments to TrainSettings by name; the defaults stand in both."""
    options = signature(train).parameters
    settings = {f.name: f for f in fields(TrainSettings)}
    assert options.keys() == settings.keys()
    assert set(FIXED_ON_RESUME) < settings.keys()
    for name, default in settings.items():
        if default.default is not MISSING and name not in ("alpha", "max_steps"):
            assert options[name].default == default.default, name
