"""Adapters other than the one that fastpeft train just wrote: half saved, of another task, with more tokens."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fastpeft
from fastpeft import LoraConfig, get_peft_model
from fastpeft.adapter_files import find_config
from fastpeft.cli.models import adapter_config
from fastpeft.cli.results import record_of
from fastpeft.demo import BASE
from fastpeft.sealed_file import read_seal


@pytest.mark.parametrize("first", [False, True], ids=["over-another", "first"])
def test_a_save_that_was_killed_between_its_renames(first, cli, adapter, copy_of, tmp_path):
    """The new weights are in place, their config waits in the hidden folder; before it lies the old one, or none."""
    folder = copy_of(adapter)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole = record_of(weights, {"a": str(folder)}, str(BASE), {})
    waiting = folder / f".fastpeft-save-{read_seal(weights).pair}-x"
    waiting.mkdir()
    config.rename(waiting / config.name)
    expected = json.loads((waiting / config.name).read_text())
    if not first:
        old = expected | {"lora_alpha": 77, "base_model_name_or_path": str(tmp_path / "gone")}
        config.write_text(json.dumps(old))
    assert find_config(folder) == waiting / config.name, "this is not the state that the test is about"

    assert adapter_config(str(folder)) == expected
    assert record_of(weights, {"a": str(folder)}, str(BASE), {}) == whole
    report = json.loads(cli("inspect", folder, "--base", BASE, "--json").out)
    assert (report["misfits"], report["layers"][0]["scaling"]) == ([], 2.0)
    assert report["named_base"] == str(BASE.resolve())
    answer = cli("generate", folder, "One day", "-n", 1)
    assert answer.code == 0, answer.err
    answer = cli("merge", folder, tmp_path / "merged")
    assert answer.code == 0, answer.err
    assert "holds an adapter" in cli("inspect", adapter, "--base", folder).err


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An adapter that labels texts in three ways, with a head of its own."""
    folder = tmp_path_factory.mktemp("classifier")
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=3)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    model.base_model.model.score.weight.data.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "ADAPTER", "One day"),
        ("generate", "--adapter", "a=ADAPTER", "--prompts", "PROMPTS"),
        ("merge", "ADAPTER", "OUT"),
    ],
    ids=["generate", "batch", "merge"],
)
def test_an_adapter_of_another_task_is_refused(command, cli, classifier, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "One day"}\n')
    paths = {"ADAPTER": classifier, "PROMPTS": tmp_path / "p.jsonl", "OUT": tmp_path / "out"}
    for name, path in paths.items():
        command = [word.replace(name, str(path)) for word in command]
    answer = cli(*command)
    assert answer.code == 2
    assert "is for the task SEQ_CLS" in answer.err
    assert "fastpeft.AutoPeftModelForSequenceClassification.from_pretrained" in answer.err
    assert len(answer.err.splitlines()) == 1
    assert hasattr(fastpeft, "AutoPeftModelForSequenceClassification")
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_adapter_brings_says_nothing_of_the_fit(cli, classifier, tmp_path):
    """A base without a head gets one of two labels; in a base with a head of its own that number is real."""
    answer = cli("inspect", classifier, "--base", BASE)
    assert answer.code == 0, answer.err
    assert "note: score.weight (3, 192): the adapter brings this head itself" in answer.out
    assert f"fits {BASE.resolve()}" in answer.out

    config = AutoConfig.from_pretrained(BASE)
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path / "two")
    answer = cli("inspect", classifier, "--base", tmp_path / "two")
    assert answer.code == 1
    assert "score.weight: the adapter has (3, 192), the base needs (2, 192)" in answer.err
    config.architectures, config.hidden_size = ["LlamaForCausalLM"], 96
    config.save_pretrained(tmp_path / "narrow")
    report = json.loads(cli("inspect", classifier, "--base", tmp_path / "narrow", "--json").out)
    assert "score.weight: the adapter has (3, 192), the base needs (2, 96)" in report["misfits"]
    assert report["notes"] == []


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """An adapter that was trained with two tokens more than the base has, and its tokenizer; and its own logits."""
    folder = tmp_path_factory.mktemp("wordy")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens(["<one>", "<two>"])
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="they were resized"):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer("One <two> day", return_tensors="pt")["input_ids"]
    assert len(tokenizer) - 1 in ids
    with torch.no_grad():
        return folder, ids, model.eval()(input_ids=ids).logits


def test_an_adapter_with_tokens_of_its_own(cli, wordy, tmp_path):
    folder, ids, logits = wordy
    answer = cli("generate", folder, "One <two> day", "-n", 1, "--dtype", "fp32", "--temperature", 0)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("One <two> day")
    answer = cli("merge", folder, tmp_path / "merged", "--dtype", "fp32")
    assert answer.code == 0, answer.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("One <two> day")["input_ids"] == ids[0].tolist()
    answer = cli("inspect", folder, "--base", BASE)
    assert answer.code == 0, answer.err
    assert "note: its tokenizer has 3074 tokens: the base's embeddings grow to these, from 3072" in answer.out


def test_what_to_do_where_the_tokens_are_not_known(cli, wordy, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "One day"}\n')
    answer = cli("generate", "--adapter", f"a={wordy[0]}", "--prompts", tmp_path / "p.jsonl")
    assert answer.code == 1
    assert "or leave it to a call without --prompts" in answer.err
    alone = tmp_path / "alone"
    shutil.copytree(wordy[0], alone, ignore=shutil.ignore_patterns("tokenizer*"))
    for command in (("generate", alone, "One day"), ("merge", alone, tmp_path / "merged")):
        answer = cli(*command)
        assert answer.code == 1
        assert "or copy the tokenizer it was trained with beside it" in answer.err
        assert len(answer.err.splitlines()) == 1
