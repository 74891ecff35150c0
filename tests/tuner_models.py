"""Models with a LoRA tuner, and what must not change in them."""

import models
import torch

from fastpeft.tuners.lora import LoraConfig, LoraModel
from fastpeft.tuners.tuners_utils import BaseTunerLayer

FAMILIES = ["llama", "gpt2", "bert_classifier", "t5"]


def tuner_of(family="llama", dtype=torch.float32, name="default", **options):
    options = {"target_modules": models.TARGETS[family], "r": 4, "init_lora_weights": False} | options
    torch.manual_seed(1)
    return LoraModel(models.build(family, dtype), LoraConfig(**options), name)


def add(tuner, name, **options):
    tuner.peft_config[name] = LoraConfig(**{"r": 2, "target_modules": ["k_proj"], "init_lora_weights": False} | options)
    tuner.inject_adapter(tuner.model, name)


def logits(model, family="llama", **kwargs):
    return model(**models.batch(family), **kwargs).logits


def snapshot(model):
    """Everything that a failed call has to leave alone."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        [(m.active_adapters, m.disable_adapters, list(m.merged_adapters)) for m in model.modules() if is_adapted(m)],
    )


def is_adapted(module):
    return isinstance(module, BaseTunerLayer)


def assert_unchanged(model, before):
    modules, parameters, states = snapshot(model)
    assert modules == before[0]
    assert [p[:3] for p in parameters] == [p[:3] for p in before[1]]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(parameters, before[1], strict=True))
    assert states == before[2]
