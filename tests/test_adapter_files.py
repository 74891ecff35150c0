"""The files of an adapter: ordinary saves, finding weights, the seal."""

import zipfile
from pathlib import Path

import pytest
import torch
from adapters_on_disk import KEY, adapter, names_in, value_in, weights_of, write_as_reference_peft

from fastpeft import adapter_files
from fastpeft.checkpoint import (
    adapter_folder,
    load_peft_weights,
    read_adapter_files,
    reseal_adapter,
    save_adapter_files,
)
from fastpeft.sealed_file import AdapterFileError, MixedAdapterError, read_seal, read_tensors, seal_of
from fastpeft.tuners.lora.config import LoraConfig

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
