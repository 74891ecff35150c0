"""fastpeft generate --adapter NAME=FOLDER ... --prompts FILE: each line with its adapter, in order, and resumable."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastpeft import PeftModel
from fastpeft.cli import batch, main, models
from fastpeft.demo import BASE

GREEDY = ("--temperature", 0, "-n", 6, "--dtype", "fp32", "--batch-size", 3)
LINES = [
    {"prompt": "The hacker", "adapter": "a", "id": "first"},
    {"prompt": "And it came to pass in the days of", "adapter": "b"},
    {"prompt": "The king", "adapter": "__base__", "id": None},
    {"prompt": "A computer is", "adapter": "b", "max_new_tokens": 3, "id": 4},
    {"prompt": "", "adapter": "a"},
    {"prompt": "In the beginning", "adapter": "a", "max_new_tokens": 9},
    {"prompt": "The hacker", "adapter": "b"},
]


@pytest.fixture(scope="session")
def second(tmp_path_factory, documents) -> Path:
    """An adapter of another rank on the same base."""
    folder = tmp_path_factory.mktemp("run") / "second"
    options = ["--max-steps", 2, "--batch-size", 2, "--block-size", 32, "--rank", 6, "--dtype", "fp32", "--seed", 3]
    options += ["--lr", 0.05, "--warmup", 0, "--eval-fraction", 0]
    assert main([str(a) for a in ("train", BASE, "--data", documents, "--output", folder, *options)]) == 0
    return folder


@pytest.fixture
def prompts(tmp_path):
    def write(lines=LINES) -> Path:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return file

    return write


@pytest.fixture
def named(adapter, second):
    return ("--adapter", f"a={adapter}", "--adapter", f"b={second}")


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def one_by_one(adapter, second):
    """The completion of a line with its adapter alone on the base: by (prompt, adapter, most tokens)."""

    def complete(prompt, name, most):
        model = models.load_base(str(BASE), "fp32", "cpu")
        tokenizer = models.load_tokenizer(str(BASE))
        folder = {"a": adapter, "b": second}.get(name)
        if folder:
            model = PeftModel.from_pretrained(model, folder).eval()
        inputs = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=most, do_sample=False
        )
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return complete


def test_every_line_gets_its_adapters_text_in_the_order_of_the_lines(cli, named, prompts, tmp_path, one_by_one):
    output = tmp_path / "new" / "out.jsonl"
    answer = cli("generate", *named, "--prompts", prompts(), "--output", output, *GREEDY)
    assert (answer.code, answer.out) == (0, "")
    assert "7/7 prompts" in answer.err
    rows = rows_of(output.read_text())
    assert [row["prompt"] for row in rows] == [line["prompt"] for line in LINES]
    assert [row["adapter"] for row in rows] == [line["adapter"] for line in LINES]
    assert ["id" in row for row in rows] == ["id" in line for line in LINES]
    for row, line in zip(rows, LINES, strict=True):
        assert row["completion"] == one_by_one(line["prompt"], line["adapter"], line.get("max_new_tokens", 6))
    assert rows[0]["completion"] != rows[6]["completion"]  # one prompt, two adapters


def test_without_an_output_the_lines_are_printed(cli, named, prompts):
    answer = cli("generate", *named, "--prompts", prompts(LINES[:2]), *GREEDY)
    assert [row["adapter"] for row in rows_of(answer.out)] == ["a", "b"]
    assert "2/2 prompts" in answer.err


def test_the_only_adapter_need_not_be_named(cli, adapter, prompts):
    answer = cli("generate", "--adapter", f"a={adapter}", "--prompts", prompts([{"prompt": "Once"}]), *GREEDY)
    assert rows_of(answer.out)[0]["adapter"] == "a"


def test_weighted_adapters_in_one_line(cli, named, prompts):
    lines = [{"prompt": "The hacker", "adapter": {"a": 1, "b": 0}}, {"prompt": "The hacker", "adapter": "a"}]
    lines += [{"prompt": "The hacker", "adapter": {"a": 0.5, "b": 0.5}}]
    lines += [{"prompt": "The hacker", "adapter": {"__base__": 1.0, "a": 1}}]
    answer = cli("generate", *named, "--prompts", prompts(lines), *GREEDY)
    first, second, third, with_base = rows_of(answer.out)
    assert first["completion"] == second["completion"] == with_base["completion"]
    assert third["adapter"] == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("cut", "sampled"),
    [  # what is cut off is found before anything is sampled: every cut, and lines kept in either way
        ("whole lines", False),
        ("whole lines", True),
        ("half a line", True),
        ("half a character", False),
        ("nothing", True),
    ],
)
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(cut, sampled, cli, named, prompts, tmp_path):
    """Kept lines stay; the others come out as in a run that nobody killed, sampled ones too."""
    file = prompts([*LINES[:3], {"prompt": "naïve", "adapter": "a", "id": "é"}, *LINES[3:]])
    options = [*named, "--prompts", file, *GREEDY, *(("--temperature", 1.0, "--seed", 5) if sampled else ())]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert cli("generate", *options, "--output", whole).code == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    kept, rest = {
        "whole lines": (lines[:4], b""),
        "half a line": (lines[:4], lines[4][:9]),
        "half a character": (lines[:3], lines[3][: lines[3].index("é".encode()) + 1]),
        "nothing": ([], b""),
    }[cut]
    killed.write_bytes(b"".join(kept) + rest)
    shutil.copy(f"{whole}.run.json", f"{killed}.run.json")
    answer = cli("generate", *options, "--output", killed, "--resume")
    assert answer.code == 0, answer.err
    assert ("going on after" in answer.err) == bool(kept)
    assert killed.read_bytes() == whole.read_bytes()
    again = cli("generate", *options, "--output", killed, "--resume")  # nothing left to do
    assert (again.code, killed.read_bytes()) == (0, whole.read_bytes())


def wait_until_longer(file, size, run):
    """Until `file` has more bytes than that, unless the process ends before."""
    deadline = time.monotonic() + 120
    while run.poll() is None and not (file.exists() and file.stat().st_size > size) and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_run_that_is_really_killed_and_a_second_one_beside_it(cli, named, prompts, tmp_path):
    """A second run does not write where the first still does, and the first goes on; once it is killed, another may."""
    output = tmp_path / "out.jsonl"
    lines = [{**line, "max_new_tokens": 20} for line in LINES * 6]
    options = ["generate", *named, "--prompts", prompts(lines), "--output", output, *GREEDY]
    command = [sys.executable, "-m", "fastpeft.cli", *map(str, options)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], env=os.environ, stderr=subprocess.DEVNULL) as first:
        wait_until_longer(output, 0, first)
        first.send_signal(signal.SIGSTOP)
        size = output.stat().st_size
        try:
            second = cli(*options, "--resume")
        finally:
            first.send_signal(signal.SIGCONT)
        wait_until_longer(output, size, first)
        first.send_signal(signal.SIGKILL)
    assert (second.code, second.err.count("\n")) == (2, 1)
    assert f"{output} is being written to by another run: wait for its end" in second.err
    before = output.read_bytes()
    assert len(before) > size
    assert 0 < before.count(b"\n") < len(lines)
    assert cli(*options, "--resume").code == 0
    assert output.read_bytes().startswith(before)
    assert [row["prompt"] for row in rows_of(output.read_text())] == [line["prompt"] for line in lines]


def test_what_changed_since_the_file_was_begun_is_named(cli, named, adapter, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    options = ["generate", *named, "--prompts", prompts(), "--output", output, *GREEDY]
    assert cli(*options).code == 0
    before = output.read_bytes()
    assert "--resume" in cli(*options).err  # it is there: nothing is written over
    for changed, said in (
        ([*options, "--resume", "--top-k", 3], "--top-k changed since"),
        ([*options[:2], f"a={adapter.parent / 'other'}", *options[3:], "--resume"], "adapter a changed since"),
    ):
        shutil.copytree(adapter, adapter.parent / "other", dirs_exist_ok=True)
        weights = adapter.parent / "other" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes() + b" ")
        answer = cli(*changed)
        assert answer.code == 2
        assert said in answer.err
    prompts([*LINES, LINES[0]])
    answer = cli(*options, "--resume")
    assert answer.code == 2
    assert "the prompts file changed since" in answer.err
    prompts()
    Path(f"{output}.run.json").unlink()
    assert "cannot be read: give another file" in cli(*options, "--resume").err
    assert output.read_bytes() == before


def test_results_of_other_prompts_are_not_gone_on_with(cli, named, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    options = ["generate", *named, "--prompts", prompts(), "--output", output, *GREEDY]
    assert cli(*options).code == 0
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join([lines[0], lines[2], lines[1]]))
    assert "line 2 is not that prompt's result" in cli(*options, "--resume").err


def test_a_file_that_is_not_of_this_run_is_never_written_over(cli, named, prompts, tmp_path):
    """Where the record belongs may lie anything, even the prompts."""
    record = prompts(LINES[:2]).rename(tmp_path / "out.run.json")
    before = record.read_bytes()
    for resume in ([], ["--resume"]):
        answer = cli("generate", *named, "--prompts", record, "--output", tmp_path / "out", *GREEDY, *resume)
        assert answer.code == 2
        assert "give another file with --output" in answer.err
        assert record.read_bytes() == before
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_runs_with_one_output_the_later_one_stops(resume, cli, named, prompts, tmp_path, monkeypatch):
    """The other one writes all its lines while this one loads its model."""
    output, load_base = tmp_path / "out", batch.load_base
    options = ["generate", *named, "--prompts", prompts(LINES[:2]), "--output", output, *GREEDY]
    if resume:
        assert cli(*options).code == 0
        whole = output.read_bytes()
        output.write_bytes(whole.splitlines(keepends=True)[0])
        options.append("--resume")

    def other_run_first(*arguments):
        monkeypatch.setattr(batch, "load_base", load_base)
        assert main([str(option) for option in options]) == 0
        return load_base(*arguments)

    monkeypatch.setattr(batch, "load_base", other_run_first)
    answer = cli(*options)
    assert answer.code == 2
    assert ("was changed while this run went on" if resume else "was made by somebody else") in answer.err
    assert len(rows_of(output.read_text())) == 2
    assert cli(*options, "--resume").code == 0  # and it can be gone on with


def test_where_no_file_can_be_is_said_before_the_model_is_loaded(cli, named, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "load_base", None)
    file = prompts(LINES[:2])
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.run.json").mkdir()
    for output, said in (("folder", "is a folder"), ("x", "is a folder"), ("prompts.jsonl/x", "is a file and not")):
        answer = cli("generate", *named, "--prompts", file, "--output", tmp_path / output, *GREEDY)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert said in answer.err


@pytest.fixture
def bare_base(tmp_path):
    """The base, its tokenizer without tokens for the beginning, the end and the padding of a text."""
    folder = tmp_path / "bare"
    shutil.copytree(BASE, folder)
    for file in folder.glob("*.json"):
        if file.name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"):
            special = [f"{what}_token{end}" for what in ("pad", "eos", "bos") for end in ("", "_id")]
            found = {key: value for key, value in json.loads(file.read_text()).items() if key not in special}
            file.write_text(json.dumps(found))
    return folder


def test_a_tokenizer_without_special_tokens(cli, named, prompts, bare_base):
    assert models.load_tokenizer(str(bare_base)).pad_token_id is None
    answer = cli("generate", *named, "--base", bare_base, "--prompts", prompts(LINES[:2]), *GREEDY)
    assert answer.code == 0, answer.err
    assert [row["prompt"] for row in rows_of(answer.out)] == [line["prompt"] for line in LINES[:2]]
    answer = cli("generate", *named, "--base", bare_base, "--prompts", prompts([LINES[0], LINES[4]]), *GREEDY)
    assert (answer.code, answer.out) == (2, "")
    assert "line 2: no token to go on from" in answer.err


def test_another_base_in_the_same_folder_is_not_gone_on_with(cli, named, prompts, bare_base, tmp_path):
    options = [*named, "--base", bare_base, "--prompts", prompts(LINES[:2]), "--output", tmp_path / "out", *GREEDY]
    assert cli("generate", *options).code == 0
    config = bare_base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    answer = cli("generate", *options, "--resume")
    assert answer.code == 2
    assert "the base changed since" in answer.err


@pytest.mark.parametrize(
    ("options", "resumable"),
    [(("--prompts=p", "--output=o"), True), (("--prompts", "p", "-o", "o"), True), (("--prompts", "p"), False)],
)
def test_who_is_stopped_hears_whether_the_run_can_go_on(options, resumable, cli, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "generate_batch", stop)
    answer = cli("generate", "--adapter", "a=x", *options)
    assert answer.code == 130
    assert ("--resume goes on" in answer.err) is resumable


BAD_LINES = [
    ("not json", "not JSON"),
    ("[1]", 'expected a JSON object with "prompt"'),
    ({"adapter": "a"}, 'expected a JSON object with "prompt"'),
    ({"prompt": 3}, 'expected a JSON object with "prompt"'),
    ({"prompt": "Once"}, "does not say which adapter it takes"),
    ({"prompt": "Once", "adapter": "c"}, "no adapter 'c'; there are 'a', 'b' or __base__"),
    ({"prompt": "Once", "adapter": "x" * 10_000}, "no adapter 'xxx"),
    ({"prompt": "Once", "adapter": {}}, '"adapter" must be a name'),
    ({"prompt": "Once", "adapter": ["a"]}, '"adapter" must be a name'),
    ({"prompt": "Once", "adapter": {"a": "much"}}, "the weight of adapter 'a' must be a finite number"),
    ({"prompt": "Once", "adapter": {"a": float("nan")}}, "the weight of adapter 'a' must be a finite number"),
    ({"prompt": "Once", "adapter": {"c": 1.0}}, "no adapter 'c'"),
    ({"prompt": "Once", "adapter": "a", "top": 3}, "no key is called 'top'; there are prompt, adapter, id"),
    ({"prompt": "Once", "adapter": "a", "max_new_tokens": 0}, "max_new_tokens must be a whole number from 1, got 0"),
    ({"prompt": "Once", "adapter": "a", "max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
    ({"prompt": "Once", "adapter": "a", "temperature": "hot"}, "temperature must be a number from 0"),
    ({"prompt": "Once", "adapter": "a", "temperature": float("inf")}, "temperature must be a number from 0"),
    ({"prompt": "Once", "adapter": "a", "top_p": True}, "top_p must be a number from 0.01 to 1"),
    ({"prompt": "Once", "adapter": "a", "id": "\ud800"}, "it has half of a surrogate pair"),
    ({"prompt": "\udfff", "adapter": "a"}, "it has half of a surrogate pair"),
    ({"prompt": "Once", "adapter": "a", "id": float("nan")}, '"id" must be JSON, which NaN and Infinity are not'),
    ({"prompt": "Once", "adapter": "a", "id": {"x": [float("inf")]}}, '"id" must be JSON, which NaN and Infinity are'),
    ('{"prompt": "Once", "adapter": "a", "id": 1e999}', '"id" must be JSON, which NaN and Infinity are not, got Inf'),
    ({"prompt": "Once", "adapter": {"a": 10**400}}, "the weight of adapter 'a' must be a finite number, got 1000"),
    ({"prompt": "Once", "adapter": "a", "temperature": 10**400}, "temperature must be a number from 0, got 1000"),
    ({"prompt": "Once", "adapter": "a", "max_new_tokens": 10**400}, "max_new_tokens must be a whole number from 1"),
    ({"prompt": "Once", "adapter": "a", "max_new_tokens": 5000}, "the model reads 1024 tokens: "),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=[said for _, said in BAD_LINES])
def test_a_line_that_cannot_be_used_is_named_before_anything_is_written(line, said, cli, named, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    answer = cli("generate", *named, "--prompts", prompts([LINES[0], "", line]), "--output", output)
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert "prompts.jsonl, line 3: " in answer.err
    assert said in answer.err
    assert len(answer.err) < 500
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--adapter", "a=ADAPTER"), 2, "--adapter NAME=FOLDER and --prompts FILE.jsonl go together"),
        (("--prompts", "PROMPTS"), 2, "--adapter NAME=FOLDER and --prompts FILE.jsonl go together"),
        (("--adapter", "ADAPTER", "--prompts", "PROMPTS"), 2, "expected NAME=FOLDER"),
        (("--adapter", "__base__=ADAPTER", "--prompts", "PROMPTS"), 2, "choose another name"),
        (("--adapter", "a=ADAPTER", "--adapter", "a=ADAPTER", "--prompts", "PROMPTS"), 2, "'a' is there twice"),
        (("--adapter", "a=missing", "--prompts", "PROMPTS"), 2, "no adapter folder"),
        (("--adapter", "a=ADAPTER", "--prompts", "missing"), 2, "no prompts file"),
        (("--adapter", "a=ADAPTER", "--prompts", "empty"), 2, "holds no prompt"),
        (("--adapter", "a=ADAPTER", "--prompts", "PROMPTS", "ADAPTER"), 2, "cannot be used with --prompts"),
        (("--adapter", "a=ADAPTER", "--prompts", "PROMPTS", "--no-adapter"), 2, "--no-adapter cannot be used"),
        (("--adapter", "a=ADAPTER", "--prompts", "PROMPTS", "--samples", "2"), 2, "--samples cannot be used"),
        (("--adapter", "a=ADAPTER", "--prompts", "PROMPTS", "--resume"), 2, "name it with --output"),
        (("--adapter", "a.b=ADAPTER", "--prompts", "PROMPTS"), 1, "cannot be used"),
        (("--adapter", "a=ADAPTER", "--prompts", "PROMPTS", "--no-stream"), 2, "--no-stream cannot be used"),
        (("--adapter", "a=ADAPTER", "--prompts", "PROMPTS", "--stream"), 2, "--stream and --no-stream cannot be used"),
        (
            ("--adapter", "a=ADAPTER", "--prompts", "PROMPTS", "--temperature", "inf"),
            2,
            "--temperature must be a number",
        ),
        (
            ("ADAPTER", "Hello", "--repetition-penalty", "inf"),
            2,
            "--repetition-penalty must be a number from 0.01, got",
        ),
        (("ADAPTER", "Hello", "--batch-size", "7"), 2, "--batch-size goes with --prompts"),
        (("ADAPTER", "Hello", "--resume"), 2, "--resume goes with --prompts"),
        ((), 2, "no adapter: give its folder"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, code, said, cli, adapter, prompts, tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    file = prompts([{"prompt": "Once", "adapter": "__base__"}])
    replaced = [a.replace("ADAPTER", str(adapter)).replace("PROMPTS", str(file)) for a in arguments]
    replaced = [str(tmp_path / a) if a == "empty" else a for a in replaced]
    answer = cli("generate", *replaced)
    assert answer.code == code
    assert said in answer.err
    assert answer.err.count("\n") == 1


def test_adapters_of_two_bases_are_told_apart(cli, adapter, second, copy_of, prompts, tmp_path):
    shutil.copytree(BASE, tmp_path / "elsewhere")
    moved = copy_of(second, base_model_name_or_path=str(tmp_path / "elsewhere"))
    options = ("--adapter", f"a={adapter}", "--adapter", f"b={moved}", "--prompts", prompts(LINES[:2]))
    answer = cli("generate", *options)
    assert answer.code == 2
    assert "name the base of both with --base" in answer.err
