"""IA3 of this library against reference PEFT's: weights, outputs, gradients, merging, files both ways."""

import json
import warnings

import models
import peft
import pytest
import torch
from numerics import assert_as_close_as_torch, assert_no_noisier_than_torch
from pairs import exact_copy, output, output_and_gradients, pair, trainable
from peft.utils import constants as reference_constants
from safetensors.torch import load_file

import fastpeft
from fastpeft.utils import constants

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES = ["llama", "gpt2", "t5", "bert", "bert_classifier"]
OPTIONS = {
    "family's defaults": {},
    "no reset": {"init_ia3_weights": False},
    "outputs only": {"feedforward_modules": [], "init_ia3_weights": False},
    "all-linear": {"target_modules": "all-linear", "feedforward_modules": ["none"], "init_ia3_weights": False},
}
LLAMA_OPTIONS = {
    "inputs only": {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["q_proj", "up_proj"]},
    "expressions": {
        "target_modules": r".*\.(q_proj|up_proj|down_proj)",
        "feedforward_modules": r".*\.1\..*(up|down)_proj",
        "init_ia3_weights": False,
    },
    "last letters": {"target_modules": ["o_proj", "proj"], "feedforward_modules": ["proj"]},
    "exclude": {"exclude_modules": ["layers.0.self_attn.k_proj"]},
    "modules to save": {"modules_to_save": ["lm_head"], "init_ia3_weights": False},
    "fan_in_fan_out does not apply": {"fan_in_fan_out": True},
}
CASES = [(family, name) for family in FAMILIES for name in OPTIONS] + [("llama", name) for name in LLAMA_OPTIONS]


def ia3(family, dtype=torch.float32, **options):
    return pair(family, dtype, method="IA3Config", **options)


def options_of(name):
    return {**OPTIONS, **LLAMA_OPTIONS}[name]


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize(("family", "name"), CASES, ids=str)
def test_same_weights_outputs_and_gradients(family, name):
    both = ia3(family, **options_of(name))
    theirs, ours = both.state_dicts()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert trainable(both.ours) == trainable(both.theirs)
    assert any("ia3_l" in key for key in ours)
    configs = [model.peft_config["default"] for model in both]
    assert configs[1].target_modules == configs[0].target_modules
    assert configs[1].fan_in_fan_out == configs[0].fan_in_fan_out

    exact = output_and_gradients(exact_copy(both.theirs), family)
    eager, found = (output_and_gradients(model, family) for model in both)
    assert found.keys() == eager.keys()
    for key in exact:
        assert_as_close_as_torch(key, found[key], eager[key], exact[key])


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32 vectors", "narrow vectors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_models(family, dtype, autocast):
    both = ia3(family, dtype, autocast=autocast, init_ia3_weights=False)
    with torch.no_grad():  # about one, as trained vectors are: products of normal ones overflow fp16
        for model in both:
            for name, parameter in model.named_parameters():
                if "ia3_l" in name:
                    parameter.mul_(0.1).add_(1)
    assert {p.dtype for n, p in both.ours.named_parameters() if "ia3_l" in n} == {torch.float32 if autocast else dtype}
    exact = output_and_gradients(exact_copy(both.theirs), family)
    eager, found = (output_and_gradients(model, family) for model in both)
    assert {key: t.dtype for key, t in found.items()} == {key: t.dtype for key, t in eager.items()}
    assert_no_noisier_than_torch(found, eager, exact)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_numbers_under_autocast(family, dtype):
    both = ia3(family, dtype, init_ia3_weights=False)
    exact = output_and_gradients(exact_copy(both.theirs), family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, found = (output_and_gradients(model, family) for model in both)
    assert {key: t.dtype for key, t in found.items()} == {key: t.dtype for key, t in eager.items()}
    assert_no_noisier_than_torch(found, eager, exact)


def test_two_active_adapters():
    both = ia3("llama", init_ia3_weights=False)
    both.add_adapter("other", method="IA3Config", target_modules=["v_proj", "down_proj"], init_ia3_weights=False)
    both.each("base_model.set_adapter", ["default", "other"])
    assert trainable(both.ours) == trainable(both.theirs)
    exact = output_and_gradients(exact_copy(both.theirs), "llama")
    eager, found = (output_and_gradients(model, "llama") for model in both)
    for key in exact:
        assert_as_close_as_torch(key, found[key], eager[key], exact[key])
    both.each("delete_adapter", "default")
    both.each("set_adapter", "other")
    torch.testing.assert_close(output(both.ours, "llama"), output(both.theirs, "llama"))


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_equal(family, safe_merge):
    both = ia3(family, init_ia3_weights=False)
    both.each("merge_adapter", safe_merge=safe_merge)
    theirs, ours = both.state_dicts()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    both.each("unmerge_adapter")
    theirs, ours = both.state_dicts()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)  # they divide by l + 1e-8
    bare = both.each("merge_and_unload")
    assert [name for name, _ in bare[1].named_modules()] == [name for name, _ in bare[0].named_modules()]


def config_values(folder):
    values = json.loads((folder / "adapter_config.json").read_text())
    names = ("target_modules", "exclude_modules", "feedforward_modules")
    return values | {key: sorted(values[key]) for key in names if isinstance(values[key], list)}


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] != "all-linear"], ids=str)
def test_files_are_equal_and_each_library_loads_the_other(family, name, tmp_path):
    both = ia3(family, **{"init_ia3_weights": False} | options_of(name))
    folders = tmp_path / "theirs", tmp_path / "ours"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, folder in zip(both, folders, strict=True):
            model.save_pretrained(folder)
    assert config_values(folders[1]) == config_values(folders[0])
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert right.keys() == left.keys()
    assert all(torch.equal(right[key], left[key]) for key in left)
    expected = [output(model.eval(), family) for model in both]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = fastpeft.PeftModel.from_pretrained(models.build(family), folders[0])
        theirs = peft.PeftModel.from_pretrained(models.build(family), folders[1])
    assert torch.equal(output(theirs, family), expected[0])
    assert torch.equal(output(ours, family), expected[1])


def test_what_all_linear_writes_loads_everywhere(tmp_path):
    """Reference PEFT cannot read what it writes itself here: its feedforward_modules are names, no targets any more."""
    both = ia3("llama", target_modules="all-linear", feedforward_modules=["down_proj"], init_ia3_weights=False)
    both.theirs.save_pretrained(tmp_path / "theirs")
    both.ours.save_pretrained(tmp_path / "ours")
    expected = output(both.ours.eval(), "llama")
    torch.testing.assert_close(output(both.theirs.eval(), "llama"), expected)
    with pytest.raises(ValueError, match="subset"):
        peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(
        output(peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "ours"), "llama"), expected
    )
    for folder in ("theirs", "ours"):
        loaded = fastpeft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / folder)
        torch.testing.assert_close(output(loaded, "llama"), expected)


def test_same_defaults_for_every_family():
    for name in (
        "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    ):
        assert getattr(constants, name) == getattr(reference_constants, name)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    both = ia3("llama", init_ia3_weights=False)
    plain = output_and_gradients(both.ours, "llama")
    both.ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    both.ours.enable_input_require_grads()
    checkpointed = output_and_gradients(both.ours, "llama")
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)


@pytest.mark.parametrize(
    ("family", "dtype", "checkpointing"),
    [  # any two of these together
        ("llama", DTYPES[0], False),
        ("llama", DTYPES[1], True),
        ("gpt2", DTYPES[0], True),
        ("gpt2", DTYPES[1], False),
    ],
    ids=str,
)
def test_compiles_to_one_graph(family, dtype, checkpointing):
    model = ia3(family, dtype, overrides={"use_cache": False}, init_ia3_weights=False).ours
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # a hook for the reentrant mode alone; the compiler refuses it
    inputs = models.batch(family)
    del inputs["labels"]  # GPT-2's loss warns, which the compiler refuses
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits = forward(**inputs).logits
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 1
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
