"""Adapted models of every family, what they give and what they hold: shared by the tests of PeftModel."""

import torch
from models import TARGETS, TASK_TYPES, batch, build

from fastpeft import LoraConfig, get_peft_model

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
