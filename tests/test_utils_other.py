"""Helpers that programs import from PEFT's utils."""

import inspect
from types import SimpleNamespace

import models
import pytest
import torch
from pairs import pair
from peft.utils import other as reference
from torch import nn

import fastpeft
from fastpeft import helpers, utils
from fastpeft.utils import other


def test_every_lazy_name_is_there():
    for name in utils.__all__:
        assert getattr(utils, name) is not None
    from fastpeft import functional, tuners
    from fastpeft.tuners import lora, tuners_utils

    for module in (functional, helpers, other, tuners, lora, tuners_utils):
        assert all(hasattr(module, name) for name in module.__all__)


def test_names_that_other_libraries_import_exist_under_peft_paths():
    from fastpeft.functional import delete_adapter
    from fastpeft.helpers import disable_input_dtype_casting, rescale_adapter_scale
    from fastpeft.tuners.lora import LoraConfig, LoraLayer, LoraModel
    from fastpeft.tuners.lora.layer import Embedding, Linear
    from fastpeft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from fastpeft.utils import ModulesToSaveWrapper, _get_submodules
    from fastpeft.utils.other import AuxiliaryTrainingWrapper, fsdp_auto_wrap_policy

    assert issubclass(LoraModel, BaseTuner)
    assert issubclass(Linear, LoraLayer)
    assert issubclass(Embedding, BaseTunerLayer)
    assert issubclass(ModulesToSaveWrapper, AuxiliaryTrainingWrapper)
    assert fastpeft.LoraConfig is LoraConfig
    for function in (delete_adapter, disable_input_dtype_casting, rescale_adapter_scale, _get_submodules):
        assert callable(function)
    assert callable(fsdp_auto_wrap_policy)


def test_shift_tokens_right():
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    assert other.shift_tokens_right(labels, 0, 2).tolist() == [[2, 5, 6], [2, 8, 0]]
    assert labels[1, 1] == -100
    with pytest.raises(ValueError, match="pad_token_id is None"):
        other.shift_tokens_right(labels, None, 2)


def test_transpose():
    weight = nn.Parameter(torch.randn(3, 5))
    assert other.transpose(weight, False) is weight
    assert isinstance(other.transpose(weight, True), nn.Parameter)
    assert torch.equal(other.transpose(weight.data, True), weight.T)


def test_submodules():
    model = models.tiny_llama()
    parent, target, name = other._get_submodules(model, "model.layers.1.mlp.up_proj")
    assert (parent, target, name) == (model.model.layers[1].mlp, model.model.layers[1].mlp.up_proj, "up_proj")
    assert other._get_submodules(model, "lm_head")[0] is model
    with pytest.raises(AttributeError):
        other._get_submodules(model, "model.nothing")


def test_freeze_adapter_takes_the_name_as_a_whole():
    model = nn.ModuleDict({"a": nn.ModuleDict({"default": nn.Linear(2, 2), "default2": nn.Linear(2, 2)})})
    other._freeze_adapter(model, "default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"a.default2.weight", "a.default2.bias"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("tied", [True, False])
def test_modules_tied_with_the_embedding(family, tied):
    model = models.build(family, tie_word_embeddings=tied)
    ours = other._get_module_names_tied_with_embedding(model)
    assert ours == reference._get_module_names_tied_with_embedding(model)
    if family != "t5":  # which ties whatever its config says
        assert bool(ours) == (tied and family != "bert")
    if ours:
        peft_model = pair(family, overrides={"tie_word_embeddings": tied}).ours
        assert other._get_module_names_tied_with_embedding(peft_model) == ours
        assert other._get_module_names_tied_with_embedding(peft_model.base_model) == ours


def test_input_embeddings_name():
    assert other._get_input_embeddings_name(models.tiny_gpt2()) == "transformer.wte"
    assert other._get_input_embeddings_name(nn.Linear(2, 2), "embed_tokens") == "embed_tokens"


@pytest.mark.parametrize(
    ("key", "target", "expected"), [("a.b", "b", True), ("b", "b", True), ("a.cb", "b", False), ("a.b.c", "b", False)]
)
def test_valid_match(key, target, expected):
    assert other._is_valid_match(key, target) is expected


def test_batch_size():
    assert other._get_batch_size(torch.zeros(3, 2), None) == 3
    assert other._get_batch_size(None, torch.zeros(4, 2, 5)) == 4
    with pytest.raises(ValueError, match="both are None"):
        other._get_batch_size(None, None)


def test_switches():
    assert [other.str_to_bool(word) for word in ("Yes", "on", "1", "TRUE")] == [True] * 4
    assert [other.str_to_bool(word) for word in ("no", "Off", "0", "f")] == [False] * 4
    with pytest.raises(ValueError, match="expected a yes or no"):
        other.str_to_bool("perhaps")


def test_storage_identity():
    x = torch.randn(4, 6)
    assert other.id_tensor_storage(x) == other.id_tensor_storage(x.T)
    assert other.id_tensor_storage(x) != other.id_tensor_storage(x.clone())


def test_no_look_up_on_the_hub_when_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert other.check_file_exists_on_hf_hub("someone/something", "config.json") is None


def test_quantization_config():
    model = models.tiny_llama()
    assert other.get_quantization_config(model, "gptq") is None
    model.quantization_method = "gptq"
    model.config.quantization_config = {"bits": 4}
    assert other.get_quantization_config(model, "gptq") == {"bits": 4}
    assert other.get_quantization_config(model, "awq") is None


def test_infer_device_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert other.infer_device() == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    assert other.infer_device() == "cuda"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_plain_model_prepared_for_kbit_training(dtype):
    theirs, ours = models.tiny_llama(dtype), models.tiny_llama(dtype)
    reference.prepare_model_for_kbit_training(theirs)
    assert other.prepare_model_for_kbit_training(ours) is ours
    assert {n: (p.dtype, p.requires_grad) for n, p in ours.named_parameters()} == {
        n: (p.dtype, p.requires_grad) for n, p in theirs.named_parameters()
    }
    assert not any(p.requires_grad for p in ours.parameters())
    assert not is_checkpointing(ours)
    assert not is_checkpointing(theirs)


def is_checkpointing(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_a_quantised_model_prepared_for_kbit_training(options):
    class Quantised(nn.Linear):
        is_loaded_in_8bit = True
        calls: list

        def enable_input_require_grads(self):
            self.calls.append("inputs")

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            self.calls.append(gradient_checkpointing_kwargs)

    model = Quantised(3, 5)
    model.calls = []
    other.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
    assert model.calls == ([options] if options == {"use_reentrant": False} else ["inputs", options])


def test_packed_weights_keep_their_dtype():
    model = models.tiny_llama(torch.bfloat16)
    model.quantization_method = "gptq"
    other.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert is_checkpointing(model)
    other.prepare_model_for_kbit_training(plain := models.tiny_llama(), use_gradient_checkpointing=False)
    assert not is_checkpointing(plain)


def test_cast_mixed_precision_params():
    model = pair("llama").ours
    other.cast_mixed_precision_params(model, torch.bfloat16)
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_fsdp_wraps_decoder_layers_and_trainable_leaves(monkeypatch):
    model = pair("llama").ours
    policy = other.fsdp_auto_wrap_policy(model)
    wrapped = {
        name for name, module in model.named_modules() if policy(module=module, recurse=False, nonwrapped_numel=0)
    }
    layer = "base_model.model.model.layers.0"
    assert layer in wrapped
    assert f"{layer}.self_attn.q_proj.lora_A.default" in wrapped
    assert f"{layer}.self_attn.q_proj.base_layer" not in wrapped
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchLayer")
    with pytest.raises(TypeError, match="NoSuchLayer"):
        other.fsdp_auto_wrap_policy(model)


# Signatures and recognition.


class Opaque(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_model(self):
        return self.base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)

    def generate(self, **kwargs):
        return ("generated", kwargs)


@pytest.mark.parametrize("method", ["forward", "generate", "all"])
def test_signatures_of_opaque_methods_become_the_base_models(method):
    base = models.tiny_llama()
    model = Opaque(base)
    helpers.update_signature(model, method)
    changed = {"all": ["forward", "generate"]}.get(method, [method])
    for name in ("forward", "generate"):
        same = inspect.signature(getattr(model, name)) == inspect.signature(getattr(base, name))
        assert same == (name in changed)
    batch = models.batch("llama")
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert model.generate(a=1) == ("generated", {"a": 1})


def test_signatures_that_say_something_are_left_alone():
    model = SimpleNamespace(forward=lambda x: x, get_base_model=models.tiny_llama)
    helpers.update_forward_signature(model)
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    helpers.update_generate_signature(model)  # there is none
    with pytest.raises(ValueError, match='"forward", "generate" or "all"'):
        helpers.update_signature(model, "backward")


def test_check_if_peft_model(tmp_path):
    assert not helpers.check_if_peft_model(str(tmp_path))
    fastpeft.LoraConfig().save_pretrained(tmp_path)
    assert helpers.check_if_peft_model(str(tmp_path))
