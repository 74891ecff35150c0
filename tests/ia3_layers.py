"""IA3 layers over every base layer, and the same ones of reference PEFT."""

import copy

import models
import pytest
import torch
from numerics import assert_as_close_as_torch
from peft import IA3Config as ReferenceConfig
from peft.tuners.ia3 import layer as reference
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft import IA3Config, get_peft_model
from fastpeft.tuners.ia3 import Linear

K, N = 37, 23
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASES = {
    "linear": lambda: nn.Linear(K, N),
    "linear, no bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
}
SIDES = [True, False]
side = pytest.mark.parametrize("feedforward", SIDES, ids=["input", "output"])
kinds = pytest.mark.parametrize("kind", BASES)


def ia3(kind, feedforward, dtype=torch.float32, adapter_dtype=torch.float32, seed=0):
    """A layer of ours with one adapter, "default"; its vector is random."""
    torch.manual_seed(seed)
    layer = Linear(BASES[kind]().to(dtype), "default", IA3Config(init_ia3_weights=False), feedforward)
    layer.base_layer.requires_grad_(False)
    layer.ia3_l.to(adapter_dtype)
    return layer


def reference_of(layer, kind):
    """Reference PEFT's layer with the same weights and the same adapters."""
    config = ReferenceConfig(fan_in_fan_out=kind == "conv1d")
    names = list(layer.ia3_l)
    theirs = reference.Linear(copy.deepcopy(layer.base_layer), names[0], config, is_feedforward=layer.is_feedforward)
    for name in names[1:]:
        theirs.update_layer(name, config)
    for own, part in zip(theirs.parameters(), layer.parameters(), strict=True):
        own.data = part.data.clone()
        own.requires_grad = part.requires_grad
    theirs.set_adapter(layer.active_adapters)
    return theirs


def input_of(dtype=torch.float32, shape=(3, 11)):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(layer, x):
    """Output, gradient of the input and of every trainable parameter."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "dx": x.grad, **grads}


def assert_same_numbers(layer, theirs, x):
    ours, eager = run(layer, x), run(theirs, x)
    exact = run(copy.deepcopy(theirs).double(), x.double())
    assert ours.keys() == eager.keys()
    for name in ours:
        assert ours[name].dtype == eager[name].dtype, name
        assert_as_close_as_torch(name, ours[name], eager[name], exact[name])


def path_of(model):
    return {layer.name.rpartition(".")[2]: (layer.path, layer.why) for layer in fastpeft.explain(model)}


def tiny(**options):
    return get_peft_model(models.tiny_llama(torch.bfloat16), IA3Config(init_ia3_weights=False, **options))
