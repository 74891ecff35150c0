"""The tuner: putting adapters on a model, and nothing half done when it fails."""

import copy

import models
import pytest
import torch
from torch import nn
from tuner_models import FAMILIES, add, assert_unchanged, is_adapted, logits, snapshot, tuner_of

from fastpeft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from fastpeft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from fastpeft.tuners.tuners_utils import BaseTuner

# Putting adapters on.


def test_the_first_adapter_freezes_the_base_and_the_tuner_looks_like_the_model():
    tuner = tuner_of()
    assert isinstance(tuner, BaseTuner)
    trainable = [name for name, p in tuner.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert tuner.config is tuner.model.config
    assert tuner.model.peft_config is tuner.peft_config
    assert tuner.active_adapters == ["default"]
    assert tuner.targeted_module_names[0] == "model.layers.0.self_attn.q_proj"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = tuner.nothing_of_the_kind
    with pytest.raises(AttributeError, match="add_weighted_adapter is not supported yet"):
        _ = tuner.add_weighted_adapter
    assert torch.equal(logits(tuner), logits(tuner.model))
    assert logits(copy.deepcopy(tuner)).equal(logits(tuner))


def test_a_frozen_adapter_for_inference():
    tuner = tuner_of(inference_mode=True, modules_to_save=["lm_head"])
    assert not any(p.requires_grad for p in tuner.parameters())


def test_a_second_adapter_changes_no_requires_grad_and_is_not_active():
    tuner = tuner_of(bias="all", modules_to_save=["norm"])
    norm = tuner.model.model.layers[0].input_layernorm.weight
    norm.requires_grad = True  # the user's own choice
    tuner.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight.requires_grad = False
    before = {id(p): p.requires_grad for p in tuner.parameters()}
    out = logits(tuner)
    add(tuner, "second", target_modules=["q_proj", "k_proj", "embed_tokens"], modules_to_save=["lm_head"])
    new = [p for p in tuner.parameters() if id(p) not in before]
    assert new
    assert not any(p.requires_grad for p in new)
    assert all(p.requires_grad == before[id(p)] for p in tuner.parameters() if id(p) in before)
    assert tuner.active_adapters == ["default"]
    assert torch.equal(logits(tuner), out)


def test_a_second_adapter_of_a_frozen_model_leaves_the_first_frozen():
    tuner = tuner_of(inference_mode=True)
    add(tuner, "second")
    assert not any(p.requires_grad for p in tuner.parameters())


@pytest.mark.parametrize(("bias", "some"), [("all", "c_proj"), ("lora_only", "c_attn")])
def test_bias(bias, some):
    tuner = tuner_of("gpt2", target_modules=["c_attn"], bias=bias)
    trained = {n for n, p in tuner.named_parameters() if p.requires_grad and "lora_" not in n}
    assert all(name.endswith("bias") for name in trained)
    assert any(some in name for name in trained)
    assert any("ln_f" in name for name in trained) == (bias == "all")
    before = snapshot(tuner)
    with pytest.raises(ValueError, match="only one adapter of a model can train biases"):
        LoraModel(tuner.model, LoraConfig(target_modules=["c_fc"], bias="all"), "second")
    assert_unchanged(tuner, before)
    assert list(tuner.peft_config) == ["default"]
    with pytest.warns(UserWarning, match="trains biases"):
        tuner.disable_adapter_layers()


def test_ranks_by_pattern_reach_the_layers():
    tuner = tuner_of(rank_pattern={"q_proj": 3}, alpha_pattern={r"layers\.1\.self_attn\.v_proj": 40}, use_rslora=True)
    layers = tuner.model.model.layers
    assert layers[0].self_attn.q_proj.r["default"] == 3
    assert layers[0].self_attn.v_proj.r["default"] == 4
    assert layers[0].self_attn.v_proj.scaling["default"] == pytest.approx(8 / 2)
    assert layers[1].self_attn.v_proj.scaling["default"] == pytest.approx(40 / 2)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward", 3])
def test_names_that_cannot_be_keys_of_a_module(name):
    model = models.tiny_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        LoraModel(model, LoraConfig(), name)
    assert_unchanged(model, before)


def test_the_same_name_again_replaces_the_adapter_everywhere():
    tuner = tuner_of(target_modules=["q_proj", "v_proj"])
    with pytest.warns(UserWarning, match="has adapters already"):
        again = LoraModel(tuner.model, LoraConfig(target_modules=["v_proj"], r=3), "default")
    attention = again.model.model.layers[0].self_attn
    assert attention.q_proj.r == {}
    assert attention.v_proj.r == {"default": 3}
    torch.testing.assert_close(logits(again), logits(models.tiny_llama()))


def test_a_second_tuner_on_the_same_model_adds_an_active_adapter():
    first = tuner_of()
    with pytest.warns(UserWarning, match="has adapters already"):
        second = LoraModel(first.model, LoraConfig(target_modules=["k_proj"]), "second")
    assert first.peft_config is second.peft_config
    assert list(second.peft_config) == ["default", "second"]
    assert first.model.model.layers[0].self_attn.q_proj.active_adapters == ["second"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"target_modules": ["q_proj", "norm"]}, ValueError, "LlamaRMSNorm"),
        ({"target_modules": ["q_proj", "embed_tokens"], "lora_bias": True}, ValueError, "embed_tokens.*has no bias"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["layers"]}, TypeError, "ModuleList"),
        ({"target_modules": ["nowhere"]}, ValueError, "matches no layer"),
    ],
)
def test_a_failed_injection_leaves_the_model_alone(options, error, match):
    model = models.tiny_llama()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        LoraModel(model, LoraConfig(**options), "default")
    assert_unchanged(model, before)
    assert not hasattr(model, "peft_config")
    tuner = LoraModel(model, LoraConfig(target_modules=["q_proj"]), "default")
    before = snapshot(tuner)
    tuner.peft_config["second"] = LoraConfig(**options)
    with pytest.raises(error, match=match):
        tuner.inject_adapter(tuner.model, "second")
    assert_unchanged(tuner, before)


def test_running_out_of_memory_halfway_leaves_the_model_alone(monkeypatch):
    model = models.tiny_llama()
    before = snapshot(model)
    create, calls = LoraLayer.update_layer, []

    def fail_at_the_third(layer, *args, **kwargs):
        calls.append(layer)
        create(layer, *args, **kwargs)
        if len(calls) == 3:
            raise MemoryError("boom")

    monkeypatch.setattr(LoraLayer, "update_layer", fail_at_the_third)
    with pytest.raises(MemoryError, match="boom"):
        LoraModel(model, LoraConfig(target_modules=["q_proj", "v_proj"]), "default")
    assert_unchanged(model, before)
    monkeypatch.undo()
    tuner = LoraModel(model, LoraConfig(target_modules=["q_proj"]), "default")
    before, out = snapshot(tuner), logits(tuner)
    calls.clear()
    monkeypatch.setattr(LoraLayer, "update_layer", fail_at_the_third)
    tuner.peft_config["second"] = LoraConfig(target_modules=["q_proj", "v_proj"])
    with pytest.raises(MemoryError, match="boom"):
        tuner.inject_adapter(tuner.model, "second")
    assert_unchanged(tuner, before)
    assert torch.equal(logits(tuner), out)


def test_modules_to_save_cannot_be_an_adapted_layer_or_part_of_one():
    tuner = tuner_of(name="q_proj", target_modules=["q_proj"])
    before = snapshot(tuner)
    with pytest.raises(ValueError, match="a part of an adapter layer"):
        add(tuner, "second", modules_to_save=["q_proj"])
    tuner2 = tuner_of(target_modules=["q_proj"])
    with pytest.raises(TypeError, match="no adapter on it"):
        add(tuner2, "second", modules_to_save=["q_proj"])
    assert_unchanged(tuner, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_low_cpu_mem_usage_creates_the_adapter_on_meta(family):
    model = models.build(family)
    config = LoraConfig(target_modules=[*models.TARGETS[family], "wte" if family == "gpt2" else "embed_tokens"])
    tuner = LoraModel(model, config, "default", low_cpu_mem_usage=True)
    for name, parameter in tuner.named_parameters():
        assert parameter.is_meta == ("lora_" in name), name
    with pytest.raises(ValueError, match="no weights yet"):
        tuner.merge_adapter()


def test_tied_embeddings_are_warned_of():
    model = models.tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head share their weight"):
        tuner = LoraModel(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False), "default")
    with pytest.warns(UserWarning, match="merging changes both"):
        tuner.merge_adapter()
    with pytest.warns(UserWarning, match="embed_tokens share their weight"):
        LoraModel(
            models.tiny_llama(tie_word_embeddings=True),
            LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
            "default",
        )


def test_untied_embeddings_after_a_merge_are_written_into_the_config():
    model = models.tiny_llama(tie_word_embeddings=True)
    tuner = LoraModel(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), "default")
    with pytest.warns(UserWarning, match="tie_word_embeddings is False now"):
        merged = tuner.merge_and_unload()
    assert merged.config.tie_word_embeddings is False


# Helpers.


def test_rescale_adapter_scale():
    tuner = tuner_of().eval()
    out = logits(tuner)
    with rescale_adapter_scale(tuner, 0):
        torch.testing.assert_close(logits(tuner), logits(models.tiny_llama()))
    assert torch.equal(logits(tuner), out)
    with pytest.raises(RuntimeError, match="boom"), rescale_adapter_scale(tuner, 2):
        raise RuntimeError("boom")
    assert torch.equal(logits(tuner), out)
    with pytest.raises(TypeError, match="must be a number"), rescale_adapter_scale(tuner, "2"):
        pass
    with pytest.raises(ValueError, match="no LoRA layer"), rescale_adapter_scale(nn.Linear(2, 3), 2):
        pass


def test_disable_input_dtype_casting():
    tuner = tuner_of()
    layers = [m for m in tuner.modules() if is_adapted(m)]
    layers[0].cast_input_dtype_enabled = False
    with disable_input_dtype_casting(tuner):
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
    with disable_input_dtype_casting(tuner, active=False):
        assert [layer.cast_input_dtype_enabled for layer in layers] == [False] + [True] * (len(layers) - 1)
