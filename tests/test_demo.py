"""The demo's data, its base, and a shortened run. The bar itself is held by the full `make demo`."""

import json
import lzma
import math
from functools import partial

import pytest
import torch

from fastpeft.cli.console import make_console
from fastpeft.demo import BASE, CORPORA, DATA, corpus, pretrain
from fastpeft.demo import run as demo
from fastpeft.demo.run import shortfalls


def texts(name: str, part: str) -> list[str]:
    return [json.loads(line)["text"] for line in corpus(name, part).read_text().splitlines()]


def test_base_is_small_and_was_trained():
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 8e6
    log = json.loads((BASE / "pretraining.json").read_text())
    assert log["tokens_seen"] > 1_000_000
    assert log["heldout_loss"] < 4.5  # log(3072) = 8.03 is what a guess costs


@pytest.mark.parametrize("name", CORPORA)
def test_heldout_documents_are_nowhere_else(name):
    pretraining = lzma.decompress((DATA / "pretrain.txt.xz").read_bytes()).decode()
    train = "\n".join(texts(name, "train"))
    held = texts(name, "heldout")
    assert len(held) >= 10
    for text in held:
        body = text.split("\n\n", 1)[1]
        start = body[:120]  # long enough to be nobody else's words
        assert start not in train
        assert start not in pretraining
    assert not any(text.split("\n\n", 1)[1][:120] in pretraining for text in texts(name, "train"))


def first_documents(folder, name: str, part: str):
    """The beginnings of the first three documents of a part of a corpus, as a file."""
    file = folder / f"{name}.{part}.jsonl"
    documents = [json.loads(line) for line in corpus(name, part).read_text().splitlines()[:3]]
    file.write_text("".join(json.dumps(row | {"text": row["text"][:600]}) + "\n" for row in documents))
    return file


def test_a_short_demo_makes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "corpus", partial(first_documents, tmp_path))
    monkeypatch.setattr(demo, "MEASURE_SECONDS", 0.1)
    monkeypatch.setattr(demo, "BLOCK", 64)
    monkeypatch.setattr(demo, "TOKENS", 12)
    out = tmp_path / "out"
    missed = demo.run(out, steps=3, console=make_console())
    results = json.loads((out / "results.json").read_text())
    assert missed == results["missed"]
    assert set(results["losses"]) == {"base", *CORPORA}
    assert all(2 < loss < 8 for row in results["losses"].values() for loss in row.values())
    assert len(results["texts"]) == 3 * len(demo.PROMPTS)
    for name in CORPORA:
        assert (out / f"{name}-adapter" / "adapter_model.safetensors").exists()
    if results["comparison"]:
        kept = results["comparison"]["saved_bytes"]
        assert kept["fastpeft"] < kept["peft"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "Loss on documents held out" in (out / "results.txt").read_text()
    demo.run(out, steps=1, compare=False, console=make_console())  # a second run replaces the first


def test_shortfalls_hold_both_bars():
    good = {"base": {"scripture": 4.0, "jargon": 4.0}, "scripture": {"scripture": 3.0, "jargon": 4.1}}
    good |= {"jargon": {"scripture": 4.2, "jargon": 3.7}}
    assert shortfalls(good) == []
    worse = good | {"base": {"scripture": 3.1, "jargon": 4.0}}
    assert shortfalls(worse) == ["adapter scripture is 0.100 nats below base on its corpus, not 0.2"]
    assert len(shortfalls(good | {"jargon": {"scripture": 4.2, "jargon": float("nan")}})) == 2


def test_missing_the_bar_fails_the_command(monkeypatch, capsys):
    from fastpeft.cli import main

    monkeypatch.setattr(demo, "run", lambda *_, **__: ["adapter jargon is 0.1 nats below base on its corpus, not 0.2"])
    assert main(["demo"]) == 1
    assert capsys.readouterr().err.startswith("fastpeft demo: adapter jargon")


def test_pretraining_makes_a_model_that_loads(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    some = corpus("jargon", "train").read_text()
    monkeypatch.setattr(pretrain, "documents", lambda: ([some[:40_000], some[40_000:80_000]], [some[80_000:90_000]]))
    for name, value in {"WINDOW": 32, "BATCH": 4, "WARMUP": 5, "PROBE": 2, "VOCABULARY": 400}.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr("sys.argv", ["pretrain", str(tmp_path), "--minutes", "0.001"])
    pretrain.main()
    log = json.loads((tmp_path / "pretraining.json").read_text())
    assert log["steps"] == 10
    assert log["heldout_loss"] < math.log(400)
    text = "a {foo} ž\n"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype is torch.bfloat16
