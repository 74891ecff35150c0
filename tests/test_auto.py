"""AutoPeftModel...: base model and adapter from the adapter's folder alone."""

import json

import pytest
import torch
from models import BUILDERS, TARGETS, TASK_TYPES, VOCAB, batch, build
from pairs import output

import fastpeft
from fastpeft import LoraConfig, get_peft_model

FAMILIES = {
    "llama": "CausalLM",
    "t5": "Seq2SeqLM",
    "bert_classifier": "SequenceClassification",
    "bert_tagger": "TokenClassification",
    "bert_qa": "QuestionAnswering",
    "bert": "FeatureExtraction",
}


def saved(tmp_path, family, **options):
    """A base model and an adapter for it, on disk; returns the adapter's folder and the model."""
    base = build(family)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    options = {"target_modules": TARGETS[family], "task_type": TASK_TYPES[family]} | options
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **options))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.eval()


def auto(family):
    return getattr(fastpeft, f"AutoPeftModelFor{FAMILIES[family]}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_as_was_saved(tmp_path, family):
    folder, model = saved(tmp_path, family)
    loaded = auto(family).from_pretrained(folder)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(output(loaded, family), output(model, family))


def test_arguments_reach_base_and_adapter(tmp_path):
    folder, _ = saved(tmp_path, "llama")
    loaded = auto("llama").from_pretrained(
        folder,
        adapter_name="mine",
        is_trainable=True,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        device_map="cpu",
        autocast_adapter_dtype=False,
        low_cpu_mem_usage=True,
        torch_device="cpu",
    )
    assert loaded.active_adapter == "mine"
    assert loaded.config._attn_implementation == "eager"
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert any(p.requires_grad for p in loaded.parameters())


def test_an_adapter_in_a_subfolder_has_its_base_elsewhere(tmp_path):
    folder, model = saved(tmp_path, "llama")
    loaded = auto("llama").from_pretrained(tmp_path, subfolder=folder.name)
    assert torch.equal(output(loaded, "llama"), output(model, "llama"))


def test_a_config_of_ones_own(tmp_path):
    folder, model = saved(tmp_path, "llama")
    config = LoraConfig(target_modules=TARGETS["llama"], task_type="CAUSAL_LM", lora_alpha=0)
    loaded = auto("llama").from_pretrained(folder, config=config)
    with model.disable_adapter():
        assert torch.equal(output(loaded, "llama"), output(model, "llama"))


def test_the_task_picks_the_class(tmp_path):
    folder, _ = saved(tmp_path, "llama")
    for other in (fastpeft.AutoPeftModel, fastpeft.AutoPeftModelForSeq2SeqLM):
        with pytest.raises(ValueError, match=r"task_type='CAUSAL_LM'; use AutoPeftModelForCausalLM\.from_pretrained"):
            other.from_pretrained(folder)


def test_without_a_task_the_config_names_the_class(tmp_path):
    folder, model = saved(tmp_path, "llama", task_type=None)
    loaded = fastpeft.AutoPeftModel.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert type(loaded.get_base_model()).__name__ == "LlamaForCausalLM"
    assert torch.equal(output(loaded, "llama"), output(model, "llama"))


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("library", ["os", "transformers_evil", "transformersx.models"])
def test_a_config_cannot_import_any_package(tmp_path, monkeypatch, library):
    folder, _ = saved(tmp_path, "llama", task_type=None)
    (tmp_path / "transformers_evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit_config(folder, auto_mapping={"base_model_class": "AutoModel", "parent_library": library})
    with pytest.raises(ValueError, match=rf"wants to import '{library}', which is not on the list"):
        fastpeft.AutoPeftModel.from_pretrained(folder)


def test_other_packages_on_request(tmp_path, monkeypatch):
    folder, model = saved(tmp_path, "llama", task_type=None)
    (tmp_path / "my_models.py").write_text("from transformers import LlamaForCausalLM as Mine")
    monkeypatch.syspath_prepend(tmp_path)
    edit_config(folder, auto_mapping={"base_model_class": "Mine", "parent_library": "my_models"})
    loaded = fastpeft.AutoPeftModel.from_pretrained(folder, import_allowlist=["my_models"])
    assert torch.equal(output(loaded, "llama"), output(model, "llama"))
    with pytest.raises(ValueError, match="not on the list"):
        fastpeft.AutoPeftModel.from_pretrained(folder, import_allowlist=[])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"task_type": None}, "neither task_type nor auto_mapping"),
    ],
)
def test_configs_that_do_not_say_enough(tmp_path, changes, message):
    folder, _ = saved(tmp_path, "llama")
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        auto("llama").from_pretrained(folder)


@pytest.mark.parametrize("extra", [0, 5])
def test_embeddings_grow_to_a_larger_tokenizer(tmp_path, extra):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder, _ = saved(tmp_path, "llama")
    words = {f"w{i}": i for i in range(VOCAB - 3 + extra * 2)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))).save_pretrained(folder)
    loaded = auto("llama").from_pretrained(folder)
    assert loaded.get_input_embeddings().weight.shape[0] == max(VOCAB, VOCAB - 3 + extra * 2)
    assert output(loaded, "llama").shape[:2] == batch("llama")["input_ids"].shape


def test_a_local_adapter_asks_nothing_of_the_hub(tmp_path, monkeypatch):
    folder, model = saved(tmp_path, "llama")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda *_, **__: pytest.fail("the hub was asked"))
    assert torch.equal(output(auto("llama").from_pretrained(folder), "llama"), output(model, "llama"))


def test_there_are_no_instances():
    with pytest.raises(OSError, match=r"AutoPeftModelForCausalLM\.from_pretrained"):
        fastpeft.AutoPeftModelForCausalLM()


def test_every_task_has_its_class():
    assert FAMILIES.keys() | {"gpt2"} == BUILDERS.keys()
