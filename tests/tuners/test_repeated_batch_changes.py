"""What a layer remembers of a batch is worth nothing once anything has changed."""

from itertools import product

import pytest
import torch
from repeated_layers import K, N, R, anew, decode, doubled, layer_of
from torch import nn
from torch.nn.utils import parametrize

from fastpeft.tuners.lora import LoraConfig
from fastpeft.tuners.lora.variants import LoraVariant
from fastpeft_kernels import backend


def add(layer, name, **options):
    config = LoraConfig(r=R, init_lora_weights=False, **options)
    layer.update_layer(name, R, lora_alpha=5, config=config)


def give(module, data):
    module.weight.data = data


def halve_rank(layer):
    A, B = layer.lora_A["b"], layer.lora_B["b"]
    give(A, A.weight.data[: R // 2])
    give(B, B.weight.data.view(-1)[: N * R // 2].view(N, R // 2))


class Zero(nn.Linear):
    def forward(self, x):
        return super().forward(x).zero_()


class KeepsItsOutput(nn.Linear):
    kept = None

    def forward(self, x):
        self.kept = super().forward(x) if self.kept is None else self.kept
        return self.kept


class KeepsProducts(torch.Tensor):
    kept = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs)
        x, W, bias = args
        if W.kept is None:
            W.kept = func(x, W.as_subclass(torch.Tensor), bias)
        return W.kept


class Tripled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        return 3 * out.as_subclass(torch.Tensor) if func is nn.functional.linear else out


class AddsNothing(LoraVariant):
    is_a_sum = False

    def obstacle(self, layer, adapter):
        return "it is of no use"

    def add(self, layer, adapter, out, x):
        return out


def insert(layer, name):
    for container in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.r, layer.scaling, layer.variants):
        container[name] = container["b"]


DISTURBANCES = {
    "hook on lora_A": lambda layer: layer.lora_A["b"].register_forward_hook(doubled),
    "hook on lora_B": lambda layer: layer.lora_B["b"].register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "hook on the dropout": lambda layer: layer.lora_dropout["b"].register_forward_hook(doubled),
    "hook on the base": lambda layer: layer.base_layer.register_forward_hook(doubled),
    "replaced forward": lambda layer: setattr(layer.lora_A["b"], "forward", lambda x: torch.ones(*x.shape[:-1], R)),
    "replaced forward of the base": lambda layer: setattr(layer.base_layer, "forward", Zero(K, N).forward),
    "another class": lambda layer: setattr(layer.lora_B["b"], "__class__", Zero),
    "parametrized": lambda layer: parametrize.register_parametrization(layer.lora_A["b"], "weight", nn.Tanh()),
    "another module": lambda layer: layer.lora_A.update({"b": nn.Linear(K, R, bias=False)}),
    "another dropout": lambda layer: layer.lora_dropout.update({"b": nn.Hardtanh()}),
    "another base": lambda layer: setattr(layer, "base_layer", nn.Linear(K, N).requires_grad_(False)),
    "a base that keeps its output": lambda layer: setattr(layer, "base_layer", KeepsItsOutput(K, N)),
    "a weight that keeps products": lambda layer: setattr(
        layer.base_layer, "weight", nn.Parameter(torch.randn(N, K).as_subclass(KeepsProducts), False)
    ),
    "a weight made one that keeps products": lambda layer: torch.utils.swap_tensors(
        layer.base_layer.weight, nn.Parameter(torch.randn(N, K).as_subclass(KeepsProducts), False)
    ),
    "a factor of another type": lambda layer: torch.utils.swap_tensors(
        layer.lora_A["b"].weight, nn.Parameter(layer.lora_A["b"].weight.detach().as_subclass(Tripled))
    ),
    "another variant": lambda layer: layer.variants.update(b=AddsNothing()),
    "another base weight": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(N, K), False)),
    "another Parameter": lambda layer: setattr(layer.lora_A["b"], "weight", nn.Parameter(torch.randn(R, K))),
    "no Parameter": lambda layer: layer.lora_A["b"]._parameters.update(weight=torch.randn(R, K)),
    "a bias": lambda layer: layer.lora_B["b"].register_parameter("bias", nn.Parameter(torch.ones(N))),
    "other memory": lambda layer: give(layer.lora_B["b"], torch.randn(N, R)),
    "a lower rank": halve_rank,
    "the same memory transposed": lambda layer: give(layer.lora_A["b"], layer.lora_A["b"].weight.data.view(K, R).t()),
    "one row for all": lambda layer: give(layer.lora_A["b"], layer.lora_A["b"].weight.data[:1].expand(R, K)),
    "a scaling": lambda layer: layer.set_scale("b", 3.0),
    "casting off": lambda layer: setattr(layer, "cast_input_dtype_enabled", False),
    "an adapter replaced": lambda layer: add(layer, "b"),
    "another adapter": lambda layer: add(layer, "elsewhere"),
    "made DoRA": lambda layer: add(layer, "b", use_dora=True),
    "an adapter deleted": lambda layer: layer.delete_adapter("b"),
    "an adapter put in": lambda layer: insert(layer, "elsewhere"),
    "no rank": lambda layer: layer.r.pop("b"),
    "an adapter taken out": lambda layer: [
        getattr(layer, part).pop("b") for part in ("lora_A", "lora_B", "lora_dropout", "r")
    ],
    "cast": lambda layer: layer.double(),
}


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *product(["torch"], DISTURBANCES),
        *product(["triton"], sorted(DISTURBANCES.keys() - {"cast"})),
    ],  # float64 has no kernels
)
def test_what_has_changed_is_seen(path, kind):
    with backend(path):
        layer = layer_of()
        before = [decode(layer) for _ in range(5)][-1]  # twice with a look for hooks
        dtype = torch.float64 if kind == "cast" else torch.float32
        DISTURBANCES[kind](layer)
        wanted = anew(layer, dtype=dtype)
        for _ in range(3):
            assert torch.equal(decode(layer, dtype=dtype), wanted)
    assert kind in ("casting off", "cast") or not torch.equal(wanted, before)
