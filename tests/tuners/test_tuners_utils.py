"""The tuner: putting adapters on a model, switching, merging, removing them. And nothing half done when it fails."""

import copy

import models
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from torch import nn

from fastpeft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from fastpeft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from fastpeft.tuners.switching import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from fastpeft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

FAMILIES = ["llama", "gpt2", "bert_classifier", "t5"]


def tuner_of(family="llama", dtype=torch.float32, name="default", **options):
    options = {"target_modules": models.TARGETS[family], "r": 4, "init_lora_weights": False} | options
    torch.manual_seed(1)
    return LoraModel(models.build(family, dtype), LoraConfig(**options), name)


def add(tuner, name, **options):
    tuner.peft_config[name] = LoraConfig(**{"r": 2, "target_modules": ["k_proj"], "init_lora_weights": False} | options)
    tuner.inject_adapter(tuner.model, name)


def logits(model, family="llama", **kwargs):
    return model(**models.batch(family), **kwargs).logits


def snapshot(model):
    """Everything that a failed call has to leave alone."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        [(m.active_adapters, m.disable_adapters, list(m.merged_adapters)) for m in model.modules() if is_adapted(m)],
    )


def is_adapted(module):
    return isinstance(module, BaseTunerLayer)


def assert_unchanged(model, before):
    modules, parameters, states = snapshot(model)
    assert modules == before[0]
    assert [p[:3] for p in parameters] == [p[:3] for p in before[1]]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(parameters, before[1], strict=True))
    assert states == before[2]


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
