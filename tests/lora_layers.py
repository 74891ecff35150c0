"""LoRA layers over every base layer, and the same ones of reference PEFT."""

import copy

import torch
from numerics import assert_as_close_as_torch
from peft import LoraConfig as ReferenceConfig
from peft.tuners.lora import layer as reference
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.tuners.lora import LoraConfig
from fastpeft.tuners.lora.layer import Embedding, Linear

K, N, R = 37, 23, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASES = {
    "linear": lambda: nn.Linear(K, N),
    "linear, no bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
    "embedding": lambda: nn.Embedding(K, N, padding_idx=0),
}
KINDS = list(BASES)


def config_of(**options):
    return LoraConfig(**{"r": R, "lora_alpha": 3, "init_lora_weights": False} | options)


def lora(kind, dtype=torch.float32, adapter_dtype=torch.float32, seed=0, **options):
    """A layer of ours with one adapter, "default"."""
    torch.manual_seed(seed)
    layer_cls = Embedding if kind == "embedding" else Linear
    layer = layer_cls(BASES[kind]().to(dtype), "default", config_of(**options), r=R, lora_alpha=3)
    layer.base_layer.requires_grad_(False)
    for _, part in layer._parts():
        part.data = part.data.to(adapter_dtype) if isinstance(part, torch.Tensor) else None
        if isinstance(part, nn.Module):
            part.to(adapter_dtype)
    return layer


def reference_of(layer, kind, **options):
    """Reference PEFT's layer with the same weights and the same adapters."""
    config = ReferenceConfig(r=R, lora_alpha=3, fan_in_fan_out=kind == "conv1d", **options)
    names = list(layer.r)
    layer_cls = reference.Embedding if kind == "embedding" else reference.Linear
    theirs = layer_cls(copy.deepcopy(layer.base_layer), names[0], config, r=R, lora_alpha=3)
    for name in names[1:]:
        theirs.update_layer(name, layer.r[name], lora_alpha=3, config=config)
    for own, part in zip(theirs.parameters(), layer.parameters(), strict=True):
        own.data = part.data.clone()
        own.requires_grad = part.requires_grad
    theirs.scaling = dict(layer.scaling)
    theirs.set_adapter(layer.active_adapters)
    return theirs


def input_of(kind, dtype=torch.float32, shape=(3, 11)):
    generator = torch.Generator().manual_seed(1)
    if kind == "embedding":
        return torch.randint(0, K, shape, generator=generator)
    return torch.randn(*shape, K, generator=generator).to(dtype)


def run(layer, x):
    """Output, gradient of the input (where it has one) and of every trainable parameter."""
    layer.zero_grad()
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    out = layer(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    return {"out": out.detach()} | ({"dx": x.grad} if x.is_floating_point() else {}) | grads


def assert_same_numbers(layer, theirs, x):
    ours, eager = run(layer, x), run(theirs, x)
    exact = run(copy.deepcopy(theirs).double(), x.double() if x.is_floating_point() else x)
    assert ours.keys() == eager.keys()
    for name in ours:
        assert ours[name].dtype == eager[name].dtype, name
        assert_as_close_as_torch(name, ours[name], eager[name], exact[name])
