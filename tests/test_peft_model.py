"""PeftModel: building, calling, attributes."""

import copy
import pickle

import pytest
import torch
from adapted_models import FAMILIES, adapted, config_for, logits
from models import TASK_TYPES, batch, build, tiny_llama
from safetensors.torch import load_file
from torch import nn

import fastpeft
from fastpeft import LoraConfig, PeftModel, get_peft_model

# ---- building and calling ----


@pytest.mark.parametrize("family", FAMILIES)
def test_each_task_gets_its_class_and_computes(family):
    base = build(family)
    plain = logits(base, family)
    model = get_peft_model(base, config_for(family)).eval()
    expected = fastpeft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TASK_TYPES[family]]
    assert isinstance(model, expected)
    assert type(model).__name__ == expected.__name__
    assert type(model).__module__ == "fastpeft.model_tasks"
    assert not torch.equal(logits(model, family), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), plain)
    assert not torch.equal(logits(model, family), plain)


def test_a_module_without_a_task_is_called_with_its_own_arguments():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), LoraConfig(r=2, target_modules=["0"]))
    assert model(torch.ones(2, 3)).shape == (2, 5)
    assert type(model).__name__ == "PeftModel"


def test_a_base_model_needs_to_take_only_the_arguments_that_are_given():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(3, 5)

        def forward(self, inputs_embeds):
            return self.proj(inputs_embeds)

    model = get_peft_model(Narrow(), LoraConfig(r=2, target_modules=["proj"], task_type="CAUSAL_LM"))
    assert model(inputs_embeds=torch.ones(2, 3)).shape == (2, 5)


def test_question_answering_passes_token_types_on():
    model = adapted("bert_qa")
    inputs = batch("bert_qa")
    types = torch.zeros_like(inputs["input_ids"])
    plain = model(**inputs, token_type_ids=types).start_logits
    assert not torch.equal(model(**inputs, token_type_ids=types + 1).start_logits, plain)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate_uses_the_adapter(family):
    model = adapted(family)
    inputs = {key: value for key, value in batch(family).items() if key != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours = model.generate(**inputs, **options)
    with model.disable_adapter():
        base = model.generate(**inputs, **options)
    plain = build(family).generate(**inputs, **options)
    assert torch.equal(base.sequences, plain.sequences)
    assert torch.equal(base.logits[0], plain.logits[0])
    assert not torch.equal(ours.logits[0], plain.logits[0])
    if family == "llama":  # the logits of a step are those of the forward, where the row has no padding
        first = model(**inputs).logits[:-1, -1]
        torch.testing.assert_close(ours.logits[0][:-1], first, rtol=0, atol=1e-5)


def test_decoding_steps_come_without_cache_position(monkeypatch):
    """The model works it out itself; a stale one would be passed on."""
    model = adapted()
    step = {"input_ids": torch.ones(1, 1), "cache_position": torch.zeros(1)}
    monkeypatch.setattr(model.get_base_model(), "prepare_inputs_for_generation", lambda *args, **kwargs: dict(step))
    assert model.prepare_inputs_for_generation(step["input_ids"]).keys() == {"input_ids"}


def test_a_base_that_slices_its_weights_stops_doing_so():
    """pretraining_tp > 1 multiplies slices of a weight, and passes the adapter layer by."""
    base = tiny_llama()
    base.config.pretraining_tp = 2
    assert get_peft_model(base, config_for("llama")).config.pretraining_tp == 1


def test_generation_config_of_the_wrapper_counts():
    model = adapted()
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.max_new_tokens = 3
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = None
    inputs = batch("llama")
    assert model.generate(inputs["input_ids"]).shape[1] == inputs["input_ids"].shape[1] + 3


def test_adapter_names_pick_an_adapter_for_each_row():
    model = adapted()
    model.add_adapter("other", config_for("llama"))
    inputs = {key: value for key, value in batch("llama").items() if key != "labels"}
    expected = []
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(model(**inputs).logits)
    with model.disable_adapter():
        expected.append(model(**inputs).logits)
    mixed = model(**inputs, adapter_names=["other", "__base__", "default"]).logits
    for row, source in enumerate((1, 2, 0)):
        torch.testing.assert_close(mixed[row], expected[source][row])


@pytest.mark.parametrize(
    ("name", "value"), [("task_ids", torch.zeros(3, dtype=torch.long)), ("alora_offsets", [1] * 3)]
)
def test_arguments_of_other_methods_are_refused(name, value):
    with pytest.raises(NotImplementedError, match=name):
        adapted()(**batch("llama"), **{name: value})


def test_methods_of_prompt_learning_say_what_they_are_for():
    with pytest.raises(TypeError, match="prompt-learning"):
        adapted().get_prompt(1)
    with pytest.raises(TypeError, match="prompt-learning"):
        adapted().get_prompt_embedding_to_save("default")


@pytest.mark.parametrize("family", ["bert_classifier", "bert_tagger", "bert_qa"])
def test_heads_train_in_full_and_are_saved(family, tmp_path):
    model = adapted(family)
    head = {"bert_qa": "qa_outputs"}.get(family, "classifier")
    assert head in model.modules_to_save
    assert model.cls_layer_name == head
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    assert len(trained) == 2  # weight and bias
    model.save_pretrained(tmp_path)
    assert f"base_model.model.{head}.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(build(family, seed=1), tmp_path)
    assert len(loaded.peft_config["default"].modules_to_save) == len(set(loaded.peft_config["default"].modules_to_save))


def test_a_second_adapter_has_a_head_of_its_own():
    model = adapted("bert_classifier")
    model.add_adapter("other", config_for("bert_classifier"))
    assert {"default", "other"} <= set(model.get_base_model().classifier.modules_to_save)


# ---- attributes ----


def test_what_the_wrapper_lacks_comes_from_the_tuner_and_the_base_model():
    model = adapted()
    assert model.config is model.get_base_model().config
    assert model.merge_and_unload == model.base_model.merge_and_unload
    assert model.base_model_torch_dtype == torch.float32
    assert model.active_peft_config is model.peft_config["default"]
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_trainable_parameters_are_the_adapters(capsys):
    model = adapted()
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_whole(copied):
    model = adapted()
    twin = copied(model)
    assert type(twin) is type(model)
    assert torch.equal(logits(twin), logits(model))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(logits(twin), logits(model))


def test_a_subclass_of_ours_keeps_its_name_and_is_recognised():
    peft = pytest.importorskip("peft")

    class Mine(fastpeft.PeftModelForCausalLM):
        def extra(self):
            return "extra"

    model = Mine(tiny_llama(), config_for("llama"))
    assert type(model).__name__ == "Mine"
    assert model.extra() == "extra"
    assert isinstance(model, peft.PeftModelForCausalLM)
