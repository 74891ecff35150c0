"""Small joint runs, and the same adapters each trained alone by transformers' own Trainer."""

from typing import Any

import torch
from models import VOCAB, tiny_llama
from transformers import Trainer, TrainingArguments

from fastpeft import LoraConfig, PeftModel, get_peft_model
from fastpeft.cli.data import PadRight
from fastpeft.joint import AdapterTraining, JointTrainer

CONFIGS = {
    "w": {"r": 2, "lora_alpha": 4},
    "x": {"r": 5, "lora_alpha": 40},
    "y": {"r": 8, "lora_alpha": 8, "use_rslora": True},
    "z": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
}
PAD = PadRight(0)


def rows(count: int, seed: int, shortest: int = 3, longest: int = 13) -> list[dict[str, Any]]:
    """Token rows of different lengths, learnable: each row counts upwards from some token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    starts = torch.randint(3, VOCAB - longest, (count,), generator=generator).tolist()
    made = [list(range(start, start + n)) for start, n in zip(starts, lengths, strict=True)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def make_model(names: str = "wxyz", dropout: float = 0.0, **more: Any) -> PeftModel:
    """A tiny Llama with adapters of these names; each one's weights depend on its name alone."""
    model = None
    for name in names:
        options = {"target_modules": "all-linear", "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
        config = LoraConfig(**options | CONFIGS[name] | more)
        torch.manual_seed(ord(name))
        if model is None:
            model = get_peft_model(tiny_llama(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


def arguments(folder: Any, **more: Any) -> TrainingArguments:
    options = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "logging_nan_inf_filter": False, "save_strategy": "no", "per_device_train_batch_size": 3, "max_steps": 6,
        "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.0,
    }  # fmt: skip
    return TrainingArguments(**options | more)


def alone(name: str, folder: Any, training: AdapterTraining, model: PeftModel | None = None, **more: Any) -> Trainer:
    """Trainer itself, for one adapter with its own arguments."""
    args = training.arguments(arguments(folder, **more))
    return Trainer(model or make_model(name), args, data_collator=PAD, train_dataset=training.train_dataset)


def joint(folder: Any, trainings: dict[str, AdapterTraining], model: PeftModel | None = None, **more: Any) -> Any:
    model = model or make_model("".join(trainings))
    return JointTrainer(model, arguments(folder, **more), trainings, data_collator=PAD)


def weights(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """An adapter's weights, by keys without its name."""
    parts = {key: p.detach() for key, p in model.named_parameters() if f".{name}." in key}
    return {key.replace(f".{name}.", "."): p.clone() for key, p in parts.items()}


def logged(trainer: Trainer, key: str) -> list[float]:
    return [record[key] for record in trainer.state.log_history if key in record]
