"""Adapters of a PeftModel, and the ways to make one: what they do and what they refuse."""

import warnings

import pytest
import torch
from adapted_models import adapted, assert_same_state, config_for, logits, snapshot
from models import tiny_llama
from torch import nn

import fastpeft
from fastpeft import LoraConfig, get_peft_config, get_peft_model, inject_adapter_in_model

# ---- adapters ----


def test_adding_switching_and_deleting_adapters():
    model = adapted()
    first = logits(model)
    model.add_adapter("other", config_for("llama", r=3))
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert model.active_adapter == "other"
    assert not torch.equal(logits(model), first)
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"other"}
    with pytest.warns(UserWarning, match="default"):
        model.delete_adapter("other")
    assert model.active_adapter == "default"
    assert torch.equal(logits(model), first)
    assert not [name for name, _ in model.named_parameters() if ".other." in name]


def test_set_adapter_for_inference_freezes():
    model = adapted()
    model.set_adapter("default", inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_requires_grad("default")
    assert model.get_nb_trainable_parameters()[0] > 0


def test_several_active_adapters_add_up():
    model = adapted()
    model.add_adapter("other", config_for("llama"))
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    assert model.active_adapter == "default"
    both = logits(model)
    model.set_adapter("default")
    assert not torch.equal(logits(model), both)


def test_without_its_last_adapter_the_model_is_the_base():
    base = tiny_llama()
    plain = logits(base)
    model = get_peft_model(base, config_for("llama")).eval()
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="no adapter is active"):
        model.active_peft_config  # noqa: B018


def test_disable_adapter_nests_and_keeps_a_disabled_model_disabled():
    model = adapted()
    active = logits(model)
    with model.disable_adapter():
        base = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
        assert not model.has_active_enabled_adapter
    assert torch.equal(logits(model), active)
    assert model.has_active_enabled_adapter
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model), base)


def test_disable_adapter_warns_when_layers_disagree():
    model = adapted()
    next(m for m in model.modules() if hasattr(m, "lora_A")).enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers"), model.disable_adapter():
        pass
    assert model.get_model_status().enabled is True


@pytest.mark.parametrize("name", ["", "a.b", None, 3], ids=repr)
def test_adapter_names_that_cannot_be_used(name):
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match="adapter name"):
        get_peft_model(base, config_for("llama"), adapter_name=name)
    assert_same_state(base, before)


def test_an_adapter_name_inside_the_prefix_warns():
    with pytest.warns(UserWarning, match="choose another name"):
        get_peft_model(tiny_llama(), config_for("llama"), adapter_name="lora")


def test_adapters_that_cannot_be_added_change_nothing():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match="exists already"):
        model.add_adapter("default", config_for("llama"))
    with pytest.raises(ValueError, match="no_such_layer"):
        model.add_adapter("other", config_for("llama", target_modules=["no_such_layer"]))
    wrong_method = config_for("llama")
    wrong_method.peft_type = fastpeft.PeftType.IA3
    with pytest.raises(ValueError, match="one method"):
        model.add_adapter("other", wrong_method)
    assert list(model.peft_config) == ["default"]
    assert_same_state(model, before)


def test_unknown_adapters():
    model = adapted()
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match=r"no adapter 'nobody'; this model has \['default'\]"):
            call("nobody")
    with pytest.raises(TypeError, match=r"base_model\.set_adapter"):
        model.set_adapter(["default"])


# ---- making models ----


def test_get_peft_model_notes_the_base_model():
    base = tiny_llama()
    base.name_or_path = "some/base"
    config = config_for("llama", revision="old")
    with pytest.warns(UserWarning, match="'old' becomes 'new'"):
        get_peft_model(base, config, revision="new")
    assert (config.base_model_name_or_path, config.revision) == ("some/base", "new")
    other = tiny_llama()
    other.name_or_path = "other/base"
    with pytest.warns(UserWarning, match="made for base model 'some/base'"):
        get_peft_model(other, config)


@pytest.mark.filterwarnings("ignore:this model has adapters already")
def test_wrapping_twice_warns():
    model = adapted()
    with pytest.warns(UserWarning, match="already has adapter layers"):
        get_peft_model(model.get_base_model(), config_for("llama"))


def test_mixed_models_are_not_there_yet():
    with pytest.raises(NotImplementedError, match="not supported yet"):
        get_peft_model(tiny_llama(), config_for("llama"), mixed=True)


def test_low_cpu_mem_usage_makes_no_weights():
    model = get_peft_model(tiny_llama(), config_for("llama"), low_cpu_mem_usage=True)
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    assert adapter
    assert all(p.is_meta for p in adapter)
    assert not any(p.is_meta for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("autocast", [True, False])
def test_adapter_dtype_over_a_bf16_base(autocast):
    model = get_peft_model(tiny_llama(torch.bfloat16), config_for("llama"), autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}


def test_get_peft_config():
    config = get_peft_config({"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"]})
    assert isinstance(config, LoraConfig)
    assert config.r == 3
    with pytest.raises(ValueError, match="peft_type"):
        get_peft_config({"r": 3})
    with pytest.raises(NotImplementedError, match="OFT"):
        get_peft_config({"peft_type": "OFT"})


def test_inject_adapter_in_model_returns_the_model_itself():
    base = tiny_llama()
    model = inject_adapter_in_model(config_for("llama"), base, adapter_name="mine")
    assert model is base
    assert any("lora_A.mine" in name for name, _ in model.named_parameters())
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_inject_adapter_by_the_keys_of_a_state_dict():
    keys = {"model.layers.1.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the config names other layers
        model = inject_adapter_in_model(config_for("llama"), tiny_llama(), state_dict=keys)
    adapted_layers = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted_layers == {"model.layers.1.mlp.up_proj"}


def test_gradient_checkpointing_model_without_the_usual_methods():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 5)), LoraConfig(r=2, target_modules=["0"]))
    assert model.prepare_model_for_gradient_checkpointing(model.get_base_model()) is model.get_base_model()

    class WithEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.proj = nn.Embedding(7, 3), nn.Linear(3, 5)

        def get_input_embeddings(self):
            return self.emb

        def forward(self, x):
            hidden = self.emb(x)
            assert hidden.requires_grad
            return self.proj(hidden)

    get_peft_model(WithEmbedding(), LoraConfig(r=2, target_modules=["proj"]))(torch.tensor([1, 2]))
