"""What is wrong with one adapter or one request is an error of that request. The others go on."""

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

from fastpeft import LoraConfig, get_peft_model
from fastpeft.checkpoint import get_peft_model_state_dict, save_adapter_files
from fastpeft.serving import (
    AdapterLoadError,
    AdapterTooLargeError,
    RequestFailedError,
    UnknownAdapterError,
)
from fastpeft.serving import registry as registry_module

WAIT = 60
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def maker():
    return cases.AdapterMaker()


@pytest.fixture(scope="module")
def good(tmp_path_factory, maker):
    return maker.save(tmp_path_factory.mktemp("good"), 0, cases.LORA_KINDS[0])


@pytest.fixture(scope="module")
def answer(good):
    return cases.Alone().answers(good, [PROMPT])[0]


@pytest.fixture
def engine(good):
    with cases.engine(slots=2) as engine:
        engine.add_adapter("good", good)
        yield engine


def check_others_go_on(engine, answer, around):
    """Requests before, while and after something fails get their answers."""
    before = [engine.submit(PROMPT, "good") for _ in range(3)]
    result = around()
    after = engine.submit(PROMPT, "good")
    assert [handle.result(WAIT) for handle in (*before, after)] == [answer] * 4
    assert engine.status().waiting == engine.status().running == 0
    return result


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


def test_an_adapter_larger_than_the_budget(tmp_path, maker, good, answer):
    big = maker.save(tmp_path / "big", 1, cases.LORA_KINDS[4])  # with a head of its own
    limit = 2 * good.joinpath("adapter_model.safetensors").stat().st_size
    assert big.joinpath("adapter_model.safetensors").stat().st_size > limit
    with cases.engine(slots=2, cpu_bytes=limit) as engine:
        engine.add_adapter("good", good)
        engine.add_adapter("big", big)

        def use():
            for get in (engine.submit(PROMPT, "big").result, engine.prefetch("big").result):
                with pytest.raises(AdapterTooLargeError, match=f"adapter 'big' has .* may hold {limit}.*cpu_bytes"):
                    get(WAIT)

        check_others_go_on(engine, answer, use)
        config, weights = maker.weights(1, cases.LORA_KINDS[4])
        with pytest.raises(AdapterTooLargeError, match="adapter 'given' has"):
            engine.add_adapter("given", weights, config)
        assert set(engine.adapters()) == {"good", "big"}


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


@pytest.mark.parametrize("name", ["nobody", "x" * 10_000, "", "../..", "\0", 7], ids=repr)
def test_unknown_names(engine, answer, name):
    def use():
        with pytest.raises(UnknownAdapterError, match=r"no adapter .*registered are 'good'") as info:
            engine.submit(PROMPT, name)
        assert len(str(info.value)) < 300

    check_others_go_on(engine, answer, use)
    for method in (engine.pin, engine.prefetch, engine.remove_adapter, engine.unpin):
        with pytest.raises(UnknownAdapterError):
            method(name)


def test_a_name_that_is_too_long(engine, good):
    with pytest.raises(UnknownAdapterError, match=r"1 to 256 characters, got .*\(10002 characters\)") as info:
        engine.add_adapter("x" * 10_000, good)
    assert len(str(info.value)) < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": []}, "input_ids must be the tokens of one prompt"),
        ({"input_ids": "hello"}, "input_ids must be the tokens of one prompt"),
        ({"input_ids": None}, "input_ids must be the tokens of one prompt"),
        ({"input_ids": [1.5]}, "integers; got 1.5"),
        ({"input_ids": [[1, 2], [3, 4]]}, "integers; got"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, "integers; got"),
        ({"input_ids": [cases.VOCAB]}, "token 97 is not in the model's vocabulary of 97"),
        ({"input_ids": [-1]}, "token -1 is not in the model's vocabulary"),
        ({"input_ids": PROMPT, "max_new_tokens": 0}, "max_new_tokens must be a positive integer"),
        ({"input_ids": PROMPT, "max_new_tokens": 2.0}, "max_new_tokens must be a positive integer"),
        ({"input_ids": [5] * 100, "max_new_tokens": 29}, "more than the 128 tokens that the model has positions for"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_served(engine, answer, arguments, message):
    """Each of them would end the generation of all others, were it let through."""

    def use():
        with pytest.raises(ValueError, match=message):
            engine.submit(adapter="good", **arguments)

    check_others_go_on(engine, answer, use)


def test_a_request_larger_than_the_cache(good):
    with cases.engine(continuous_batching_config=cases.batching_config(num_blocks=8)) as engine:
        engine.add_adapter("good", good)
        with pytest.raises(ValueError, match="more than the 32 tokens that the cache keeps of one request"):
            engine.submit([5] * 25, "good", max_new_tokens=8)
        handles = [engine.submit([5] * 24, "good", max_new_tokens=8, eos_token_id=-1) for _ in range(3)]
        assert len({tuple(handle.result(WAIT)) for handle in handles}) == 1, "one at a time, in turn"


def test_length_has_to_be_said(good):
    with cases.engine() as engine:
        engine._limits._max_new_tokens = None
        with pytest.raises(ValueError, match="pass max_new_tokens"):
            engine.submit(PROMPT)


def test_files_of_reference_peft_have_no_seal(engine, good, tmp_path, answer):
    """They are served too, and noticed if they are damaged as far as safetensors notices it."""
    from safetensors.torch import load_file

    weights = load_file(good / "adapter_model.safetensors")
    shutil.copy(good / "adapter_config.json", tmp_path)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    engine.add_adapter("theirs", tmp_path)
    assert engine.submit(PROMPT, "theirs").result(WAIT) == answer


def test_weights_in_memory_that_are_not_finite(engine, maker):
    config, weights = maker.weights(1, cases.LORA_KINDS[0])
    weights[key := next(iter(weights))][0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"{key} has values that are NaN or infinite"):
        engine.add_adapter("bad", weights, config)
    assert list(engine.adapters()) == ["good"]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_adapter_that_overflows_fails_alone(maker, good, dtype, options):
    """Its weights are finite, and what the layers make of them is not. That must neither reach the others nor stay."""
    config, weights = maker.weights(3, cases.LORA_KINDS[0])
    huge = {key: torch.full_like(value, 3e38) * value.sign() for key, value in weights.items()}
    other = [9, 10, 11, 12, 13, 14]
    work = [(PROMPT, "good"), (other, "good"), (PROMPT, None), (other, None)]

    def engine():
        engine = cases.engine(cases.tiny_base(dtype))
        engine._generation_config.update(**options)
        engine.add_adapter("good", good)
        return engine

    with engine() as fresh:
        wanted = [fresh.submit(prompt, name).result(WAIT) for prompt, name in work]
    with engine() as beside:
        beside.add_adapter("huge", huge, config)
        beside.pin("huge").result(WAIT), beside.pin("good").result(WAIT)
        for _ in range(2):  # the second time from the cache
            bad, answers = [], []
            for prompt, name in work:
                bad.append(beside.submit(prompt, "huge"))
                answers.append(beside.submit(prompt, name))
            assert [handle.result(WAIT) for handle in answers] == wanted
            for handle in bad:
                with pytest.raises(RequestFailedError, match="adapter 'huge': its values overflow"):
                    handle.result(WAIT)
                assert handle.tokens() == []


def test_another_method_is_refused_when_it_is_registered(tmp_path, maker, good, answer):
    """Whichever is asked for first: what was registered first is served."""
    kind = {"method": "ia3", "target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    other = maker.save(tmp_path / "ia3", 1, kind)
    with cases.engine() as engine:
        engine.add_adapter("first", other)
        engine.replace_adapter("first", good)  # nothing else is there yet
        with pytest.raises(AdapterLoadError, match=r"'ia3' is of the method IA3, and this engine serves LORA"):
            engine.add_adapter("ia3", other)
        with pytest.raises(AdapterLoadError, match="is of the method IA3"):
            engine.add_adapter("ia3", *reversed(maker.weights(1, kind)))
        assert engine.submit(PROMPT, "first").result(WAIT) == answer
        with pytest.raises(AdapterLoadError, match="is of the method IA3"):
            engine.replace_adapter("first", other)
        assert engine.submit(PROMPT, "first").result(WAIT) == answer
        assert list(engine.adapters()) == ["first"]
