"""Layers on one tensor in a batch of mixed adapters: one shrink for all, and the bits of each by itself."""

import contextlib

import pytest
import torch
from models import batch
from routed_models import adapted
from torch import nn

import fastpeft
from fastpeft.routing import Routing
from fastpeft.routing_scope import routed
from fastpeft.tuners.lora import routed as routed_layers
from fastpeft.tuners.lora import routed_sharing
from fastpeft_kernels import backend

NAMES = ["second", "__base__", "first", "second", "first"]


def nothing():
    """In the place of what runs between two calls."""


class Attention(nn.Module):
    """q, k and v on one tensor. `between` runs after q."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 16)
        self.between = nothing

    def forward(self, x):
        q = self.q(x)
        self.between()
        k, v = self.k(x), self.v(x)
        return q * k.repeat(1, 1, 2) + v


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x)


def made(targets=("q", "k", "v"), second=("q", "k", "v"), dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"init_lora_weights": False} | options
    config = fastpeft.LoraConfig(r=4, target_modules=list(targets), **options)
    model = fastpeft.get_peft_model(Net().to(dtype), config, adapter_name="first")
    model.add_adapter("second", fastpeft.LoraConfig(r=3, lora_alpha=5, target_modules=list(second), **options))
    return model.eval()


def attention_of(model):
    return model.base_model.model.attention


def x_of(dtype=torch.float32):
    return torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def ops(monkeypatch):
    """How many layers each op computed, in order."""
    calls = []
    alone, group = routed_layers.lora_routed, routed_sharing.lora_routed_group
    monkeypatch.setattr(routed_layers, "lora_routed", lambda *args, **kw: calls.append(1) or alone(*args, **kw))
    monkeypatch.setattr(
        routed_sharing, "lora_routed_group", lambda x, ms, *args: calls.append(len(ms)) or group(x, ms, *args)
    )
    return calls


@contextlib.contextmanager
def inferring(path="triton"):
    with backend(path), torch.no_grad():
        yield


def assert_equal_to_separate(model, x, names=NAMES):
    with inferring():
        together = model(x, adapter_names=names)
        with fastpeft.share_inputs(False):
            separate = model(x, adapter_names=names)
    assert torch.equal(together, separate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_op_and_the_bits_of_three(dtype, ops):
    model = made(dtype=dtype)
    assert_equal_to_separate(model, x_of(dtype))
    assert ops == [3, 1, 1, 1]


def test_weighted_rows(ops):
    assert_equal_to_separate(made(), x_of(), [{"first": 0.5, "second": -1.0}, "first", {"second": 2.0}, None, "second"])
    assert ops == [3, 1, 1, 1]


def test_tokens(ops):
    model = made()
    routing = Routing.by_token(["first", "__base__", "second"], [5, 1, 4])
    with inferring(), routed(routing):
        together = model(x_of())
        with fastpeft.share_inputs(False):
            separate = model(x_of())
    assert torch.equal(together, separate)
    assert ops == [3, 1, 1, 1]


def test_generate(ops):
    model = adapted("llama", target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]).eval()
    ids = batch("llama")["input_ids"][:2]
    with inferring():
        together = model.generate(input_ids=ids, adapter_names=["a", "b"], max_new_tokens=3, do_sample=False)
        shared = list(ops)
        with fastpeft.share_inputs(False):
            separate = model.generate(input_ids=ids, adapter_names=["a", "b"], max_new_tokens=3, do_sample=False)
    assert torch.equal(together, separate)
    assert shared == [3, 2, 1] * (len(shared) // 3)
    assert set(ops[len(shared) :]) == {1}


def test_inference_mode(ops):
    """Where torch counts no changes, only what the source is sure of: not q, after which anything may run."""
    with torch.inference_mode():
        assert_equal_to_separate(made(), x_of())
    assert ops == [1, 2, 1, 1, 1]


@pytest.mark.parametrize(("path", "grad"), [("torch", False), ("triton", True)], ids=["on a CPU", "with gradients"])
def test_each_for_itself(path, grad, ops):
    """There is nothing to share on a CPU, and layers with gradients are not computed together."""
    with backend(path), torch.set_grad_enabled(grad):
        made()(x_of(), adapter_names=NAMES)
    assert set(ops) == {1} or path == "torch"
    assert 3 not in ops


def test_only_those_with_the_same_adapters(ops):
    """v has no second adapter: its rows are routed otherwise."""
    assert_equal_to_separate(made(second=["q", "k"]), x_of())
    assert ops == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_ops_do_not_compute(options, ops):
    assert_equal_to_separate(made(**options), x_of())
    assert 3 not in ops


def test_dropout_in_force(ops):
    model = made(lora_dropout=0.5)
    assert_equal_to_separate(model, x_of())
    assert ops == [3, 1, 1, 1]
    model.train()
    with inferring():
        model(x_of(), adapter_names=NAMES)
    assert 3 not in ops[4:]


def test_a_watched_sibling_computes_for_itself(ops):
    model = made()
    seen = []
    attention_of(model).k.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert_equal_to_separate(model, x_of())
    assert len(seen) == 2
    assert ops == [2, 1, 1, 1, 1]


def test_a_disabled_sibling_adds_nothing(ops):
    model = made()
    attention_of(model).k.enable_adapters(False)
    assert_equal_to_separate(model, x_of())
    assert ops == [2, 1, 1]


@pytest.mark.parametrize("what", ["x", "routing"])
def test_what_changes_between_two_calls(what, ops):
    """An x that is changed in place, a routing that is refilled: the others compute anew."""
    model, x = made(), x_of()
    routing, other = Routing.by_row(NAMES), NAMES[::-1]

    def change():
        if what == "x":
            x.mul_(2)
        else:
            routing.refill(other)

    attention_of(model).between = change
    with inferring(), routed(routing):
        together = model(x)
    x, routing = x_of(), Routing.by_row(NAMES)
    with inferring(), routed(routing), fastpeft.share_inputs(False):
        separate = model(x)
    assert torch.equal(together, separate)
    assert ops == [3, 1, 1, 1, 1, 1]


def test_without_the_routing_they_are_the_active_ones(ops):
    """k and v, called without names between two calls with them, do not pick up what was computed for the rows."""
    model, x = made(), x_of()
    attention = attention_of(model)
    found = {}

    def between():
        with routed(None):
            found["k"] = attention.k(x)

    attention.between = between
    with inferring():
        model(x, adapter_names=NAMES)
        attention.between = nothing
        assert torch.equal(found["k"], attention.k(x))
    assert ops[0] == 3


def test_nothing_outlives_the_parents_forward():
    model, x = made(), x_of()
    with inferring():
        model(x, adapter_names=NAMES)
    assert attention_of(model).q.input_group._together is None


def test_a_member_called_alone():
    model, x = made(), x_of()
    attention = attention_of(model)
    with inferring(), routed(Routing.by_row(NAMES)):
        alone = attention.k(x)
        found = []
        attention.between = lambda: found.append(attention.k(x * 1))
        model(x)
    assert torch.equal(found[0], alone)
