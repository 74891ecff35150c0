"""get_layer_status and get_model_status: what they report, and when they call it irregular."""

import pytest
import torch
from models import LAYERS, tiny_bert_classifier, tiny_llama, tiny_t5
from torch import nn

from fastpeft import LoraConfig, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from fastpeft.status import count_parameters

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def model():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model


def test_layer_status(model):
    layers = model.get_layer_status()
    assert len(layers) == 2 * LAYERS
    first = next(layer for layer in layers if layer.name == "model.model.layers.0.self_attn.q_proj")
    assert vars(first) == {
        "name": "model.model.layers.0.self_attn.q_proj",
        "module_type": "lora.Linear",
        "enabled": True,
        "active_adapters": ["default"],
        "merged_adapters": [],
        "requires_grad": {"default": True, "other": False},
        "available_adapters": ["default", "other"],
        "devices": {"default": ["cpu"], "other": ["cpu"]},
        "quantization_backend": None,
    }
    assert {tuple(layer.available_adapters) for layer in layers} == {("default", "other"), ("default",)}


def test_model_status(model):
    status = model.get_model_status()
    trainable, total = model.get_nb_trainable_parameters()
    assert vars(status) == {
        "base_model_type": "LlamaForCausalLM",
        "adapter_model_type": "LoraModel",
        "peft_types": {"default": "LORA", "other": "LORA"},
        "trainable_params": trainable,
        "total_params": total,
        "num_adapter_layers": 2 * LAYERS,
        "enabled": True,
        "active_adapters": ["default"],
        "merged_adapters": [],
        "requires_grad": {"default": True, "other": False},
        "available_adapters": ["default", "other"],
        "devices": {"default": ["cpu"], "other": ["cpu"]},
        "quantization_backend": None,
    }


def test_heads_count_as_adapter_layers():
    model = get_peft_model(tiny_bert_classifier(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    names = [layer.name for layer in model.get_layer_status() if layer.module_type == "ModulesToSaveWrapper"]
    assert names == ["model.classifier"]


def test_status_follows_the_model(model):
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.set_adapter("other")
    assert model.get_model_status().active_adapters == ["other"]
    model.base_model.set_adapter(["default", "other"])
    assert model.get_model_status().active_adapters == ["default", "other"]
    model.set_adapter("default")
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_irregular(model):
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    layer.enable_adapters(True)
    layer.merge()
    assert model.get_model_status().merged_adapters == "irregular"
    layer.unmerge()
    layer.lora_A["default"].weight.requires_grad_(False)
    assert model.get_layer_status()[0].requires_grad["default"] == "irregular"
    assert model.get_model_status().requires_grad == {"default": "irregular", "other": False}
    layer.set_adapter("other")
    assert model.get_model_status().active_adapters == "irregular"


def test_a_model_with_injected_adapters():
    transformer = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q"]), tiny_t5())
    status = get_model_status(transformer)
    assert (status.base_model_type, status.adapter_model_type) == ("T5ForConditionalGeneration", "None")
    assert status.peft_types == {}

    plain = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(3, 5)))
    status = get_model_status(plain)
    assert (status.base_model_type, status.total_params) == ("other", 3 * 5 + 5 + 2 * (3 + 5))


def test_a_model_without_adapters():
    for function in (get_layer_status, get_model_status):
        with pytest.raises(ValueError, match="no adapter layer"):
            function(nn.Linear(3, 5))


def test_meta_weights_are_told_apart():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS), low_cpu_mem_usage=True)
    assert model.get_model_status().devices == {"default": ["meta"]}


def test_count_parameters_looks_through_packing_and_sharding():
    class Params4bit(nn.Parameter):  # bitsandbytes' name: two values a byte
        pass

    packed = nn.Module()
    packed.weight = Params4bit(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    packed.wide = Params4bit(torch.zeros(3, 1, dtype=torch.float16), requires_grad=False)
    assert count_parameters(packed) == (0, 12 + 12)

    sharded = nn.Module()
    sharded.weight = nn.Parameter(torch.zeros(0))
    sharded.weight.ds_numel = 35  # DeepSpeed's name for the size before it partitioned the weight away
    assert count_parameters(sharded) == (35, 35)
