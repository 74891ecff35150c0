"""PeftModel against reference PEFT's: signatures, texts, status, files, generation."""

import dataclasses
import inspect
import json

import peft
import pytest
import torch
from models import LAYERS, TARGETS, TASK_TYPES, batch, build
from pairs import output, pair
from safetensors.torch import load_file

import fastpeft
from fastpeft.not_yet import METHODS_NOT_YET

FAMILIES = list(TASK_TYPES)
MODEL_CLASSES = [name for name in fastpeft.__all__ if name.startswith("PeftModel")]
FUNCTIONS = [
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_peft_model_state_dict",
]


def parameters(function):
    """Names, kinds and defaults; annotations are each library's own."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def methods():
    for class_name in MODEL_CLASSES:
        for name, theirs in inspect.getmembers(getattr(peft, class_name), callable):
            is_own = any(name in vars(base) for base in getattr(peft, class_name).__mro__ if "peft" in base.__module__)
            if is_own and not name.startswith("_"):
                yield pytest.param(class_name, name, theirs, id=f"{class_name}.{name}")


@pytest.mark.parametrize(("class_name", "name", "theirs"), methods())
def test_methods_take_the_same_arguments(class_name, name, theirs):
    assert parameters(getattr(getattr(fastpeft, class_name), name)) == parameters(theirs)


@pytest.mark.parametrize("class_name", MODEL_CLASSES)
def test_classes_have_the_same_attributes(class_name):
    ours, theirs = getattr(fastpeft, class_name), getattr(peft, class_name)
    assert [n for n in dir(theirs) if not n.startswith("_") and not hasattr(ours, n)] == []


def test_the_base_class_is_made_with_the_same_arguments():
    assert parameters(fastpeft.PeftModel.__init__) == parameters(peft.PeftModel.__init__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_the_same_arguments(name):
    assert parameters(getattr(fastpeft, name)) == parameters(getattr(peft, name))


@pytest.mark.parametrize("record", ["TunerLayerStatus", "TunerModelStatus"])
def test_status_records_have_the_same_fields(record):
    from fastpeft import peft_model

    fields = [dataclasses.fields(getattr(module, record)) for module in (peft_model, peft.peft_model)]
    assert [f.name for f in fields[0]] == [f.name for f in fields[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_parameters_print_alike(family, capsys):
    texts = []
    for model in pair(family):
        model.print_trainable_parameters()
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


STATES = {
    "new": [],
    "two adapters": ["add"],
    "the second one active": ["add", ("set_adapter", "other")],
    "both active": ["add", ("base_model.set_adapter", ["default", "other"])],
    "merged": ["add", ("merge_adapter",)],
    "disabled": [("base_model.disable_adapter_layers",)],
    "frozen": [("set_adapter", "default", True)],
    "deleted": ["add everywhere", ("delete_adapter", "default")],
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_classifier", "t5"])
def test_status_is_equal(family, state):
    if (family, state) == ("bert_classifier", "both active"):
        pytest.skip("two adapters cannot both replace the head")
    models = pair(family)
    for step in STATES[state]:
        if isinstance(step, str):
            task_type = models.theirs.peft_config["default"].task_type
            targets = TARGETS[family] if step == "add everywhere" else TARGETS[family][:1]
            models.add_adapter("other", target_modules=targets, task_type=task_type, r=2)
        else:
            models.each(*step)
    theirs, ours = models.each("get_model_status")
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)
    theirs, ours = models.each("get_layer_status")
    assert list(map(dataclasses.asdict, ours)) == list(map(dataclasses.asdict, theirs))
    for name in ("active_adapters", "active_adapter", "modules_to_save", "base_model_torch_dtype"):
        assert getattr(models.ours, name) == getattr(models.theirs, name), name
    assert list(models.ours.peft_config) == list(models.theirs.peft_config)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_are_equal_and_load_in_the_other_library(family, tmp_path):
    models = pair(family, init_lora_weights=False)
    expected = [output(model.eval(), family) for model in models]
    for model, name in zip(models, ("theirs", "ours"), strict=True):
        model.save_pretrained(tmp_path / name)
    theirs, ours = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    assert {key: _sorted(value) for key, value in ours.items()} == {
        key: _sorted(value) for key, value in theirs.items()
    }
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key

    from_theirs = fastpeft.PeftModel.from_pretrained(build(family), tmp_path / "theirs")
    from_ours = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    assert torch.equal(output(from_theirs, family), output(models.ours, family))
    assert torch.equal(output(from_ours, family), output(models.theirs, family))
    torch.testing.assert_close(expected[1], expected[0])


def _sorted(value):
    return sorted(value) if isinstance(value, list) else value


def test_several_adapters_load_in_the_other_library(tmp_path):
    models = pair("llama", init_lora_weights=False)
    models.add_adapter("other", target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    models.theirs.save_pretrained(tmp_path / "theirs")
    models.ours.save_pretrained(tmp_path / "ours")
    for library, source, expected in ((fastpeft, "theirs", models.theirs), (peft, "ours", models.ours)):
        loaded = library.PeftModel.from_pretrained(build("llama"), tmp_path / source)
        result = loaded.load_adapter(tmp_path / source / "other", "other")
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        for name in ("default", "other"):
            loaded.set_adapter(name)
            expected.set_adapter(name)
            torch.testing.assert_close(output(loaded, "llama"), output(expected.eval(), "llama"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_is_equal(family):
    models = pair(family, init_lora_weights=False, lora_alpha=64)
    inputs = {key: value for key, value in batch(family).items() if key != "labels"}
    options = {"max_new_tokens": 8, "do_sample": False}
    theirs, ours = (model.eval().generate(**inputs, **options) for model in models)
    assert torch.equal(ours, theirs)
    options = {"max_new_tokens": 5, "num_beams": 3}
    theirs, ours = (model.generate(**inputs, **options) for model in models)
    assert torch.equal(ours, theirs)


def test_lora_can_be_converted_to_lora():
    ours, theirs = pair("llama")
    assert ours.supports_lora_conversion() is theirs.supports_lora_conversion() is True
    assert ours.base_model.supports_lora_conversion("default") is True


def test_every_method_of_the_tuner_is_built_or_listed_as_not_yet():
    missing = {
        name for name in dir(peft.LoraModel) if not name.startswith("_") and not hasattr(fastpeft.LoraModel, name)
    }
    assert missing == METHODS_NOT_YET


def test_prepare_inputs_for_generation_is_equal():
    models = pair("llama")
    ids = batch("llama")["input_ids"]
    theirs, ours = models.each("prepare_inputs_for_generation", ids, cache_position=torch.arange(ids.shape[1]))
    assert theirs.keys() == ours.keys()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_with_adapters_of_their_own_are_equal(family):
    models = pair(family, init_lora_weights=False)
    options = {"target_modules": TARGETS[family], "task_type": TASK_TYPES[family], "init_lora_weights": False}
    models.add_adapter("other", **options)
    names = ["other", "__base__", "default"]
    theirs, ours = (output(model.eval(), family, adapter_names=names) for model in models)
    torch.testing.assert_close(ours, theirs)


def test_model_cards_say_the_same(tmp_path):
    models = pair("llama")
    from huggingface_hub import ModelCard

    cards = []
    for model, name in zip(models, ("theirs", "ours"), strict=True):
        model.get_base_model().name_or_path = model.get_base_model().config._name_or_path = "some/base"
        (tmp_path / name).mkdir()
        model.create_or_update_model_card(str(tmp_path / name))
        cards.append(ModelCard.load(tmp_path / name / "README.md").data.to_dict())
    assert cards[0] == cards[1]


def test_layers_of_the_status_are_those_of_the_model():
    assert len(pair("llama").ours.get_layer_status()) == LAYERS * len(TARGETS["llama"])
