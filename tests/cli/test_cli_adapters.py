"""Adapters other than the one that fastpeft train just wrote: half saved, of another task, with more tokens."""

import json

import pytest

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
