"""PeftModel.from_pretrained and load_adapter: what they take, what they refuse, and nothing half done."""

import warnings

import pytest
import torch
from adapted_models import adapted, assert_same_state, config_for, logits, snapshot
from models import tiny_bert_classifier, tiny_llama
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft import LoraConfig, PeftConfig, PeftModel, explain, get_peft_model


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


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("how", ["load_adapter", "from_pretrained"])
@pytest.mark.filterwarnings("ignore:this model has adapters already", "ignore:adapter .* was active")
def test_a_failed_load_takes_its_layers_off_again(how, empty, tmp_path):
    wide = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], modules_to_save=["lm_head"])
    get_peft_model(tiny_llama(), wide).save_pretrained(tmp_path)
    misshape(tmp_path / "adapter_model.safetensors")
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    if empty:
        model.delete_adapter("default")
    before, modules = snapshot(model), [name for name, _ in model.named_modules()]
    targeted, paths = list(model.targeted_module_names), str(explain(model))
    calls = {
        "load_adapter": lambda: model.load_adapter(tmp_path, "second"),
        "from_pretrained": lambda: PeftModel.from_pretrained(model.get_base_model(), tmp_path, adapter_name="second"),
    }
    with pytest.raises(RuntimeError, match="shape"):
        calls[how]()
    assert [name for name, _ in model.named_modules()] == modules
    assert list(model.peft_config) == ([] if empty else ["default"])
    assert (model.targeted_module_names, str(explain(model))) == (targeted, paths)
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
