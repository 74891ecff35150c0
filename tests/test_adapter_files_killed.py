"""Saves that are killed or fail at any step."""

import itertools
import os
import shutil
from functools import partial

import pytest
from adapters_on_disk import FILES, KEY, adapter, interrupt, names_in, value_in, write_as_reference_peft

from fastpeft import adapter_files
from fastpeft.checkpoint import (
    load_peft_weights,
    read_adapter_files,
    save_adapter_files,
)
from fastpeft.config import PeftConfig
from fastpeft.sealed_file import MixedAdapterError, read_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="saves are killed in forked processes")


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
