"""Files of an adapter that are damaged or hostile."""

import os
import pickle

import pytest
import torch
from adapters_on_disk import KEY, adapter, weights_of
from hypothesis import given
from hypothesis import strategies as st

from fastpeft.checkpoint import (
    load_peft_weights,
    save_adapter_files,
)
from fastpeft.config import PeftConfig
from fastpeft.sealed_file import AdapterFileError, MixedAdapterError, read_tensors
from fastpeft.tuners.lora.config import LoraConfig


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


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_weights_that_are_no_floats_are_named(tmp_path, dtype):
    save_adapter_files(tmp_path, LoraConfig(), {KEY: torch.ones(2, 3, dtype=dtype)})
    with pytest.raises(AdapterFileError, match=f"{KEY} in .* is of {dtype}; expected a floating-point dtype"):
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
