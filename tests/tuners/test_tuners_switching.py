"""The tuner: switching, merging and removing adapters, and batches of mixed ones."""

import models
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from tuner_models import FAMILIES, add, assert_unchanged, is_adapted, logits, snapshot, tuner_of

from fastpeft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from fastpeft.tuners.switching import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad

# Switching.


def test_set_adapter_trains_the_active_and_freezes_the_rest():
    tuner = tuner_of()
    add(tuner, "second", target_modules=["q_proj"])
    layer = tuner.model.model.layers[0].self_attn.q_proj
    for active, inference_mode in [("second", False), (["default", "second"], False), (["second"], True)]:
        tuner.set_adapter(active, inference_mode=inference_mode)
        names = [active] if isinstance(active, str) else active
        assert tuner.active_adapters == layer.active_adapters == names
        for name in ("default", "second"):
            assert layer.lora_A[name].weight.requires_grad == (name in names and not inference_mode)


def test_unknown_adapters_are_refused_everywhere():
    tuner = tuner_of()
    before = snapshot(tuner)
    for call in (
        lambda: tuner.set_adapter("typo"),
        lambda: tuner.set_adapter(["default", "typo"]),
        lambda: tuner.set_requires_grad("typo"),
        lambda: tuner.delete_adapter("typo"),
        lambda: tuner.merge_adapter(["typo"]),
        lambda: tuner.merge_and_unload(adapter_names=["typo"]),
        lambda: delete_adapter(tuner.model, "typo", "lora_"),
    ):
        with pytest.raises(ValueError, match=r"no adapter 'typo'.*default"):
            call()
    assert_unchanged(tuner, before)


def test_disabling_is_the_base_model_and_enabling_restores_what_was_trainable():
    base = models.tiny_llama()
    tuner = tuner_of(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    tuner.model.model.layers[0].self_attn.q_proj.set_requires_grad("default", False)
    before = {n: p.requires_grad for n, p in tuner.named_parameters()}
    out = logits(tuner)
    tuner.disable_adapter_layers()
    tuner.disable_adapter_layers()
    assert torch.equal(logits(tuner), logits(base))
    assert not any(p.requires_grad for p in tuner.parameters())
    tuner.enable_adapter_layers()
    assert {n: p.requires_grad for n, p in tuner.named_parameters()} == before
    assert torch.equal(logits(tuner), out)


def test_a_model_for_inference_stays_frozen_through_disabling():
    tuner = tuner_of(inference_mode=True, modules_to_save=["lm_head"])
    tuner.disable_adapter_layers()
    tuner.enable_adapter_layers()
    assert not any(p.requires_grad for p in tuner.parameters())


def test_enabling_what_was_never_disabled_trains_the_active_adapters():
    tuner = tuner_of()
    tuner.set_requires_grad("default", False)
    tuner.enable_adapter_layers()
    assert all(p.requires_grad == ("lora_" in n) for n, p in tuner.named_parameters())


def test_deleting_adapters():
    tuner = tuner_of(modules_to_save=["lm_head"])
    add(tuner, "a", target_modules=["down_proj"])
    add(tuner, "b", target_modules=["q_proj"])
    tuner.delete_adapter("b")  # not active: nothing else changes
    assert tuner.active_adapters == ["default"]
    assert list(tuner.peft_config) == ["default", "a"]
    with pytest.warns(UserWarning, match="'a' is active now") as caught:
        tuner.delete_adapter("default")
    assert len(caught) == 1
    assert tuner.active_adapters == ["a"]
    assert {tuple(m.active_adapters) for m in tuner.modules() if is_adapted(m)} == {("a",)}
    assert all(p.requires_grad == (".a." in n) for n, p in tuner.named_parameters() if "lora_" in n)
    tuner.delete_adapter("a")
    assert tuner.active_adapters == []
    assert not any("lora_" in name for name, _ in tuner.named_parameters())
    assert torch.equal(logits(tuner), logits(models.tiny_llama()))


def test_a_merged_adapter_is_not_deleted_or_replaced():
    tuner = tuner_of()
    tuner.merge_adapter()
    before = snapshot(tuner)
    with pytest.raises(ValueError, match="merged into the base model; call unmerge_adapter"):
        tuner.delete_adapter("default")
    with pytest.raises(ValueError, match="merged into the base model; call unmerge_adapter"):
        tuner.inject_adapter(tuner.model, "default")
    assert_unchanged(tuner, before)


def test_activating_another_adapter_unmerges():
    tuner = tuner_of()
    add(tuner, "second")
    tuner.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged before"):
        tuner.set_adapter("second")
    assert not any(m.merged for m in tuner.modules() if is_adapted(m))


def test_functions_for_models_without_a_tuner():
    model = tuner_of("llama", torch.bfloat16, modules_to_save=["lm_head"]).model
    second = LoraModel(model, LoraConfig(target_modules=["k_proj"]), "second").model
    assert second is model
    set_adapter(model, "default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    set_requires_grad(model, ["default"], True)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == torch.bfloat16
    cast_adapter_dtype(model, "default")
    assert model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.k_proj.lora_A["second"].weight.dtype == torch.bfloat16
    assert delete_adapter(model, "second", "lora_") == ["default"]
    assert delete_adapter(model, "default", "lora_", LoraLayer) is None


# Merging and removing.


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unload_gives_a_plain_model_with_the_adapters_output(family):
    tuner = tuner_of(family).eval()
    out = logits(tuner, family)
    merged = tuner.merge_and_unload(safe_merge=True, progressbar=True)
    torch.testing.assert_close(logits(merged, family), out, rtol=1e-4, atol=1e-4)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [
        (n, type(m)) for n, m in models.build(family).named_modules()
    ]
    assert not hasattr(merged, "peft_config")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_unload_gives_the_base_back_bit_by_bit(family, dtype):
    base = models.build(family, dtype)
    tuner = tuner_of(family, dtype, modules_to_save=["classifier", "lm_head"])
    for parameter in tuner.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    unloaded = tuner.unload()
    theirs, ours = base.state_dict(), unloaded.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    with torch.no_grad():  # attention on CPU takes another kernel where gradients are wanted
        assert torch.equal(logits(unloaded, family), logits(base, family))


def test_merging_named_adapters_only():
    tuner = tuner_of()
    add(tuner, "second", target_modules=["q_proj"])
    layer = tuner.model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("second")
    merged = tuner.merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, expected)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_fails_on_one_layer_merges_none(how):
    tuner = tuner_of()
    tuner.model.model.layers[1].mlp.down_proj.lora_B["default"].weight.data.fill_(float("inf"))
    before = snapshot(tuner)
    with pytest.raises(ValueError, match="NaN or infinity"):
        getattr(tuner, how)(safe_merge=True)
    assert_unchanged(tuner, before)
    with pytest.raises(TypeError, match="list of names"):
        getattr(tuner, how)(adapter_names="default")
    assert_unchanged(tuner, before)


def test_an_adapter_bias_without_a_base_bias_merges_nowhere():
    tuner = tuner_of("t5", target_modules=["q"], lora_bias=True)
    before = snapshot(tuner)
    with pytest.raises(RuntimeError, match="the base layer has none"):
        tuner.merge_adapter()
    assert_unchanged(tuner, before)


def test_offloaded_layers_are_merged_where_they_are():
    plain = tuner_of()
    plain.merge_adapter()
    tuner = tuner_of()
    cpu_offload(tuner.model, execution_device=torch.device("cpu"))
    layer = tuner.model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.is_meta
    assert isinstance(layer.base_layer._hf_hook, AlignDevicesHook)
    tuner.merge_adapter(safe_merge=True)
    assert layer.base_layer.weight.is_meta
    torch.testing.assert_close(logits(tuner), logits(plain))
    expected = plain.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(layer.base_layer._hf_hook.weights_map["weight"], expected)
    tuner.unmerge_adapter()
    torch.testing.assert_close(logits(tuner), logits(tuner_of()))


# Batches of mixed adapters.


def test_names_of_a_mixed_batch_are_checked():
    tuner = tuner_of().train()
    names = ["default", "__base__", "default"]
    before = logits(tuner)
    with pytest.raises(TypeError, match="one name per row"), tuner._enable_peft_forward_hooks(adapter_names="default"):
        pass
    with (
        pytest.raises(ValueError, match=r"no adapter \['typo'\]; there are \['default'\]"),
        tuner._enable_peft_forward_hooks(adapter_names=["typo"] * 3),
    ):
        pass
    with pytest.raises(RuntimeError, match="boom"), tuner._enable_peft_forward_hooks(adapter_names=names):
        raise RuntimeError("boom")
    assert torch.equal(logits(tuner), before)
