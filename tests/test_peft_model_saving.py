"""PeftModel.save_pretrained, model cards and the hub."""

import json

import pytest
import torch
from adapted_models import FAMILIES, adapted, config_for, logits
from models import build, tiny_bert, tiny_llama
from safetensors.torch import load_file

import fastpeft
from fastpeft import LoraConfig, PeftModel, get_peft_model


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
