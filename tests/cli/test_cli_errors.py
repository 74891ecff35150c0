"""Every wrong argument ends in one line that says what to do."""

import json
import os
import subprocess
import sys

import pytest

from fastpeft.cli import app, main
from fastpeft.cli.errors import CommandError
from fastpeft.cli.train import numbers
from fastpeft.demo import BASE

OPTIONS = ("--max-steps", 1, "--batch-size", 1, "--block-size", 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory, adapter):
    """A folder of things that are wrong, each under the name that says how."""
    root = tmp_path_factory.mktemp("wrong")
    (root / "good.txt").write_text("Some words to learn.\n\nAnd some more of them, for the end.\n")
    (root / "long.txt").write_text("Some words to learn. " * 1000)
    (root / "empty.txt").write_text("")
    (root / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (root / "number.jsonl").write_text('{"prompt": "One day"}\n{"prompt": 5}\n')
    (root / "latin.txt").write_bytes("café".encode("latin-1"))
    (root / "good.csv").write_text("a,b\n")
    (root / "file").write_text("x")
    (root / "folder").mkdir()
    (root / "full").mkdir()
    (root / "full" / "something").write_text("x")
    for name in ("no_weights", "bad_config", "truncated", "other_rank", "no_type"):
        (root / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (root / name / file).write_bytes((adapter / file).read_bytes())
    (root / "no_weights" / "adapter_model.safetensors").unlink()
    (root / "bad_config" / "adapter_config.json").write_text("{")
    (root / "no_type" / "adapter_config.json").write_text("{}")
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (root / "truncated" / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"r": 5}
    (root / "other_rank" / "adapter_config.json").write_text(json.dumps(config))
    (root / "broken_model").mkdir()
    (root / "broken_model" / "config.json").write_text("{")
    (root / "no_model_weights").mkdir()
    for file in BASE.iterdir():
        if file.suffix == ".json":
            (root / "no_model_weights" / file.name).write_bytes(file.read_bytes())
    return root


def training(*, base="BASE", data="good.txt", output="new", more=()):
    return ("train", base, "--data", data, "--output", output, *OPTIONS, *more)


WRONG = [
    # command line, exit code, words of the message
    (("nonsense",), 2, "No such command"),
    (("train",), 2, "Missing"),
    (("train", "BASE"), 2, "--data"),
    (training(more=("--rank", 0)), 2, "--rank"),
    (training(more=("--rank", "many")), 2, "--rank"),
    (training(more=("--dropout", 1.5)), 2, "--dropout"),
    (training(more=("--speed", 9)), 2, "No such option"),
    (training(more=("--bias", "some")), 2, "--bias"),
    (training(more=("--layers", "a-b")), 2, "0-3,8"),
    (training(more=("--layers", "3-1", "--target-modules", "q_proj")), 2, "must ascend, as 1-3"),
    (training(more=("--layers", 99)), 2, "give --target-modules too"),
    (training(more=("--layers", 99, "--target-modules", "q_proj")), 2, "these LoRA options do not fit"),
    (training(more=("--epochs", 0, "--max-steps", 0)), 2, "--max-steps"),
    (("train", "BASE", "--data", "good.txt", "--output", "new", "--epochs", 0), 2, "--epochs 0 trains nothing"),
    (("train", "BASE", "--data", "long.txt", "--output", "new", "--block-size", 1025), 2, "add --block-size 1024"),
    (training(more=("--rank-pattern", "{q: 1}")), 2, "--rank-pattern takes a JSON object"),
    (training(more=("--target-modules", "q_prj")), 2, "q_prj"),
    (training(more=("--target-modules", "re:((")), 2, "no regular expression"),
    (training(more=("--optimizer", "magic")), 2, "magic"),
    (training(more=("--optimizer", "adamw_anyprecision")), 2, "--optimizer adamw_anyprecision cannot be used here"),
    (training(more=("--device", "abacus")), 2, "no device is called 'abacus'"),
    *((training(more=("--device", d)), 2, f"--device {d} cannot be used here") for d in ("mps:9", "meta", "xpu:9")),
    (training(more=("--epochs", "inf")), 2, "--epochs must be a finite number"),
    (training(more=("--learning-rate", "inf")), 2, "--learning-rate must be a finite number"),
    (training(more=("--weight-decay", "inf")), 2, "--weight-decay must be a finite number"),
    (training(more=("--seed", 99999999999)), 2, "--seed"),
    (training(more=("--revision", "main")), 2, "goes with a hub id"),
    (training(more=("--load-best", "--eval-fraction", 0)), 2, "--load-best needs something"),
    (training(more=("--eval-steps", 3, "--eval-fraction", 0)), 2, "--eval-steps needs something"),
    (training(more=("--load-best", "--eval-steps", 2, "--save-steps", 3)), 2, "do not fit together"),
    (training(more=("--resume",)), 2, "nothing to resume"),
    (training(output="full", more=("--resume", "--overwrite")), 2, "contradict"),
    (training(base="./missing"), 2, "no folder './missing'"),
    (training(base="folder"), 2, "holds no model"),
    (training(base="file"), 2, "is a file"),
    (training(base="no_type"), 2, "holds an adapter"),
    (training(base="broken_model"), 1, "broken_model"),
    (training(base="no_model_weights"), 1, "no_model_weights"),
    (training(base="owner/model"), 1, "could not be fetched from the hub"),
    (training(data="missing.txt"), 2, "no data at"),
    (training(data="empty.txt"), 2, "holds no text"),
    (training(data="bad.jsonl"), 2, "line 2 is not JSON"),
    (training(data="good.csv"), 2, "data files end in"),
    (training(data="folder"), 2, "no .txt and no .jsonl"),
    (training(output="full"), 2, "not empty"),
    (training(output="file"), 2, "is a file"),
    (training(output="file/below"), 2, "cannot be made, for"),
    (("generate", "missing", "Hello"), 2, "no adapter folder"),
    (("generate", "folder", "Hello"), 2, "no adapter_config.json"),
    (("generate", "BASE", "Hello"), 2, "a whole model, not an adapter"),
    (("generate", "no_weights", "Hello"), 2, "no weights"),
    (("generate", "bad_config", "Hello"), 2, "is not JSON"),
    (("generate", "no_type", "Hello"), 2, "names no peft_type"),
    (("generate", "truncated", "Hello"), 1, "truncated"),
    (("generate", "other_rank", "Hello"), 1, "other_rank"),
    (("generate", "ADAPTER"), 2, "no prompt"),
    (("generate", "ADAPTER", "--prompts-file", "missing"), 2, "no prompts file"),
    (("generate", "ADAPTER", "--prompts-file", "empty.txt"), 2, "holds no prompt"),
    (("generate", "ADAPTER", "--prompts-file", "bad.jsonl"), 2, "line 1"),
    (("generate", "ADAPTER", "--prompts-file", "number.jsonl"), 2, "number.jsonl, line 2: expected"),
    (("generate", "ADAPTER", "--prompts-file", "latin.txt"), 2, "latin.txt is not UTF-8 text (byte 3)"),
    (("generate", "ADAPTER", "Hello", "--seed", 99999999999), 2, "--seed"),
    (("generate", "ADAPTER", "Hello", "--device", "meta"), 2, "--device meta cannot be used here"),
    (("generate", "ADAPTER", "Hello", "--max-new-tokens", 5000), 2, "shorten one of them"),
    (("generate", "ADAPTER", "Hello", "--output", "file"), 2, "exists"),
    (("generate", "ADAPTER", "Hello", "--top-p", 3), 2, "--top-p"),
    (("merge", "ADAPTER"), 2, "OUTPUT"),
    (("merge", "ADAPTER", "full"), 2, "not empty"),
    (("merge", "missing", "new"), 2, "no adapter folder"),
    (("merge", "ADAPTER", "new", "--shard-size", "big"), 2, "--shard-size takes a number"),
    (("merge", "truncated", "new"), 1, "truncated"),
    (("inspect", "missing"), 2, "no adapter folder"),
    (("inspect", "truncated"), 1, "cannot be read"),
    (("inspect", "ADAPTER", "--base", "folder"), 2, "holds no model"),
    (("inspect", "ADAPTER", "--base", "broken_model"), 1, "broken_model"),
    (("bench", "speed"), 2, "no suite is called speed"),
    (("bench", "peers"), 1, "nothing was measured: peers needs a CUDA device, and liger_kernel or unsloth: the device"),
    (("bench", "--output", "file"), 2, "is a file"),
    (("bench", "--threads", 0), 2, "--threads"),
    (("demo", "--output", "file"), 2, "is a file"),
    (("demo", "--steps", 0), 2, "--steps"),
]


@pytest.mark.parametrize(("command", "code", "words"), WRONG, ids=[f"{i}-{row[0][0]}" for i, row in enumerate(WRONG)])
def test_one_line_and_no_traceback(command, code, words, cli, place, adapter, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    answer = cli(*({"BASE": BASE, "ADAPTER": adapter}.get(a, a) for a in command))
    assert answer.code == code, answer.err
    assert words in answer.err
    assert len(answer.err.strip().splitlines()) == 1, answer.err
    assert answer.err.startswith("fastpeft")
    assert sorted(place.rglob("*")) == before, "a refused command left something behind"


@pytest.mark.parametrize(("text", "layers"), [("1-1", [1]), ("0-2, 2,5", [0, 1, 2, 5]), ("1,1", [1])])
def test_layers(text, layers):
    assert numbers(text) == layers


@pytest.mark.parametrize("text", ["", "-1", "1-", "1--2", "1-2-3", "1,", "²", "3-1"])
def test_no_layers(text):
    with pytest.raises(CommandError, match="--layers"):
        numbers(text)


@pytest.mark.parametrize("name", ["train", "generate", "merge", "inspect", "bench", "demo"])
def test_help_shows_examples(name, cli):
    answer = cli(name, "--help")
    assert answer.code == 0
    assert f"fastpeft {name}" in answer.out.split("Examples:")[1]


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("FASTPEFT_DEBUG", "0")
    with pytest.raises(Exception, match="no adapter folder"):
        main(["--debug", "inspect", "missing"])


def test_unforeseen_errors_are_one_line_too(cli, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("fastpeft.cli.report.describe", fail)
    answer = cli("inspect", "anything")
    assert answer.code == 1
    assert answer.err == "fastpeft inspect: RuntimeError: first second (--debug before the command shows where)\n"


def test_interrupt(cli, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastpeft.cli.training.train", stop)
    answer = cli("train", BASE, "--data", "x", "--output", "y")
    assert answer.code == 130
    assert "--resume goes on if a first step was done" in answer.err


def test_real_process(tmp_path):
    """The console entry: version, a usage error on stderr with code 2, nothing heavy imported for --help."""
    run = lambda *a: subprocess.run([sys.executable, *a], capture_output=True, text=True, cwd=tmp_path, env=os.environ)  # noqa: E731
    assert run("-m", "fastpeft.cli", "--version").stdout.startswith("fastpeft ")
    wrong = run("-m", "fastpeft.cli", "inspect", "nothing-here")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.startswith("fastpeft inspect: no adapter folder")
    code = "import sys; from fastpeft.cli import main; main(['train', '--help']); "
    assert run("-c", code + "print({'torch', 'transformers'} & {*sys.modules})").stdout.strip().endswith("set()")


def test_commands_are_those_of_the_readme():
    assert [c.name for c in app.registered_commands] == ["train", "generate", "merge", "inspect", "bench", "demo"]
