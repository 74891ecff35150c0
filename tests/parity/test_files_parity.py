"""Files against reference PEFT's: config JSON key by key, state-dict keys, and each library on what the other wrote."""

import json
import warnings

import peft
import pytest
import torch
from models import TARGETS, build, tiny_llama
from pairs import output, pair
from safetensors.torch import load_file

import fastpeft

CASES = {
    "plain": ("llama", {}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q|v)_proj"}),
    "exclude": ("llama", {"target_modules": "all-linear", "exclude_modules": ["up_proj", "down_proj"]}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 3.5}}),
    "layers": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 3, "lora_dropout": 0.25}),
    "lora bias": ("llama", {"lora_bias": True}),
    "gaussian": ("gpt2", {"init_lora_weights": "gaussian", "fan_in_fan_out": True}),
    "bias all": ("gpt2", {"bias": "all"}),
    "bias lora_only": ("gpt2", {"bias": "lora_only"}),
    "bias all and a head": ("bert_classifier", {"bias": "all"}),
    "head": ("bert_tagger", {}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings by regex": ("llama", {"target_modules": r".*embed_tokens|.*lm_head"}),
    "embedding in whole": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "encoder and decoder": ("t5", {"bias": "lora_only"}),
}


def config_values(folder):
    """adapter_config.json, less the order of what is a set in both libraries."""
    values = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules"):
        if isinstance(values[key], list):
            values[key] = sorted(values[key])
    return values


def save_both(models, tmp_path, **options):
    folders = tmp_path / "theirs", tmp_path / "ours"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, folder in zip(models, folders, strict=True):
            model.save_pretrained(folder, **options)
    return folders


def assert_same_files(folders):
    theirs, ours = folders
    assert config_values(ours) == config_values(theirs)
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert right.keys() == left.keys()
    for key, value in left.items():
        assert right[key].dtype == value.dtype
        assert torch.equal(right[key], value), key


@pytest.mark.parametrize("case", CASES)
def test_files_are_equal_and_each_library_loads_the_other(case, tmp_path):
    family, options = CASES[case]
    models = pair(family, **{"init_lora_weights": False} | options)
    folders = save_both(models, tmp_path)
    assert_same_files(folders)

    expected = [output(model.eval(), family) for model in models]
    torch.testing.assert_close(*expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = fastpeft.PeftModel.from_pretrained(build(family), folders[0])
        theirs = peft.PeftModel.from_pretrained(build(family), folders[1])
    assert torch.equal(output(theirs, family), expected[0])
    assert torch.equal(output(ours, family), expected[1])


@pytest.mark.parametrize("case", ["plain", "lora bias", "bias all", "modules_to_save", "embeddings"])
def test_state_dicts_of_one_adapter_among_several(case):
    family, options = CASES[case]
    models = pair(family, **options)
    models.add_adapter("other", target_modules=TARGETS[family], r=3)
    for name in ("default", "other"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model_state_dict(models.theirs, adapter_name=name)
            ours = fastpeft.get_peft_model_state_dict(models.ours, adapter_name=name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_state_dicts_of_injected_models():
    states = []
    for library in (peft, fastpeft):
        torch.manual_seed(0)
        config = library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        model = library.inject_adapter_in_model(config, tiny_llama(), adapter_name="mine")
        states.append(library.get_peft_model_state_dict(model, adapter_name="mine"))
        result = library.set_peft_model_state_dict(model, states[0], adapter_name="mine")
        assert not result.unexpected_keys
        wrapped = {f"base_model.model.{key}": value for key, value in states[0].items()}
        assert not library.set_peft_model_state_dict(model, wrapped, adapter_name="mine").unexpected_keys
    theirs, ours = states
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_resized_vocabulary_is_saved(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    models = []
    for library in (peft, fastpeft):
        base = type(tiny_llama()).from_pretrained(tmp_path / "base")
        torch.manual_seed(1)
        base.resize_token_embeddings(110, mean_resizing=False)
        config = library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        models.append(library.get_peft_model(base, config))
    for model, folder in zip(models, ("theirs", "ours"), strict=True):
        with pytest.warns(UserWarning, match="resized"):
            model.save_pretrained(tmp_path / folder)
    assert_same_files((tmp_path / "theirs", tmp_path / "ours"))
    keys = load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    assert {key for key in keys if "lora" not in key} == {
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    }


@pytest.mark.parametrize("choice", [True, False])
def test_embeddings_by_choice(choice, tmp_path):
    folders = save_both(pair("llama"), tmp_path, save_embedding_layers=choice)
    assert_same_files(folders)
    keys = load_file(folders[1] / "adapter_model.safetensors").keys()
    assert any("embed_tokens" in key for key in keys) is choice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_are_kept(dtype, autocast, tmp_path):
    assert_same_files(save_both(pair("llama", dtype=dtype, autocast=autocast, bias="all"), tmp_path))


def test_pickled_files_load_in_the_other_library(tmp_path):
    models = pair("llama", init_lora_weights=False)
    folders = save_both(models, tmp_path, safe_serialization=False)
    expected = [output(model.eval(), "llama") for model in models]
    ours = fastpeft.PeftModel.from_pretrained(build("llama"), folders[0])
    theirs = peft.PeftModel.from_pretrained(build("llama"), folders[1])
    assert torch.equal(output(theirs, "llama"), expected[0])
    assert torch.equal(output(ours, "llama"), expected[1])


@pytest.mark.parametrize("writer", [peft, fastpeft])
def test_configs_read_by_the_other_library(writer, tmp_path):
    options = {"r": 3, "target_modules": ["b", "a"], "modules_to_save": ["c"], "rank_pattern": {"a": 2}, "bias": "all"}
    writer.LoraConfig(**options, task_type="SEQ_CLS", base_model_name_or_path="x").save_pretrained(tmp_path)
    ours, theirs = fastpeft.PeftConfig.from_pretrained(tmp_path), peft.PeftConfig.from_pretrained(tmp_path)
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize("subfolder", [None, "sub"])
def test_weights_read_alike(tmp_path, subfolder):
    folder = tmp_path / subfolder if subfolder else tmp_path
    pair("llama").theirs.save_pretrained(folder)
    mapping = {r"^model\.": "text_model."}
    options = {"device": "cpu", "key_mapping": mapping, "subfolder": subfolder}
    theirs = peft.load_peft_weights(str(tmp_path), **options)
    ours = fastpeft.load_peft_weights(str(tmp_path), **options)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(key.startswith("base_model.model.text_model.") for key in ours)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_reports_the_same_keys(low_cpu_mem_usage):
    models = pair("llama", init_lora_weights=False)
    state = peft.get_peft_model_state_dict(models.theirs)
    dropped, added = next(iter(state)), "base_model.model.nowhere.lora_A.weight"
    state = {key: value + 1 for key, value in state.items() if key != dropped} | {added: torch.ones(1)}
    theirs = peft.set_peft_model_state_dict(models.theirs, state, low_cpu_mem_usage=low_cpu_mem_usage)
    ours = fastpeft.set_peft_model_state_dict(models.ours, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert ours.unexpected_keys == theirs.unexpected_keys == [added]
    assert set(ours.missing_keys) == set(theirs.missing_keys)
    left, right = models.state_dicts()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_mismatched_sizes_on_request():
    models = pair("llama", init_lora_weights=False)
    state = peft.get_peft_model_state_dict(models.theirs)
    key = next(iter(state))
    state = {name: value + 1 for name, value in state.items()} | {key: torch.ones(9, 9)}
    for library, model in zip((peft, fastpeft), models, strict=True):
        with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
            library.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    left, right = models.state_dicts()
    assert all(torch.equal(left[name], right[name]) for name in left)
