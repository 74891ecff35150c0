"""The files of an adapter: saves that are killed or fail at any step, and files that are damaged."""

import itertools
import os
import pickle
import shutil
import signal
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpeft import adapter_files
from fastpeft.checkpoint import (
    adapter_folder,
    load_peft_weights,
    read_adapter_files,
    reseal_adapter,
    save_adapter_files,
)
from fastpeft.config import PeftConfig
from fastpeft.sealed_file import AdapterFileError, MixedAdapterError, read_seal, read_tensors, seal_of
from fastpeft.tuners.lora.config import LoraConfig

KEY = "base_model.model.q.lora_A.weight"
FILES = {"adapter_config.json", "adapter_model.safetensors"}


def adapter(value, **options):
    """A config and weights that go together: both tell `value`."""
    return LoraConfig(lora_alpha=value, **options), {KEY: torch.full((2, 3), float(value))}


def value_in(folder):
    """Which adapter a folder holds; fails unless config and weights agree."""
    config, tensors = read_adapter_files(folder)
    assert tensors[KEY].unique().tolist() == [config.lora_alpha]
    return config.lora_alpha


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def write_as_reference_peft(folder, value):
    from safetensors.torch import save_file

    config, tensors = adapter(value)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config.to_json())
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# ---- killed at every step ----

STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.listdir", "os.scandir"}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="saves are killed in forked processes")


def interrupt(step, how, action):
    """Run `action` in a process of its own and kill it, or fail with an OSError, just before its file operation `step`.

    Returns "killed"; "failed" or "survived" the OSError; "untouched" if the action has fewer steps than that.
    """
    child = os.fork()
    if child == 0:
        left = step

        def count(event, args):
            nonlocal left
            if event in STEPS:
                left -= 1
                if left == -1 and how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if left == -1:
                    raise OSError(28, "no space left on device")

        sys.addaudithook(count)
        code = 1
        try:
            action()
            code = 0 if left >= 0 else 2
        except Exception:  # torch turns an OSError into errors of its own
            code = 3 if left < 0 else 1
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return "killed"
    assert os.WEXITSTATUS(status) != 1, "the save failed by itself"
    return {0: "untouched", 2: "survived", 3: "failed"}[os.WEXITSTATUS(status)]


def prepare(folder, before):
    if before == "peft":
        write_as_reference_peft(folder, 1)
    elif before is not None:
        save_adapter_files(folder, *adapter(1), safe_serialization=before == "safetensors")


@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        *itertools.product([None, "safetensors", "bin", "peft"], ["safetensors", "bin"], ["kill"]),
        *itertools.product(["safetensors"], ["safetensors", "bin"], ["fail"]),
    ],
)
def test_an_interrupted_save_leaves_the_old_adapter_or_the_new_one(tmp_path, before, after, how):
    safe = after == "safetensors"
    save_adapter_files(tmp_path / "warm", *adapter(0), safe_serialization=safe)  # an import is no step of a save
    seen = []
    for step in range(100):
        folder = tmp_path / f"{step}"
        prepare(folder, before)
        outcome = interrupt(step, how, partial(save_adapter_files, folder, *adapter(2), safe_serialization=safe))
        found = value_in(folder) if before or adapter_files.find_config(folder) else None
        seen.append(found)
        if outcome == "untouched":
            break
        if outcome == "survived":
            assert found == 2
        if outcome == "failed" and found == 1 and "adapter_model.bin" not in names_in(folder):  # before any rename
            assert names_in(folder) == FILES, "left its scraps"
        # whatever was left behind, the next save makes good
        save_adapter_files(folder, *adapter(3))
        assert value_in(folder) == 3
        assert {name for name in names_in(folder) if not name.startswith(".fastpeft-save-")} == FILES
    old = None if before is None else 1
    assert outcome == "untouched"
    assert step > 8, "the steps of the save were not seen"
    assert set(seen) == {old, 2}
    if how == "kill":
        assert seen == [old] * seen.count(old) + [2] * seen.count(2)  # from some step on it is the new one, for good


def test_an_interrupt_right_after_the_first_rename_loses_nothing(tmp_path, monkeypatch):
    save_adapter_files(tmp_path, *adapter(1))
    rename = os.replace

    def interrupted(*args):
        rename(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter_files(tmp_path, *adapter(2))
    assert value_in(tmp_path) == 2


def state_between_the_renames(folder):
    """A folder whose save was killed after the weights and before the config were put in place."""
    for step in range(100):
        shutil.rmtree(folder)
        save_adapter_files(folder, *adapter(1))
        assert interrupt(step, "kill", partial(save_adapter_files, folder, *adapter(2))) == "killed", "no such state"
        if read_tensors(folder / "adapter_model.safetensors")[0][KEY][0, 0] == 2:
            break
    assert PeftConfig.from_json_file(folder / "adapter_config.json")["lora_alpha"] == 1
    return next(folder.glob(".fastpeft-save-*"))


def test_between_the_renames_every_reader_sees_the_new_pair(tmp_path):
    state_between_the_renames(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).lora_alpha == 2
    assert load_peft_weights(tmp_path, device="cpu")[KEY][0, 0] == 2
    assert value_in(tmp_path) == 2


def test_between_the_renames_without_the_hidden_folder_the_mixed_pair_is_named(tmp_path):
    """As when only the visible files were copied."""
    stage = state_between_the_renames(tmp_path)
    for path in [*stage.iterdir()]:
        path.unlink()
    stage.rmdir()
    for read in (lambda: load_peft_weights(tmp_path, device="cpu"), lambda: read_adapter_files(tmp_path)):
        with pytest.raises(MixedAdapterError, match="lora_alpha was 2 and is 1") as raised:
            read()
        assert "adapter_model.safetensors" in str(raised.value)
        assert "reseal_adapter" in str(raised.value)


def test_the_config_alone_can_be_saved_after_a_killed_save(tmp_path):
    state_between_the_renames(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.base_model_name_or_path = "moved"
    config.save_pretrained(tmp_path)
    assert names_in(tmp_path) == FILES
    assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "moved"
    assert value_in(tmp_path) == 2


def test_what_reference_peft_writes_over_a_killed_save_counts(tmp_path):
    state_between_the_renames(tmp_path)
    write_as_reference_peft(tmp_path / "theirs", 7)
    for name in FILES:
        os.replace(tmp_path / "theirs" / name, tmp_path / name)
    assert value_in(tmp_path) == 7
    adapter_files.finish_interrupted_save(tmp_path)
    assert value_in(tmp_path) == 7
    assert not list(tmp_path.glob(".fastpeft-save-*"))


def test_scraps_of_killed_saves_are_removed_when_they_are_old(tmp_path):
    save_adapter_files(tmp_path, *adapter(1))
    young, old = tmp_path / ".fastpeft-save-young", tmp_path / ".fastpeft-save-old"
    for stage in (young, old):
        stage.mkdir()
        (stage / "adapter_model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    save_adapter_files(tmp_path, *adapter(2))
    assert young.exists()  # perhaps a save that runs in another process
    assert not old.exists()


# ---- ordinary saves ----


@pytest.mark.parametrize("safe", [True, False])
def test_a_save_leaves_the_files_of_the_format_and_nothing_else(tmp_path, safe):
    (tmp_path / "tokenizer.json").write_text("mine")
    save_adapter_files(tmp_path, *adapter(1), safe_serialization=not safe)
    save_adapter_files(tmp_path, *adapter(2), safe_serialization=safe)
    weights = "adapter_model.safetensors" if safe else "adapter_model.bin"
    assert names_in(tmp_path) == {"adapter_config.json", weights, "tokenizer.json"}
    assert value_in(tmp_path) == 2
    modes = {(tmp_path / name).stat().st_mode for name in (weights, "tokenizer.json", "adapter_config.json")}
    assert len(modes) == 1  # safetensors alone would make a file that only its owner can read


@pytest.mark.parametrize("safe", [True, False])
def test_equal_adapters_give_equal_files(tmp_path, safe, monkeypatch):
    for name, time in (("a", 1e9), ("b", 1.5e9), ("c", 1.7e9)):
        monkeypatch.setattr("time.time", lambda time=time: time)
        save_adapter_files(tmp_path / name, *adapter(1, target_modules=["q", "v", "k"]), safe_serialization=safe)
    for name in names_in(tmp_path / "a"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1


def test_shared_strided_and_odd_tensors_are_stored_by_value(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": whole,
        "b": whole,
        "t": whole.t(),
        "part": whole[1:],
        "parameter": torch.nn.Parameter(whole.clone()),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "fp8": torch.ones(3).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    for safe in (True, False):
        folder = tmp_path / str(safe)
        save_adapter_files(folder, LoraConfig(), tensors, safe_serialization=safe)
        _, loaded = read_adapter_files(folder)
        assert loaded.keys() == tensors.keys()
        for key, value in loaded.items():
            assert value.dtype == tensors[key].dtype
            assert torch.equal(value, tensors[key].detach()), key


def test_what_is_no_whole_tensor_is_refused(tmp_path):
    save_adapter_files(tmp_path, *adapter(1))
    with pytest.raises(TypeError, match="note is a str; an adapter file takes whole tensors"):
        save_adapter_files(tmp_path, LoraConfig(), {"note": "text"})
    assert value_in(tmp_path) == 1


def test_a_changed_config_is_named_and_can_be_accepted(tmp_path):
    for safe in (True, False):
        save_adapter_files(tmp_path, *adapter(1), safe_serialization=safe)
        LoraConfig(lora_alpha=1, base_model_name_or_path="moved", inference_mode=True).save_pretrained(tmp_path)
        assert value_in(tmp_path) == 1  # bookkeeping may change
        LoraConfig(lora_alpha=16, use_rslora=True).save_pretrained(tmp_path)
        with pytest.raises(MixedAdapterError, match="lora_alpha was 1 and is 16; use_rslora was False and is True"):
            load_peft_weights(tmp_path, device="cpu")
        assert load_peft_weights(tmp_path, device="cpu", check_config=False)[KEY][0, 0] == 1
        reseal_adapter(tmp_path)
        config, tensors = read_adapter_files(tmp_path)
        assert (config.lora_alpha, tensors[KEY][0, 0]) == (16, 1)
    LoraConfig().save_pretrained(tmp_path / "empty")
    with pytest.raises(AdapterFileError, match="no weights"):
        reseal_adapter(tmp_path / "empty")


def test_write_text_replaces_or_keeps(tmp_path, monkeypatch):
    path = tmp_path / "card" / "README.md"
    adapter_files.write_text(path, "one")
    adapter_files.write_text(path, "two")
    assert path.read_text() == "two"

    def broken(*args):
        raise OSError("disk")

    monkeypatch.setattr(adapter_files.os, "replace", broken)
    with pytest.raises(OSError, match="disk"):
        adapter_files.write_text(path, "three")
    assert names_in(path.parent) == {"README.md"}
    assert path.read_text() == "two"


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "a/../..", ".", "", "a/../../b"])
def test_an_adapter_name_cannot_lead_out_of_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of"):
        adapter_folder(tmp_path, name)


def test_adapter_folders(tmp_path):
    assert adapter_folder(tmp_path, "default") == tmp_path
    assert adapter_folder(str(tmp_path), "b") == tmp_path / "b"
    assert adapter_folder("out", "group/b") == Path("out/group/b")


# ---- damaged and hostile files ----


def weights_of(folder, safe):
    save_adapter_files(folder, *adapter(1), safe_serialization=safe)
    return folder / ("adapter_model.safetensors" if safe else "adapter_model.bin")


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1])
def test_a_truncated_file_is_named(tmp_path, safe, keep):
    path = weights_of(tmp_path, safe)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterFileError, match="is not a readable adapter") as raised:
        load_peft_weights(tmp_path, device="cpu")
    assert str(path) in str(raised.value)


def test_a_header_larger_than_its_file(tmp_path):
    path = weights_of(tmp_path, True)
    content = path.read_bytes()
    for length in (len(content), 2**40, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(AdapterFileError, match="not a readable adapter"):
            read_tensors(path)


@pytest.mark.parametrize("safe", [True, False])
@given(data=st.data())
def test_damage_never_loads_as_something_else(tmp_path_factory, safe, data):
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    path = weights_of(folder, safe)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["flip", "cut", "drop", "insert"]))
    if damage == "flip":
        content[position] ^= data.draw(st.integers(1, 255))
    elif damage == "cut":
        del content[position:]
    elif damage == "drop":
        del content[position]
    else:
        content[position:position] = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(content)
    try:
        tensors = load_peft_weights(folder, device="cpu")
    except AdapterFileError:
        return
    assert list(tensors) == [KEY]
    assert torch.equal(tensors[KEY], torch.ones(2, 3))


class _Attack:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.bin"
    for write in (lambda: torch.save({"a": _Attack()}, path), lambda: path.write_bytes(pickle.dumps({"a": _Attack()}))):
        write()
        with pytest.raises(AdapterFileError, match=r"adapter_model\.bin .*is not a readable adapter") as refusal:
            load_peft_weights(tmp_path, device="cpu")
        assert "could run code" in str(refusal.value)
        assert "weights_only" not in str(refusal.value)  # torch's text says how to run it all the same
    assert not (tmp_path / "pwned").exists()


def test_files_that_hold_something_else(tmp_path):
    path = tmp_path / "adapter_model.bin"
    for content, message in [
        ([torch.ones(1)], "should hold a dict of tensors, but holds a list"),
        ({"a": 1}, "'a' is a int"),
        ({1: torch.ones(1)}, "1 is a Tensor"),
    ]:
        torch.save(content, path)
        with pytest.raises(AdapterFileError, match=message):
            read_tensors(path)
    with pytest.raises(AdapterFileError, match="there is no weights file"):
        read_tensors(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    config, tensors = adapter(1)
    tensors[KEY] = tensors[KEY].to(dtype)
    tensors[KEY][1, 2] = value
    save_adapter_files(tmp_path, config, tensors)
    with pytest.raises(AdapterFileError, match=rf"{KEY} in .*safetensors has 1 of 6 values that are NaN or infinite"):
        load_peft_weights(tmp_path, device="cpu")


def test_modules_that_were_saved_whole_may_hold_infinities_but_no_nan(tmp_path):
    mask = torch.tensor([0.0, float("-inf")])
    save_adapter_files(tmp_path, LoraConfig(), {"base_model.model.head.mask": mask})
    assert torch.equal(load_peft_weights(tmp_path, device="cpu")["base_model.model.head.mask"], mask)
    save_adapter_files(tmp_path, LoraConfig(), {"base_model.model.head.mask": mask * 0})
    with pytest.raises(AdapterFileError, match="NaN"):
        load_peft_weights(tmp_path, device="cpu")


def test_fp8_weights_are_checked_too(tmp_path):
    save_adapter_files(tmp_path, LoraConfig(), {KEY: torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)})
    with pytest.raises(AdapterFileError, match="NaN"):
        load_peft_weights(tmp_path, device="cpu")


def test_a_save_between_two_reads_is_noticed(tmp_path):
    """A reader that has the old config and gets the new weights must not make a model of the two."""
    save_adapter_files(tmp_path, *adapter(1))
    config = PeftConfig.from_pretrained(tmp_path)
    save_adapter_files(tmp_path, *adapter(2))
    with pytest.raises(MixedAdapterError, match="lora_alpha was 2 and is 1"):
        load_peft_weights(tmp_path, device="cpu", check_config=config)


# ---- finding weights ----


def test_missing_weights_say_what_is_there(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors or .*bin.*holds \['adapter_config.json'"):
        load_peft_weights(tmp_path, device="cpu")
    with pytest.raises(AdapterFileError, match="a config but no weights"):
        read_adapter_files(tmp_path)


def test_subfolder_device_and_key_mapping(tmp_path):
    config, tensors = adapter(1)
    tensors["base_model.v.lora_B.weight"] = torch.ones(1, 2)
    save_adapter_files(tmp_path / "sub", config, tensors)
    mapping = {r"^q\.": "layers.q.", "q": "never: the first pattern that fits is the one"}
    loaded = load_peft_weights(tmp_path, device=torch.device("cpu"), subfolder="sub", key_mapping=mapping)
    assert set(loaded) == {"base_model.model.layers.q.lora_A.weight", "base_model.v.lora_B.weight"}
    assert load_peft_weights(tmp_path, "meta", subfolder="sub")[KEY].is_meta
    save_adapter_files(tmp_path, config, {"q.lora_A.weight": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"keys that start with 'base_model\.'"):
        load_peft_weights(tmp_path, device="cpu", key_mapping=mapping)


@pytest.mark.parametrize("safe", [True, False])
def test_weights_from_the_cache_of_the_hub(tmp_path, monkeypatch, safe):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--adapter"
    save_adapter_files(repository / "snapshots" / "abc" / "sub", *adapter(1), safe_serialization=safe)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert load_peft_weights("some/adapter", device="cpu", subfolder="sub", cache_dir=tmp_path)[KEY][0, 0] == 1
    with pytest.raises(AdapterFileError, match=r"or adapter_model\.bin at 'some/other'"):
        load_peft_weights("some/other", device="cpu", cache_dir=tmp_path)


def test_weights_from_the_hub(tmp_path, monkeypatch):
    """Online: safetensors if the repository has them, else the pickle; tokens reach the hub under either name."""
    from fastpeft import weights

    calls = []
    remote = {"sub/adapter_model.bin"}
    save_adapter_files(tmp_path / "sub", *adapter(1), safe_serialization=False)

    def file_exists(repo_id, filename, revision, repo_type, token):
        calls.append((filename, revision, token))
        return filename in remote

    def hf_hub_download(repo_id, filename, subfolder, revision, token, user_agent):
        return str(tmp_path / subfolder / filename)

    monkeypatch.setattr(weights.hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "file_exists", file_exists)
    monkeypatch.setattr(weights, "hf_hub_download", hf_hub_download)
    options = {"subfolder": "sub", "revision": "r1", "use_auth_token": "secret"}
    assert load_peft_weights("some/adapter", "cpu", **options)[KEY][0, 0] == 1
    assert calls == [("sub/adapter_model.safetensors", "r1", "secret"), ("sub/adapter_model.bin", "r1", "secret")]
    remote.clear()
    with pytest.raises(AdapterFileError, match="the repository has neither"):
        load_peft_weights("some/adapter", "cpu", **options)


# ---- the seal ----


@pytest.mark.parametrize("safe", [True, False])
def test_the_seal_is_in_the_file_and_reference_readers_do_not_mind(tmp_path, safe):
    path = weights_of(tmp_path, safe)
    seal = read_seal(path)
    assert seal == seal_of(adapter(1)[0].signature(), adapter(1)[1])
    if safe:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"} | seal.metadata()
    else:
        assert zipfile.ZipFile(path).testzip() is None
        assert torch.load(path, weights_only=True).keys() == {KEY}


def test_a_file_without_a_seal_is_read_as_it_is(tmp_path):
    write_as_reference_peft(tmp_path / "theirs", 1)
    assert read_seal(tmp_path / "theirs" / "adapter_model.safetensors") is None
    LoraConfig(lora_alpha=99).save_pretrained(tmp_path / "theirs")
    assert load_peft_weights(tmp_path / "theirs", device="cpu")[KEY][0, 0] == 1
    torch.save({KEY: torch.ones(1)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert read_seal(tmp_path / "old.bin") is None
    assert read_tensors(tmp_path / "old.bin")[0][KEY] == 1
