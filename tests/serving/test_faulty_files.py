"""What is wrong with an adapter's files is an error of the requests that name it. The others go on."""

import json
import os
import re
import shutil
import threading
import zipfile

import pytest
import serving_cases as cases
import torch
from safetensors.torch import save_file
from serving_cases import PROMPT, WAIT, check_others_go_on

from fastpeft import LoraConfig, get_peft_model
from fastpeft.checkpoint import get_peft_model_state_dict, save_adapter_files
from fastpeft.serving import AdapterLoadError, AdapterTooLargeError
from fastpeft.serving import registry as registry_module


def truncated(folder):
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def flipped(folder):
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def not_finite(folder):
    config, weights = cases.AdapterMaker().weights(1, cases.LORA_KINDS[0])
    next(iter(weights.values()))[0, 0] = float("nan")
    save_adapter_files(folder, config, weights)


def other_config(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 77}))


def other_shapes(folder):
    base = cases.tiny_base(torch.float32)
    base.config.hidden_size, base.config.intermediate_size = 48, 80
    model = get_peft_model(type(base)(base.config), LoraConfig(r=4, target_modules=cases.TARGETS))
    save_adapter_files(folder, model.peft_config["default"], get_peft_model_state_dict(model))


def other_layers(folder):
    weights = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(4, 64)}
    save_adapter_files(folder, LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM"), weights)


def mixed_with_the_base(folder):
    config, weights = cases.AdapterMaker().weights(1, cases.LORA_KINDS[0])
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(cases.VOCAB, 64)
    save_adapter_files(folder, config, weights)


def unknown_method(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "NO_SUCH_METHOD"}))


def no_json(folder):
    (folder / "adapter_config.json").write_text("{")


def asks_for_code(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"w": threading.Thread}, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "truncated or damaged"),
        (flipped, "damaged: its content is not what the digest"),
        (not_finite, "NaN or infinite"),
        (other_config, "lora_alpha was 8 and is 77"),
        (other_shapes, r"of shape \(4, 48\), the model \(4, 64\)"),
        (other_layers, "matches no layer"),
        (mixed_with_the_base, "embed_tokens.weight, which is no part of the adapter"),
        (unknown_method, "NO_SUCH_METHOD"),
        (no_json, "is not JSON"),
        (asks_for_code, "could run code"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_adapter(engine, answer, tmp_path, maker, damage, message):
    folder = maker.save(tmp_path / "bad", 1, cases.LORA_KINDS[0])
    damage(folder)
    engine.add_adapter("bad", folder)

    def use():
        handles = [engine.submit(PROMPT, "bad") for _ in range(2)]
        for handle in handles:
            with pytest.raises(AdapterLoadError, match=message) as info:
                handle.result(WAIT)
            assert "adapter 'bad' cannot be served" in str(info.value)

    check_others_go_on(engine, answer, use)
    with pytest.raises(AdapterLoadError, match=message):
        engine.pin("bad").result(WAIT)
    shutil.rmtree(folder)
    engine.replace_adapter("bad", maker.save(folder, 0, cases.LORA_KINDS[0]))  # mended
    assert engine.submit(PROMPT, "bad").result(WAIT) == answer


@pytest.mark.parametrize("what", ["folder", "weights", "config"])
def test_files_that_disappear_while_they_are_prefetched(engine, answer, tmp_path, maker, monkeypatch, what):
    """Between the look at the file and the reading of it."""
    folder = maker.save(tmp_path / "gone", 1, cases.LORA_KINDS[0])
    engine.add_adapter("gone", folder)
    read = registry_module.read_adapter

    def read_too_late(path, limit):
        if path == folder and path.exists():
            names = {"weights": ["adapter_model.safetensors"], "config": ["adapter_config.json"]}
            for name in names.get(what, os.listdir(path)):
                (path / name).unlink()
            if what == "folder":
                path.rmdir()
        return read(path, limit)

    monkeypatch.setattr(registry_module, "read_adapter", read_too_late)

    def use():
        future = engine.prefetch("gone")
        handle = engine.submit(PROMPT, "gone")
        for get in (future.result, handle.result):
            with pytest.raises(AdapterLoadError, match="adapter 'gone' cannot be served: no adapter at"):
                get(WAIT)

    check_others_go_on(engine, answer, use)


def test_a_file_that_changes_while_it_is_read(engine, answer, tmp_path, maker, monkeypatch):
    folder = maker.save(tmp_path / "x", 1, cases.LORA_KINDS[0])
    engine.add_adapter("x", folder)
    from fastpeft.serving import weights as weights_module

    load = weights_module.load_peft_weights

    def load_and_change(*args, **kwargs):
        tensors = load(*args, **kwargs)
        maker.save(folder, 2, cases.LORA_KINDS[0])
        return tensors

    monkeypatch.setattr(weights_module, "load_peft_weights", load_and_change)
    with pytest.raises(AdapterLoadError, match="was written to while it was read"):
        engine.submit(PROMPT, "x").result(WAIT)
    monkeypatch.undo()
    engine.replace_adapter("x", folder)
    assert engine.submit(PROMPT, "x").result(WAIT) == cases.Alone().answers(folder, [PROMPT])[0]


def test_files_that_were_changed_under_an_adapter(tmp_path, maker):
    """Its version has left the CPU tier; what is in the folder now is another one, which has to be named so."""
    folders = [maker.save(tmp_path / str(i), i, cases.LORA_KINDS[0]) for i in range(3)]
    size = folders[0].joinpath("adapter_model.safetensors").stat().st_size
    with cases.engine(slots=1, cpu_bytes=size) as engine:
        for i, folder in enumerate(folders):
            engine.add_adapter(str(i), folder)
        first = engine.submit(PROMPT, "0").result(WAIT)
        engine.submit(PROMPT, "1").result(WAIT)
        maker.save(folders[0], 7, cases.LORA_KINDS[0])
        with pytest.raises(AdapterLoadError, match="was changed since version 1 of '0' was first read"):
            engine.submit(PROMPT, "0").result(WAIT)
        engine.replace_adapter("0", folders[0])
        assert engine.submit(PROMPT, "0").result(WAIT) != first


@pytest.mark.parametrize("shape", [(400, 400), (2**40, 1)], ids=str)
def test_a_file_larger_than_it_looks(tmp_path, maker, good, answer, shape):
    """A pickle may keep one number for all that share it: more than there is memory, and nothing of it is allocated."""
    folder = maker.save(tmp_path / "shared", 1, cases.LORA_KINDS[0])
    weights = maker.weights(1, cases.LORA_KINDS[0])[1]
    (folder / "adapter_model.safetensors").unlink()
    torch.save({key: torch.zeros(1).expand(shape) for key in weights}, folder / "adapter_model.bin")
    check_too_large(folder, good, answer, shape[0] * shape[1] * 4 * len(weights))


def test_a_packed_file(tmp_path, maker, good, answer):
    """An archive may be packed: its records say how large they will be."""
    folder = maker.save(tmp_path / "packed", 1, cases.LORA_KINDS[0])
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(10_000_000)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record), zipfile.ZIP_DEFLATED)
    assert (folder / "adapter_model.bin").stat().st_size < 200_000
    check_too_large(folder, good, answer, 40_000_000)


def check_too_large(folder, good, answer, nbytes):
    with cases.engine(slots=2, cpu_bytes=500_000) as engine:
        engine.add_adapter("good", good)
        engine.add_adapter("large", folder)
        with pytest.raises(AdapterTooLargeError, match=r"holds (\d+) bytes, more than .*cpu_bytes") as caught:
            engine.submit(PROMPT, "large").result(WAIT)
        assert int(re.search(r"holds (\d+)", str(caught.value))[1]) >= nbytes
        assert engine.submit(PROMPT, "good").result(WAIT) == answer
        assert engine.status().on_cpu == ["good"]


def test_a_config_without_end(tmp_path, maker, engine):
    folder = maker.save(tmp_path, 1, cases.LORA_KINDS[0])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"note": "x" * (1 << 20)}))
    with pytest.raises(ValueError, match=r"has 104\d+ bytes, and an adapter's config at most 1048576"):
        engine.add_adapter("long", folder)


def test_files_of_reference_peft_have_no_seal(engine, good, tmp_path, answer):
    """They are served too, and noticed if they are damaged as far as safetensors notices it."""
    from safetensors.torch import load_file

    weights = load_file(good / "adapter_model.safetensors")
    shutil.copy(good / "adapter_config.json", tmp_path)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    engine.add_adapter("theirs", tmp_path)
    assert engine.submit(PROMPT, "theirs").result(WAIT) == answer
