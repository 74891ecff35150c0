"""Modules that an adapter trains whole: one copy per adapter, the original kept."""

import copy
import pickle

import models
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from fastpeft.tuners.lora import LoraConfig, LoraModel
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from fastpeft.utils.trainable import set_auxiliary_adapter, set_trainable


def wrapper_of(*names, module=None):
    wrapper = ModulesToSaveWrapper(module or nn.Linear(6, 4), names[0])
    for name in names[1:]:
        wrapper.update(name)
    for i, name in enumerate(names):
        wrapper.modules_to_save[name].weight.data.add_(i + 1)
    wrapper.set_adapter(names[0])
    return wrapper


def trainable(wrapper):
    return sorted({n.split(".")[1] for n, p in wrapper.named_parameters() if p.requires_grad})


def test_the_active_copy_runs_and_is_trained():
    wrapper = wrapper_of("a", "b")
    x = torch.randn(3, 6)
    assert torch.equal(wrapper(x), wrapper.modules_to_save["a"](x))
    assert trainable(wrapper) == ["a"]
    assert wrapper.active_adapter == wrapper.active_adapters == ["a"]
    wrapper.set_adapter(["b"])
    assert torch.equal(wrapper(x), wrapper.modules_to_save["b"](x))
    assert trainable(wrapper) == ["b"]
    wrapper.set_adapter("a", inference_mode=True)
    assert trainable(wrapper) == []
    wrapper.set_requires_grad(["a", "b"])
    assert trainable(wrapper) == ["a", "b"]
    wrapper.set_requires_grad("a", False)
    assert trainable(wrapper) == ["b"]
    wrapper.set_adapter([])
    assert trainable(wrapper) == []
    assert torch.equal(wrapper(x), wrapper.original_module(x))


def test_disabled_runs_the_original_and_restores_what_was_trainable():
    wrapper = wrapper_of("a", "b")
    wrapper.set_requires_grad(["a", "b"])
    x = torch.randn(3, 6)
    for _ in range(2):
        wrapper.enable_adapters(False)
        assert wrapper.disable_adapters
        assert trainable(wrapper) == []
        assert torch.equal(wrapper(x), wrapper.original_module(x))
        assert torch.equal(wrapper(x, adapter_names=["a"] * 3), wrapper.original_module(x))
    wrapper.enable_adapters(True)
    assert trainable(wrapper) == ["a", "b"]
    assert torch.equal(wrapper(x), wrapper.modules_to_save["a"](x))


def test_attributes_are_those_of_what_would_run():
    wrapper = wrapper_of("a", "b")
    assert wrapper.weight is wrapper.modules_to_save["a"].weight
    assert wrapper.in_features == 6
    wrapper.set_adapter("b")
    assert wrapper.weight is wrapper.modules_to_save["b"].weight
    wrapper.enable_adapters(False)
    assert wrapper.weight is wrapper.original_module.weight
    wrapper.enable_adapters(True)
    wrapper.set_adapter([])
    assert wrapper.weight is wrapper.original_module.weight
    assert not hasattr(wrapper, "nothing_of_the_kind")


def test_copies_and_pickles():
    wrapper = wrapper_of("a", "b")
    x = torch.randn(3, 6)
    for other in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert torch.equal(other(x), wrapper(x))
        other.modules_to_save["a"].weight.data.zero_()
        assert not torch.equal(other(x), wrapper(x))


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Embedding(9, 4), lambda: nn.Conv1d(6, 4, 1)])
def test_each_row_goes_through_the_copy_of_its_own_adapter(make):
    wrapper = wrapper_of("a", "b", module=make())
    if isinstance(wrapper.original_module, nn.Embedding):
        x = torch.randint(0, 9, (5, 7))
    else:
        x = torch.randn(5, 6, 7) if isinstance(wrapper.original_module, nn.Conv1d) else torch.randn(5, 7, 6)
    names = ["b", "__base__", "a", "elsewhere", "b"]
    out = wrapper(x, adapter_names=names)
    for row, name in enumerate(names):
        if name in ("a", "b"):
            torch.testing.assert_close(out[row], wrapper.modules_to_save[name](x)[row])
        else:
            assert torch.equal(out[row], wrapper.original_module(x)[row])
    with pytest.raises(ValueError, match="expected 5 names, got 2"):
        wrapper(x, adapter_names=["a", "b"])


def test_rows_cannot_be_told_apart_in_any_module():
    wrapper = ModulesToSaveWrapper(nn.Sequential(nn.Linear(6, 4)), "a")
    with pytest.raises(TypeError, match="whole Sequential"):
        wrapper(torch.randn(2, 6), adapter_names=["a", "__base__"])


@pytest.mark.parametrize("module", [nn.ModuleDict(), nn.ModuleList(), nn.ParameterDict(), nn.ParameterList()])
def test_containers_have_no_forward_to_wrap(module):
    with pytest.raises(TypeError, match=f"applied to {type(module).__name__}"):
        ModulesToSaveWrapper(module, "a")


def test_two_copies_of_one_module_cannot_both_be_active():
    wrapper = wrapper_of("a", "b")
    with pytest.raises(ValueError, match="one adapter at a time"):
        wrapper.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="no adapter 'c' here"):
        wrapper.set_adapter("c")
    model = nn.ModuleDict({"one": wrapper_of("b", "c"), "two": wrapper, "three": wrapper_of("a", "c")})
    with pytest.raises(ValueError, match="only one active adapter may train a whole module"):
        set_auxiliary_adapter(model, ["a", "b"])
    assert [module.active_adapters for module in model.values()] == [["b"], ["a"], ["a"]]
    set_auxiliary_adapter(model, ["b", "elsewhere"])
    assert [module.active_adapters for module in model.values()] == [["b"], ["b"], []]


@pytest.mark.parametrize(
    ("deleted", "new_active", "active"),
    [("a", ["b"], ["b"]), ("a", None, []), ("a", ["elsewhere"], []), ("b", ["a"], ["a"]), ("c", ["b"], ["a"])],
)
def test_deleting_an_adapter(deleted, new_active, active):
    wrapper = wrapper_of("a", "b")
    wrapper.delete_adapter(deleted, new_active)
    assert wrapper.active_adapters == active
    assert wrapper._get_available_adapters() == {"a", "b"} - {deleted}
    assert list(wrapper.modules_to_save) == sorted({"a", "b"} - {deleted})
    assert trainable(wrapper) == active


def test_state_dicts_are_by_adapter_and_named_as_the_original():
    wrapper = wrapper_of("a", "b")
    state_dict = wrapper.state_dict()
    saved = wrapper.adapter_state_dict("b", state_dict)
    assert list(saved) == ["weight", "bias"]
    assert torch.equal(saved["weight"], wrapper.modules_to_save["b"].weight)
    loaded = wrapper.adapter_state_dict_load_map("b")
    assert loaded == {"weight": "modules_to_save.b.weight", "bias": "modules_to_save.b.bias"}
    assert set(loaded.values()) < set(state_dict)
    assert wrapper.adapter_state_dict("elsewhere", state_dict) == wrapper.adapter_state_dict_load_map("elsewhere") == {}


def test_unloading():
    wrapper = wrapper_of("a", "b")
    assert wrapper.unload_and_optionally_merge_module(False, False, None) is wrapper.original_module
    assert wrapper.unload_and_optionally_merge_module(True, False, None) is wrapper.modules_to_save["a"]
    assert wrapper.unload_and_optionally_merge_module(True, False, ["b"]) is wrapper.modules_to_save["b"]
    assert wrapper.unload_and_optionally_merge_module(True, False, ["elsewhere"]) is wrapper.original_module


def test_a_copy_of_a_hooked_module_has_hooks_of_its_own():
    module = nn.Linear(6, 4)
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    wrapper = ModulesToSaveWrapper(module, "a")
    copied = wrapper.modules_to_save["a"]
    assert isinstance(copied._hf_hook, AlignDevicesHook)
    assert copied._hf_hook is not module._hf_hook
    copied.weight.data.zero_()
    assert torch.equal(wrapper(torch.randn(2, 6)), copied.bias.expand(2, 4))


# On a model.


def test_wrapping_by_the_end_of_the_path():
    model = models.tiny_bert_classifier()
    new = set_trainable(model, "a", ["classifier", "score"], inference_mode=False)
    assert new == [model.classifier]
    assert trainable(model.classifier) == ["a"]
    assert set_trainable(model, "b", {"classifier"}, inference_mode=False, activate_adapter=False) == []
    assert model.classifier.active_adapters == ["a"]
    assert trainable(model.classifier) == ["a"]
    assert set_trainable(model, "c", None, inference_mode=False) == []
    set_trainable(model, "b", ["classifier"], inference_mode=True)
    assert model.classifier.active_adapters == ["b"]
    assert trainable(model.classifier) == []


def test_only_the_outermost_module_is_wrapped():
    model = models.tiny_llama()
    set_trainable(model, "a", ["mlp", "up_proj"], inference_mode=False)
    wrappers = [name for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    assert wrappers == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_names_of_nothing():
    model = models.tiny_llama()
    with pytest.warns(UserWarning, match=r"modules_to_save=\['classifier', 'score'\] names no module"):
        set_trainable(model, "a", ["classifier", "score"], inference_mode=False)
    with pytest.raises(ValueError, match="names no module of LlamaForCausalLM"):
        set_trainable(model, "a", ["classifier"], inference_mode=False, strict_module_check=True)


def test_training_changes_the_copy_and_neither_the_original_nor_other_adapters():
    config = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    tuner = LoraModel(models.tiny_bert_classifier(), LoraConfig(**config), "default")
    tuner.peft_config["second"] = LoraConfig(**config)
    tuner.inject_adapter(tuner.model, "second")
    before = copy.deepcopy(tuner.state_dict())
    optimizer = torch.optim.SGD([p for p in tuner.parameters() if p.requires_grad], lr=1.0)
    tuner(**models.batch("bert_classifier")).loss.backward()
    optimizer.step()
    changed = {key for key, value in tuner.state_dict().items() if not torch.equal(value, before[key])}
    assert "model.classifier.modules_to_save.default.weight" in changed
    assert all(".default." in key for key in changed)


def test_an_adapter_without_the_module_leaves_it_to_the_original():
    tuner = LoraModel(
        models.tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "default"
    )
    tuner.model.lm_head.modules_to_save["default"].weight.data.zero_()
    tuner.peft_config["second"] = LoraConfig(target_modules=["q_proj"])
    tuner.inject_adapter(tuner.model, "second")
    assert not tuner(**models.batch("llama")).logits.any()
    tuner.set_adapter("second")
    torch.testing.assert_close(
        tuner(**models.batch("llama")).logits, models.tiny_llama()(**models.batch("llama")).logits
    )
    tuner.set_adapter(["default", "second"])
    assert not tuner(**models.batch("llama")).logits.any()


@pytest.mark.parametrize("field", ["modules_to_tie", "trainable_token_indices"])
def test_what_is_not_there_yet(field):
    from types import SimpleNamespace

    from fastpeft.utils.trainable import set_additional_trainable_modules

    config = SimpleNamespace(inference_mode=False, modules_to_save=None, **{field: ["lm_head"]})
    with pytest.raises(NotImplementedError, match=field):
        set_additional_trainable_modules(models.tiny_llama(), config, {}, "default")
