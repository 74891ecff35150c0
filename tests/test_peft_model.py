"""PeftModel: building, calling, switching, saving and loading, and what it refuses."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from models import TARGETS, TASK_TYPES, batch, build, tiny_bert, tiny_bert_classifier, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

import fastpeft
from fastpeft import LoraConfig, PeftConfig, PeftModel, get_peft_config, get_peft_model, inject_adapter_in_model

FAMILIES = list(TASK_TYPES)


def config_for(family, **overrides):
    options = {"r": 4, "target_modules": TARGETS[family], "task_type": TASK_TYPES[family], "init_lora_weights": False}
    return LoraConfig(**options | overrides)


def adapted(family="llama", **overrides):
    """A model in eval mode whose adapter changes the output."""
    return get_peft_model(build(family), config_for(family, **overrides)).eval()


def logits(model, family="llama"):
    with torch.no_grad():
        return first_output(model(**batch(family)))


def first_output(out):
    return next(out[key] for key in ("logits", "start_logits", "last_hidden_state") if key in out)


def snapshot(model):
    return {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}


def assert_same_state(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (value, requires_grad) in before.items():
        assert torch.equal(after[name][0], value), name
        assert after[name][1] == requires_grad, name


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
    frozen = build(family).requires_grad_(False)  # torch computes a frozen and an unfrozen layer in different ways
    plain = frozen.generate(**inputs, **options)
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


# ---- files ----


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_models_agree(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = PeftModel.from_pretrained(build(family), tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.get_nb_trainable_parameters()[0] == 0
    assert torch.equal(logits(loaded, family), logits(model, family))


def test_several_adapters_go_to_folders_of_their_names(tmp_path):
    model = adapted()
    model.add_adapter("other", config_for("llama"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
    model.save_pretrained(tmp_path / "some", selected_adapters=["other"])
    assert not (tmp_path / "some" / "adapter_config.json").exists()

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    result = loaded.load_adapter(tmp_path / "other", "other")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert loaded.active_adapters == ["default"]
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


def test_saving_leaves_the_config_of_the_model_alone(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is False


def test_a_model_without_a_task_saves_what_it_was_made_for(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    mapping = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "BertModel"
    assert mapping["parent_library"].startswith("transformers.")


def test_only_the_main_process_writes(tmp_path):
    adapted().save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_on_request(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_weights_given_as_state_dict_are_saved(tmp_path):
    model = adapted()
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=zeros)
    assert not any(value.any() for value in load_file(tmp_path / "adapter_model.safetensors").values())


def test_save_pretrained_refuses_what_it_cannot_do(tmp_path):
    model = adapted()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])
    with pytest.raises(NotImplementedError, match="not supported yet"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="somewhere")
    with pytest.raises(TypeError, match="no_such_option"):
        model.save_pretrained(tmp_path, no_such_option=1)
    with pytest.raises(NotImplementedError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.filterwarnings("ignore:could not read the config of the base model")
def test_model_card(tmp_path):
    base = tiny_llama()
    base.config._name_or_path = base.name_or_path = "some/base"
    model = get_peft_model(base, config_for("llama"))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for line in (
        "library_name: peft",
        "base_model: some/base",
        "pipeline_tag: text-generation",
        "- lora",
        "- transformers",
    ):
        assert line in card
    assert "- base_model:adapter:some/base" in card
    (tmp_path / "README.md").write_text(card + "\nMy own words.\n")
    model.save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert "My own words." in again
    assert again.count("### Framework versions") == 1
    assert again.count(f"- fastpeft {fastpeft.__version__}") == 1


def test_push_to_hub_uploads_the_adapter(monkeypatch):
    import types

    from huggingface_hub import ModelCard
    from transformers.utils import hub

    uploaded = {}

    def create_commit(repo_id, operations, **kwargs):
        uploaded[repo_id] = sorted(operation.path_in_repo for operation in operations)

    def create_repo(repo_id, **kwargs):
        return types.SimpleNamespace(repo_id=repo_id)

    api = types.SimpleNamespace(create_repo=create_repo, create_commit=create_commit)
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("a card"))
    adapted().push_to_hub("me/adapter")
    assert uploaded == {"me/adapter": ["README.md", "adapter_config.json", "adapter_model.safetensors"]}


def test_model_card_tells_the_quantisation(tmp_path):
    base = tiny_llama()
    base.config.quantization_config = {"load_in_4bit": True}
    model = get_peft_model(base, config_for("llama"))
    for _ in range(2):
        model.create_or_update_model_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("- load_in_4bit: True") == 1


def test_from_pretrained_to_train_on(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert model.get_nb_trainable_parameters()[0] > 0
    assert model.peft_config["default"].inference_mode is False
    model.load_adapter(tmp_path, "second", is_trainable=True)
    assert any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    model.load_adapter(tmp_path, "third")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".third." in name)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_into_an_existing_adapter_replaces_its_weights(tmp_path, low_cpu_mem_usage):
    saved = adapted()
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = adapted()
    assert not torch.equal(logits(model), logits(saved))
    model.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), logits(saved))
    assert model.get_nb_trainable_parameters()[0] > 0


def test_from_pretrained_on_the_meta_device(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(model))


def test_config_given_instead_of_the_saved_one(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.lora_alpha = 0
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config)
    assert torch.equal(logits(model), logits(tiny_llama()))
    with pytest.raises(ValueError, match="PeftConfig"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, config={"r": 4})


def test_a_config_that_is_not_the_weights_own_is_noticed(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(fastpeft.PeftError, match="lora_alpha"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same_state(base, before)
    loaded = PeftModel.from_pretrained(base, tmp_path, config=model.peft_config["default"])  # a config of one's own
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:this model has adapters already", "ignore:adapter 'second' was active")
def test_a_failed_load_leaves_adapters_that_were_there(tmp_path):
    adapted().save_pretrained(tmp_path)
    misshape(tmp_path / "adapter_model.safetensors")
    model = adapted()
    model.add_adapter("another", config_for("llama"))
    model.base_model.set_adapter(["default", "another"])
    expected, before = logits(model), snapshot(model)
    with pytest.raises(RuntimeError, match="shape"):
        PeftModel.from_pretrained(model.get_base_model(), tmp_path, adapter_name="second")
    assert list(model.peft_config) == ["default", "another"]
    assert_same_state(model, before)
    assert torch.equal(logits(model), expected)


def test_an_offloaded_base_keeps_its_places(tmp_path):
    """Weights that accelerate keeps on disk: the adapter goes beside them and nothing is dispatched anew."""
    from transformers import LlamaForCausalLM

    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    places = dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.rotary_emb"], "cpu")
    places |= dict.fromkeys(["model.layers.0", "model.norm", "lm_head"], "disk")

    def offloaded():
        options = {"device_map": places, "offload_folder": tmp_path / "offload"}
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", **options).eval()
        assert any(p.is_meta for p in base.parameters())
        return base

    loaded = PeftModel.from_pretrained(offloaded(), tmp_path / "adapter", device_map="auto")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_model_status().devices == {"default": ["cpu"]}
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_llama()))

    added = get_peft_model(offloaded(), config_for("llama"))
    added.eval().load_adapter(tmp_path / "adapter", "loaded")
    added.set_adapter("loaded")
    assert torch.equal(logits(added), logits(model))


def test_key_mapping_renames_the_keys_of_the_file(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "plain")
    path = tmp_path / "old"
    model.save_pretrained(path)
    weights = load_file(path / "adapter_model.safetensors")
    renamed = {key.replace("model.layers", "decoder.blocks"): value for key, value in weights.items()}
    save_file(renamed, path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny_llama(), path, key_mapping={r"^decoder\.blocks": "model.layers"})
    assert torch.equal(logits(loaded), logits(model))


def test_subfolder(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "inner")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="inner")
    assert torch.equal(logits(loaded), logits(model))


def test_missing_and_unknown_weights_are_named(tmp_path):
    adapted().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    key = next(iter(weights))
    weights["base_model.model.nowhere.lora_A.weight"] = weights.pop(key)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    told = " ".join(str(warning.message) for warning in caught)
    assert key.replace(".weight", ".default.weight") in told
    assert "nowhere" in told


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def misshape(path):
    weights = load_file(path)
    key = next(key for key in weights if "lora_B" in key)
    save_file(weights | {key: torch.zeros(3, 3)}, path)


@pytest.mark.parametrize(
    "damage", [truncate, misshape, lambda path: path.unlink()], ids=["truncate", "misshape", "unlink"]
)
def test_damaged_files_leave_the_model_as_it_was(damage, tmp_path):
    adapted().save_pretrained(tmp_path)
    damage(tmp_path / "adapter_model.safetensors")

    base = tiny_llama()
    plain, before, modules = logits(base), snapshot(base), [name for name, _ in base.named_modules()]
    with pytest.raises((ValueError, RuntimeError, OSError)):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == modules
    assert_same_state(base, before)
    assert torch.equal(logits(base), plain)
    assert not hasattr(base, "peft_config")

    model = adapted()
    before = snapshot(model)
    for name in ("default", "new"):
        with pytest.raises((ValueError, RuntimeError, OSError)):
            model.load_adapter(tmp_path, name)
    assert list(model.peft_config) == ["default"]
    assert_same_state(model, before)


def test_a_folder_without_an_adapter(tmp_path):
    for call in (
        lambda: PeftModel.from_pretrained(tiny_llama(), tmp_path),
        lambda: adapted().load_adapter(tmp_path, "new"),
    ):
        with pytest.raises((ValueError, OSError), match=r"adapter_config\.json"):
            call()


def test_ignore_mismatched_sizes(tmp_path):
    adapted("bert_classifier").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_bert_classifier(num_labels=5), tmp_path, ignore_mismatched_sizes=True)
    assert logits(model, "bert_classifier").shape[-1] == 5


def test_load_arguments_that_are_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="lora_alpha"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, lora_alpha=3)
    with pytest.raises(NotImplementedError, match="not supported yet"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, ephemeral_gpu_offload=True)
