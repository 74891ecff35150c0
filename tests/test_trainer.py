"""transformers' Trainer, accelerate and TRL on our models, with and without reference PEFT on the machine."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_child
from models import TARGETS, TASK_TYPES, batch, build, tiny_llama

from fastpeft import LoraConfig, get_peft_model
from fastpeft.integrations.transformers import AdapterTrainerMixin

HAS_PEFT = importlib.util.find_spec("peft") is not None
WITH_AND_WITHOUT = [
    pytest.param((), id="with-peft", marks=pytest.mark.skipif(not HAS_PEFT, reason="needs reference PEFT")),
    pytest.param(("--hide-peft",), id="without-peft"),
]


def run_child(folder, *options):
    """A training run in a process of its own."""
    tests, root = Path(__file__).parent, Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "kernels", tests)))}
    command = [sys.executable, str(tests / "train_child.py"), str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def losses(folder, name="losses.json"):
    return {int(step): loss for step, loss in json.loads((folder / name).read_text()).items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The losses of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    train_child.record_losses(train_child.make_trainer(folder)).train()
    return losses(folder)


@pytest.mark.parametrize("hide", WITH_AND_WITHOUT)
def test_a_killed_run_resumes_as_if_it_had_not_been(hide, uninterrupted, tmp_path):
    run_child(tmp_path, "5", *hide)
    assert sorted(losses(tmp_path, "killed.json")) == [1, 2, 3, 4, 5]
    resumed = losses(tmp_path)
    assert sorted(resumed) == [4, 5, 6, 7, 8]  # from checkpoint 3 on
    assert resumed == {step: uninterrupted[step] for step in resumed}

    for checkpoint in tmp_path.glob("checkpoint-*"):
        names = {path.name for path in checkpoint.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= names
        assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}
        assert (checkpoint / "adapter_model.safetensors").stat().st_size < 100_000

    result = json.loads((tmp_path / "result.json").read_text())
    first, *_, last, again = result["evaluations"]
    assert again == result["best"] == first > last  # load_best_model_at_end
    assert result["trainer"] == ("AdapterTrainer" if hide else "Trainer")
    assert result["peft_imported"] is not bool(hide)
    assert result["model"] == "PeftModelForCausalLM"


@pytest.mark.parametrize("mixins", [(AdapterTrainerMixin,), ()], ids=["with-mixin", "without-mixin"])
@pytest.mark.parametrize("family", ["bert_classifier", "bert_qa", "bert_tagger", "t5"])
def test_trainer_finds_columns_and_labels(family, mixins, tmp_path):
    from transformers import Trainer, TrainingArguments

    if not mixins and not HAS_PEFT:
        pytest.skip("Trainer alone needs reference PEFT to see the base model's columns")

    class AdapterTrainer(*mixins, Trainer):
        pass

    def trainer_of(model):
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = AdapterTrainer(model=model, args=arguments)
        trainer._set_signature_columns_if_needed()
        return trainer

    config = LoraConfig(r=2, target_modules=TARGETS[family], task_type=TASK_TYPES[family])
    ours, plain = trainer_of(get_peft_model(build(family), config)), trainer_of(build(family))
    assert ours.label_names == plain.label_names
    assert set(ours._signature_columns) == set(plain._signature_columns)
    assert ours.model_accepts_loss_kwargs == plain.model_accepts_loss_kwargs
    assert ours.can_return_loss == plain.can_return_loss


def test_label_smoothing_shifts_labels_of_causal_models(tmp_path):
    """Trainer asks for the name of the model class; without reference PEFT it sees our wrapper's."""
    from transformers import Trainer, TrainingArguments

    class AdapterTrainer(AdapterTrainerMixin, Trainer):
        pass

    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, label_smoothing_factor=0.1
    )
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    inputs = batch("llama")
    ours = AdapterTrainer(model=model, args=arguments)
    plain = Trainer(model=tiny_llama(), args=arguments)
    expected = plain.compute_loss(plain.model, dict(inputs))
    assert torch.equal(ours.compute_loss(model, dict(inputs)), expected)
    outputs = model(**inputs)
    assert torch.equal(ours.label_smoother(outputs, inputs["labels"]), expected)  # as Trainer without PEFT calls it


def test_mixin_leaves_other_models_to_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    class AdapterTrainer(AdapterTrainerMixin, Trainer):
        pass

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = AdapterTrainer(model=tiny_llama(), args=arguments)
    trainer.save_model()
    assert (tmp_path / "model.safetensors").exists()


def test_mixin_saves_and_loads_several_adapters(tmp_path):
    from transformers import Trainer, TrainingArguments

    class AdapterTrainer(AdapterTrainerMixin, Trainer):
        pass

    def make():
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(tiny_llama(), config)
        model.add_adapter("other", config)
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
        return AdapterTrainer(model=model, args=arguments)

    saved, loaded = make(), make()
    saved.save_model(str(tmp_path / "checkpoint"))
    assert not torch.equal(*(t.model.state_dict()[KEY] for t in (saved, loaded)))
    loaded._load_from_checkpoint(str(tmp_path / "checkpoint"))
    for name, value in saved.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert loaded.model.active_adapters == ["default"]
    (tmp_path / "checkpoint" / "other" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights of adapter 'other'"):
        loaded._load_from_checkpoint(str(tmp_path / "checkpoint"))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight"


# ---- activation checkpointing ----


def gradients(use_reentrant, dropout=0.3, steps=2):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny_llama(), config).train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.manual_seed(1)
    for _ in range(steps):
        model(**batch("llama")).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_equal_gradients(use_reentrant):
    expected = gradients(None)
    found = gradients(use_reentrant)
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name
    assert not torch.equal(gradients(None, dropout=0.0)[name], grad)  # the dropout is really there


# ---- TRL ----


def test_trl_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    if not HAS_PEFT:
        pytest.skip("TRL knows adapter models by reference PEFT")
    rows = batch("llama", rows=8, length=10)["input_ids"].tolist()
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        save_steps=2,
    )
    data = datasets.Dataset.from_dict({"input_ids": rows})
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=small_tokenizer())
    assert trainer.model is model
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def small_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
