"""Adapter weights out of a model and into a model, and what happens when they do not fit."""

import warnings

import pytest
import torch
from models import build, tiny_bert_classifier, tiny_llama
from torch import nn

from fastpeft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from fastpeft.checkpoint import save_adapter_files


def adapted(**options):
    return get_peft_model(
        tiny_llama(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | options)
    )


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


# ---- out of a model ----


def test_keys_have_no_adapter_name_and_tensors_are_the_models():
    model = adapted()
    weights = get_peft_model_state_dict(model)
    assert len(weights) == 4
    for key, value in weights.items():
        in_model = model.get_parameter(key.removesuffix(".weight") + ".default.weight")
        assert value.data_ptr() == in_model.data_ptr()


@pytest.mark.parametrize("name", ["default", "weight", "lora_A", "model", "q_proj", "0"])
def test_a_name_that_is_part_of_keys_confuses_nothing(name):
    expected = get_peft_model_state_dict(adapted())
    model = adapted()
    model.add_adapter(name + "2", LoraConfig(r=3, target_modules=["q_proj"]))
    model.load_state_dict(
        {key[: -len(".weight")] + ".default.weight": value for key, value in expected.items()}, strict=False
    )
    renamed = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name=name
    )
    result = set_peft_model_state_dict(renamed, get_peft_model_state_dict(model), adapter_name=name)
    assert not result.unexpected_keys
    found = get_peft_model_state_dict(renamed, adapter_name=name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_base_modules_that_look_like_adapters_are_not_saved():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_head = nn.Linear(3, 3)
            self.proj = nn.Linear(3, 3)

    model = get_peft_model(Base(), LoraConfig(target_modules=["proj"]))
    assert all(".proj." in key for key in get_peft_model_state_dict(model))


def test_weights_from_a_given_state_dict():
    model = adapted()
    doubled = {key: 2 * value for key, value in model.state_dict().items()}
    weights = get_peft_model_state_dict(model, state_dict=doubled)
    own = get_peft_model_state_dict(model)
    assert all(torch.equal(weights[key], 2 * own[key]) for key in own)


def test_through_the_wrapper_of_torch_compile():
    model = adapted()
    compiled = torch.compile(model)
    assert get_peft_model_state_dict(compiled, unwrap_compiled=True).keys() == get_peft_model_state_dict(model).keys()


def test_a_missing_adapter_is_named():
    with pytest.raises(ValueError, match=r"no adapter 'x'; its adapters are \['default'\]"):
        get_peft_model_state_dict(adapted(), adapter_name="x")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter 'default'; it has no adapters"):
        get_peft_model_state_dict(tiny_llama())
    with pytest.raises(ValueError, match="no adapter 'x'"):
        set_peft_model_state_dict(adapted(), {}, adapter_name="x")


def test_weights_that_look_like_shards_are_warned_of():
    model = adapted()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].weight.data = torch.zeros(0)
    with pytest.warns(UserWarning, match=r"2 LoRA factors that are no matrices.*ZeRO-3"):
        get_peft_model_state_dict(model)
    with_bias = get_peft_model(
        nn.Sequential(nn.Linear(3, 5)), LoraConfig(target_modules=["0"], lora_bias=True, init_lora_weights=False)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model_state_dict(model, state_dict=model.state_dict())  # what a caller made is the caller's
        assert len(get_peft_model_state_dict(with_bias)) == 3


def test_tensor_parallel_models_are_refused():
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer._hf_device_mesh = object()
    for call in (lambda: get_peft_model_state_dict(model), lambda: set_peft_model_state_dict(model, {})):
        with pytest.raises(NotImplementedError, match="tensor parallelism"):
            call()


# ---- embeddings ----


def test_embeddings_are_not_saved_for_nothing(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path)
    base.name_or_path = str(tmp_path)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any("embed" in key for key in get_peft_model_state_dict(model))


def test_offline_the_vocabulary_is_taken_to_be_unchanged():
    base = tiny_llama()
    base.name_or_path = "somebody/base"
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="could not read the config of the base model 'somebody/base'"):
        assert not any("embed" in key for key in get_peft_model_state_dict(model))


def test_a_base_config_that_cannot_be_read_does_not_cost_the_adapter(tmp_path):
    base = tiny_llama()
    (tmp_path / "config.json").write_text("{")
    base.name_or_path = str(tmp_path)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="could not read the config"):
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_embeddings_of_a_model_that_has_none():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="save_embedding_layers=True has no effect: PeftModel"):
        assert len(get_peft_model_state_dict(model, save_embedding_layers=True)) == 2
    with pytest.raises(ValueError, match="True, False or 'auto'; got 'always'"):
        get_peft_model_state_dict(model, save_embedding_layers="always")


# ---- into a model ----


def test_another_name_than_the_saved_one():
    saved = get_peft_model_state_dict(adapted())
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    before = state_of(model)
    result = set_peft_model_state_dict(model, saved, adapter_name="second")
    assert not result.unexpected_keys
    loaded = get_peft_model_state_dict(model, adapter_name="second")
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if ".second." not in key)


def test_into_a_model_without_a_wrapper_and_out_again():
    saved = get_peft_model_state_dict(adapted())
    config = LoraConfig(r=2, target_modules=["q_proj"])
    for low_cpu_mem_usage in (False, True):
        model = inject_adapter_in_model(config, tiny_llama(), low_cpu_mem_usage=low_cpu_mem_usage)
        result = set_peft_model_state_dict(model, saved, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys
        own = get_peft_model_state_dict(model)
        assert all(torch.equal(own[key.removeprefix("base_model.model.")], saved[key]) for key in saved)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_wrong_shapes_are_all_named_and_nothing_is_copied(low_cpu_mem_usage):
    weights = {key: value + 1 for key, value in get_peft_model_state_dict(adapted()).items()}
    wrong = [key for key in weights if "lora_A" in key]
    weights |= {key: torch.zeros(5, 32) for key in wrong}
    model = adapted()
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"does not fit LlamaForCausalLM; nothing was loaded") as raised:
        set_peft_model_state_dict(model, weights, low_cpu_mem_usage=low_cpu_mem_usage)
    assert str(raised.value).count("the weights have shape (5, 32), the model (2, 32)") == len(wrong) == 2
    assert_unchanged(model, before)


def test_weights_do_not_go_into_a_merged_adapter():
    """Unmerging subtracts what the adapter holds then: other weights would spoil the base for good."""
    model = adapted()
    weights = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
    model.merge_adapter()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"adapter 'default' is merged .*unmerge_adapter"):
        set_peft_model_state_dict(model, weights)
    assert_unchanged(model, before)


def test_mismatched_sizes_can_be_left_out():
    weights = get_peft_model_state_dict(adapted())
    key = next(iter(weights))
    model = adapted()
    before = state_of(model)
    with pytest.warns(UserWarning, match="left as they were") as caught:
        set_peft_model_state_dict(model, weights | {key: torch.zeros(5, 32)}, ignore_mismatched_sizes=True)
    assert key.removesuffix(".weight") in str(caught[0].message)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) <= len(weights) - 1
    assert key.removesuffix("weight") + "default.weight" not in changed


def test_a_missing_head_is_named_and_nothing_is_copied():
    def classifier():
        config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
        return get_peft_model(tiny_bert_classifier(), config)

    weights = {k: v + 1 for k, v in get_peft_model_state_dict(classifier()).items() if "classifier" not in k}
    model = classifier()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"lack \['base_model.model.classifier.weight'.*modules_to_save"):
        set_peft_model_state_dict(model, weights)
    assert_unchanged(model, before)


def test_unknown_and_missing_keys_are_reported():
    weights = get_peft_model_state_dict(adapted())
    dropped = next(iter(weights))
    del weights[dropped]
    result = set_peft_model_state_dict(adapted(), weights | {"base_model.model.nowhere": torch.ones(1)})
    assert result.unexpected_keys == ["base_model.model.nowhere"]
    in_model = dropped.removesuffix("weight") + "default.weight"
    assert [key for key in result.missing_keys if "lora" in key] == [in_model]


# ---- through a folder: a load that fails leaves the model as it was ----


def folder_with(tmp_path, damage):
    source = adapted(task_type="CAUSAL_LM")
    source.save_pretrained(tmp_path)
    weights = {key: value.clone() for key, value in get_peft_model_state_dict(source).items()}
    key = next(iter(weights))
    path = tmp_path / "adapter_model.safetensors"
    if damage == "nan":
        weights[key][0, 0] = float("nan")
        save_adapter_files(tmp_path, source.peft_config["default"], weights)
    elif damage == "shape":
        weights[key] = torch.zeros(5, 32)
        save_adapter_files(tmp_path, source.peft_config["default"], weights)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "missing":
        path.unlink()
    elif damage == "mixed":
        LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=99).save_pretrained(tmp_path)
    elif damage == "no config":
        (tmp_path / "adapter_config.json").unlink()
    return tmp_path


DAMAGES = {
    "nan": "NaN or infinite",
    "shape": "size mismatch",
    "truncated": "not a readable adapter",
    "missing": "no adapter_model.safetensors",
    "mixed": "lora_alpha was 8 and is 99",
    "no config": "Can't find 'adapter_config.json'",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_changes_no_model(tmp_path, damage):
    folder = folder_with(tmp_path, damage)
    base = build("llama")
    before = state_of(base)
    modules = [type(module) for module in base.modules()]
    with pytest.raises((ValueError, RuntimeError), match=DAMAGES[damage]):
        PeftModel.from_pretrained(base, folder)
    assert_unchanged(base, before)
    assert [type(module) for module in base.modules()] == modules
    assert not hasattr(base, "peft_config")

    model = adapted()
    before = state_of(model)
    for name in ("default", "new"):
        with pytest.raises((ValueError, RuntimeError), match=DAMAGES[damage]):
            # an existing adapter takes weights from a folder without a config too
            model.load_adapter(folder, "new" if damage == "no config" else name)
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default"]


def test_a_config_of_ones_own_is_not_compared_with_the_file(tmp_path):
    folder = folder_with(tmp_path, "mixed")
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=3)
    model = PeftModel.from_pretrained(build("llama"), folder, config=config)
    assert model.peft_config["default"].lora_alpha == 3


@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped"])
def test_an_adapter_name_does_not_lead_a_save_out_of_its_folder(tmp_path, name):
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    model.peft_config[name] = model.peft_config["default"]
    with pytest.raises(ValueError, match="leads out of"):
        model.save_pretrained(tmp_path / "out", selected_adapters=[name])
    assert not (tmp_path / "escaped").exists()
