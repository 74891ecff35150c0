"""The IA3 tuner: targets, configs, what it refuses."""

import copy
import pickle
import warnings

import models
import pytest
import torch
from ia3_layers import ia3, input_of, side, tiny
from peft.tuners.ia3 import layer as reference
from torch import nn

import fastpeft
from fastpeft import IA3Config, get_peft_model
from fastpeft.tuners.ia3 import IA3Layer


def test_targets_and_sides():
    model = tiny()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, IA3Layer)}
    assert {name.rpartition(".")[2] for name in layers} == {"k_proj", "v_proj", "down_proj"}
    assert all(layer.is_feedforward == name.endswith("down_proj") for name, layer in layers.items())
    assert repr(next(iter(layers.values()))).startswith("ia3.Linear(")
    assert model.get_layer_status()[0].module_type == "ia3.Linear"
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["q"], "feedforward_modules": ["p"]}, ValueError, r"subset of target_modules; \['p'\] are"),
        ({"target_modules": 3}, TypeError, "target_modules must be a list"),
        ({"feedforward_modules": 3}, TypeError, "feedforward_modules must be a list"),
        ({"feedforward_modules": "("}, ValueError, r"feedforward_modules='\(' is no regular expression"),
        ({"target_modules": "("}, ValueError, r"target_modules='\(' is no regular expression"),
        ({"task_type": "no"}, ValueError, "task_type"),
    ],
)
def test_configs_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        IA3Config(**options)


def test_a_config_that_changed_is_checked_again():
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    config.feedforward_modules = {"p_proj"}
    with pytest.raises(ValueError, match="subset"):
        get_peft_model(models.tiny_llama(), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embed_tokens"], "feedforward_modules": []}, "is an Embedding"),
        ({"target_modules": ["no_such"], "feedforward_modules": []}, "matches no layer of LlamaForCausalLM"),
    ],
)
def test_targets_that_are_refused_leave_the_model_alone(options, message):
    model = models.tiny_llama()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, IA3Config(**options))
    assert [name for name, _ in model.named_modules()] == before


def test_families_without_defaults_must_name_both():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no default target_modules"):
        get_peft_model(model, IA3Config())
    with pytest.raises(ValueError, match=r"no default feedforward_modules .* or \[\] for none"):
        get_peft_model(model, IA3Config(target_modules=["0"]))


def test_names_that_scale_nothing_are_told():
    with pytest.warns(RuntimeWarning, match=r"feedforward_modules \['mlp.down_proj'\] match no targeted module"):
        tiny(target_modules=r".*k_proj", feedforward_modules=["mlp.down_proj"])


def test_one_layer_has_one_side():
    model = tiny(target_modules=["k_proj"], feedforward_modules=[])
    before = [name for name, _ in model.named_parameters()]
    other = IA3Config(target_modules=["k_proj"], feedforward_modules=["k_proj"])
    with pytest.raises(ValueError, match=r"scale the input of .*k_proj, whose adapters default scale the output"):
        model.add_adapter("other", other)
    assert [name for name, _ in model.named_parameters()] == before
    model.add_adapter("other", IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.delete_adapter("other")
    model.base_model.peft_config["default"] = other  # alone on its layers, an adapter may change sides
    model.base_model.inject_adapter(model.base_model.model, "default")
    assert {p.shape for name, p in model.named_parameters() if "ia3_l" in name} == {(1, 32)}


def test_other_methods_are_not_mixed_in():
    model, lora = tiny(), fastpeft.LoraConfig(target_modules=["k_proj"])
    with pytest.raises(ValueError, match="one method"):
        model.add_adapter("other", lora)
    with pytest.raises(ValueError, match="adapter of another method"), pytest.warns(UserWarning, match="has adapters"):
        fastpeft.inject_adapter_in_model(lora, model.base_model.model, "other")


def test_add_weighted_adapter_is_not_built_yet():
    with pytest.raises(AttributeError, match="add_weighted_adapter is not supported yet"):
        tiny().base_model.add_weighted_adapter  # noqa: B018


def test_unload_gives_the_base_back_and_merging_what_was_trained():
    base, inputs = models.tiny_llama(torch.bfloat16), models.batch("llama")
    expected = base(**inputs).logits
    model = get_peft_model(base, IA3Config(init_ia3_weights=False))
    assert not torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.unload()(**inputs).logits, expected)
    wrapped = get_peft_model(models.tiny_llama(), IA3Config(init_ia3_weights=False))
    adapted = wrapped(**inputs).logits
    torch.testing.assert_close(wrapped.merge_and_unload()(**inputs).logits, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_beside_another_adapter(low_cpu_mem_usage, tmp_path):
    model, inputs = tiny().eval(), models.batch("llama")
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model(**inputs).logits, expected)
    model.set_adapter("again")
    assert torch.equal(model(**inputs).logits, expected)


def test_reference_peft_recognises_the_tuner():
    import peft

    model = tiny()
    assert isinstance(model.base_model, peft.IA3Model)
    assert any(isinstance(module, reference.IA3Layer) for module in model.modules())


@side
def test_copies_and_pickles_compute_the_same(feedforward):
    layer, x = ia3("linear", feedforward), input_of()
    layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.unmerge()
        assert other.merged_adapters == []
        other.merge()
        torch.testing.assert_close(other(x), layer(x))
