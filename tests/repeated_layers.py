"""Layers whose adapters lie side by side, and batches that come again: shared by the tests of repeated batches."""

import torch
from torch import nn

from fastpeft.routing import Routing
from fastpeft.routing_scope import routed
from fastpeft.tuners.lora import LoraConfig
from fastpeft.tuners.lora.layer import Linear
from fastpeft.tuners.lora.repeated_batch import RepeatedBatch

K, N, R = 32, 48, 16
NAMES = ["b", "__base__", "c", "elsewhere", "b", "a", "c"]


def layer_of(dtype=torch.float32, ranks=(R, R, R), **options):
    """Adapters a, b, c in fp32, laid side by side."""
    torch.manual_seed(0)
    layer = None
    for name, r in zip("abcdefghijk", ranks, strict=False):
        config = LoraConfig(r=r, init_lora_weights=False, lora_dropout=0.2, **options)
        if layer is None:
            layer = Linear(nn.Linear(K, N).to(dtype), name, config, r=r, lora_alpha=r)
        else:
            layer.update_layer(name, r, lora_alpha=r, config=config)
    for _, part in layer._parts():
        part.weight.data = torch.randn(part.weight.shape) * 0.3
    layer.base_layer.requires_grad_(False)
    layer.settle_adapters()
    return layer.eval()


def decode(layer, names=NAMES, dtype=torch.float32, seed=1):
    x = torch.randn(len(names), 1, layer.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad(), routed(routing_of(tuple(names))):
        return layer(x)


kept = {}


def routing_of(names):
    return kept.setdefault(names, Routing.by_row(names))


def anew(layer, **options):
    """What the layer computes when it remembers nothing; what it does remember is left alone."""
    remembered, layer.repeated_batch = layer.repeated_batch, RepeatedBatch()
    out = decode(layer, **options)
    layer.repeated_batch = remembered
    return out


def doubled(module, args, out):
    return 2 * out
