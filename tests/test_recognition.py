"""Our models as instances of reference PEFT's classes: what others see, and that nothing else changes by it."""

import importlib.util
import pickle
import sys
import types

import pytest
import torch
from models import TARGETS, TASK_TYPES, batch, build, tiny_bert_classifier, tiny_llama
from torch import nn

import fastpeft
from fastpeft import LoraConfig, get_peft_model, recognition

HAS_PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="needs reference PEFT")


def adapted(family="llama"):
    config = LoraConfig(r=2, target_modules=TARGETS[family], task_type=TASK_TYPES[family], init_lora_weights=False)
    return get_peft_model(build(family), config)


@needs_peft
@pytest.mark.parametrize("family", list(TASK_TYPES))
def test_others_recognise_an_adapter_model(family):
    import peft
    from accelerate.utils import is_peft_model
    from transformers.trainer_utils import _is_peft_model, unwrap_peft_model

    model = adapted(family)
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, getattr(peft, type(model).__name__))
    assert isinstance(model, fastpeft.PeftModel)
    assert is_peft_model(model)
    assert _is_peft_model(model)
    assert unwrap_peft_model(model) is model.get_base_model()


@needs_peft
@pytest.mark.parametrize("family", list(TASK_TYPES))
def test_functions_of_reference_peft_find_the_adapter(family):
    import dataclasses

    import peft

    model = adapted(family)
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS[family][:1], task_type=TASK_TYPES[family]))
    for name in ("default", "other"):
        theirs = peft.get_peft_model_state_dict(model, adapter_name=name)
        ours = fastpeft.get_peft_model_state_dict(model, adapter_name=name)
        assert theirs
        assert theirs.keys() == ours.keys()
    zeros = {key: torch.zeros_like(value) for key, value in theirs.items()}
    assert peft.set_peft_model_state_dict(model, zeros, adapter_name="other").unexpected_keys == []
    assert not any(value.any() for value in fastpeft.get_peft_model_state_dict(model, adapter_name="other").values())
    status = peft.get_model_status(model)
    assert dataclasses.asdict(status) == dataclasses.asdict(model.get_model_status())


@needs_peft
def test_layers_are_recognised():
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    model = adapted("bert_classifier")
    assert isinstance(model.base_model, BaseTuner)
    layer = model.get_base_model().bert.encoder.layer[0].attention.self.query
    assert isinstance(layer, BaseTunerLayer)
    assert isinstance(layer, LoraLayer)
    assert not isinstance(layer.base_layer, BaseTunerLayer)
    assert isinstance(model.get_base_model().classifier, ModulesToSaveWrapper)


@needs_peft
def test_nothing_of_reference_peft_runs_in_our_models():
    """Each name of their classes is either ours, or torch's and transformers', or not there."""
    model = adapted("bert_classifier")
    for thing in (model, model.get_base_model().classifier):
        theirs = [base for base in type(thing).__mro__ if base.__module__.partition(".")[0] == "peft"]
        assert theirs
        for name in {name for base in theirs for name in vars(base)}:
            if name.startswith("__") and name.endswith("__"):
                continue
            owner = next(base for base in type(thing).__mro__ if name in vars(base))
            assert owner not in theirs, name
            if isinstance(vars(owner)[name], recognition._Hidden):
                assert not hasattr(thing, name)
        for name in ("__init__", "__getattr__", "__setstate__", "__reduce_ex__"):
            assert next(base for base in type(thing).__mro__ if name in vars(base)) not in theirs


@needs_peft
def test_the_joined_class_is_made_once():
    assert type(adapted()) is type(adapted())
    assert recognition.recognised_class(type(adapted())) is type(adapted())


def without_reference(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "peft" else find_spec(name, *args)
    )


def test_without_reference_peft_the_class_is_ours_alone(monkeypatch):
    without_reference(monkeypatch)
    model = adapted("bert_classifier")
    assert type(model) is fastpeft.PeftModelForSequenceClassification
    assert type(model.get_base_model().classifier).__mro__[1].__module__ == "fastpeft.utils.auxiliary"


@needs_peft
def test_pickles_travel_between_machines_with_and_without_reference_peft(monkeypatch):
    model = adapted("bert_classifier")
    written_with = pickle.dumps(model)
    inputs = batch("bert_classifier")
    with monkeypatch.context() as patch:
        without_reference(patch)
        loaded = pickle.loads(written_with)
        assert type(loaded) is fastpeft.PeftModelForSequenceClassification
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        written_without = pickle.dumps(loaded)
    again = pickle.loads(written_without)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("error", [ImportError("needs a newer torch"), ModuleNotFoundError("No module", name="psutil")])
def test_a_broken_reference_peft_is_told_and_not_needed(monkeypatch, error):
    def broken(name, *args):
        if name == "peft":
            raise error
        return importlib.__import__(name, *args)

    monkeypatch.setattr(recognition.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(recognition, "importlib", types.SimpleNamespace(util=importlib.util, import_module=broken))
    with pytest.warns(UserWarning, match="Repair peft"):
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert type(model) is fastpeft.PeftModel


def test_a_stand_in_for_peft_without_a_spec(monkeypatch):
    stand_in = types.ModuleType("peft")
    stand_in.__spec__ = None
    monkeypatch.setitem(sys.modules, "peft", stand_in)
    model = get_peft_model(nn.Sequential(nn.Linear(3, 5)), LoraConfig(r=2, target_modules=["0"]))
    assert type(model) is fastpeft.PeftModel


@needs_peft
def test_a_hidden_name_reads_as_missing():
    model = get_peft_model(tiny_bert_classifier(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert not hasattr(model, "_prefix_tuning_forward")
    with pytest.raises(AttributeError, match="_prefix_tuning_forward"):
        model._prefix_tuning_forward()
