"""Models with adapters "a" and "b" for mixed batches: shared by the tests of routing."""

import warnings

import models
import torch

import fastpeft


def adapted(family="llama", **options):
    options = {"r": 4, "target_modules": models.TARGETS[family], "init_lora_weights": False} | options
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fastpeft.get_peft_model(models.build(family), fastpeft.LoraConfig(**options), adapter_name="a")
        model.add_adapter("b", fastpeft.LoraConfig(**(options | {"r": 3})))
    return model
