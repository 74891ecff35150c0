"""Layers on one tensor in a batch of mixed adapters: one shrink for all, and the bits of each by itself."""

import contextlib
import types

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
from fastpeft_kernels.routed_group import RepeatedGroup

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
    add = RepeatedGroup.add_to_
    monkeypatch.setattr(
        RepeatedGroup, "add_to_", lambda self, outs, *rest: calls.append(len(outs)) or add(self, outs, *rest)
    )
    return calls


@contextlib.contextmanager
def inferring(path="triton"):
    with backend(path), torch.no_grad():
        yield


def assert_equal_to_separate(model, x, names=NAMES):
    """Each time a routing of its own, so that layers do not remember the batch."""
    with inferring():
        together = model(x, adapter_names=Routing.by_row(names))
        with fastpeft.share_inputs(False):
            separate = model(x, adapter_names=Routing.by_row(names))
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
    routings = [Routing.by_token(["first", "__base__", "second"], [5, 1, 4]) for _ in range(2)]
    with inferring(), routed(routings[0]):
        together = model(x_of())
    with inferring(), routed(routings[1]), fastpeft.share_inputs(False):
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
    assert ops == [1, 1, 1]


def test_only_those_with_the_same_adapters(ops):
    """v has no second adapter: its rows are routed otherwise."""
    assert_equal_to_separate(made(second=["q", "k"]), x_of())
    assert ops == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_ops_do_not_compute(options, ops):
    assert_equal_to_separate(made(**options), x_of())
    assert set(ops) <= {1}


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


def calling(forward, targets=("q", "k", "v"), k=None):
    """A model whose attention runs `forward`, whatever the source of its class says."""
    torch.manual_seed(0)
    net = Net()
    net.attention.k = k or net.attention.k
    config = fastpeft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
    model = fastpeft.get_peft_model(net, config, adapter_name="first").eval()
    model.add_adapter("second", config)
    attention_of(model).forward = types.MethodType(forward, attention_of(model))
    return model


def narrow(self, x):
    return torch.cat([self.q(x), self.k(x[..., :8]), self.v(x)], -1)


def half(self, x):
    return torch.cat([self.q(x), self.k(x.half()), self.v(x)], -1)


@pytest.mark.parametrize(("forward", "k"), [(narrow, lambda: nn.Linear(8, 8)), (half, lambda: nn.Linear(16, 8).half())])
def test_a_sibling_that_takes_another_input_waits_for_it(forward, k, ops):
    assert_equal_to_separate(calling(forward, k=k()), x_of())
    assert ops == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["q", "v"])
def test_a_layer_whose_own_base_is_watched(name, ops):
    """It keeps the shape that somebody gives its base's output, and computes for nobody else."""
    model, shapes = made(), []
    layer = getattr(attention_of(model), name)
    layer.base_layer.register_forward_hook(lambda module, args, out: out.flatten(0, 1))
    layer.register_forward_hook(lambda module, args, out: shapes.append(out.shape) or out.view(5, 2, -1))
    assert_equal_to_separate(model, x_of())
    assert shapes == [(10, 16)] * 2
    assert sorted(ops) == [1, 1, 1, 1, 2]


def test_where_there_is_nothing_to_compute():
    """float64 has no kernels, and rows of nobody need none."""
    model, x = made().double(), x_of().double()
    assert_equal_to_separate(model, x, ["__base__"] * 5)
    with inferring("torch"), model.disable_adapter():
        base = model(x)
    with inferring():
        assert torch.equal(model(x, adapter_names=["__base__"] * 5), base)


def test_what_inference_mode_made_stays_there():
    def forward(self, x):
        with torch.inference_mode():
            self.q(x)
        return self.k(x)

    with inferring():
        assert not calling(forward)(x_of(), adapter_names=NAMES).is_inference()


def test_many_rows(ops, monkeypatch):
    """The outputs that wait for their layers would take memory."""
    monkeypatch.setattr(routed_sharing, "FEW_ROUTED_ROWS", 10)
    assert_equal_to_separate(made(), x_of())
    assert set(ops) == {1}


# A batch that comes again.


def steps(model, count=4, names=tuple(NAMES)):
    """The outputs of so many forwards, each on another x."""
    outs = []
    for seed in range(count):
        x = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(seed))
        with inferring():
            outs.append(model(x, adapter_names=list(names)))
    return outs


def forget(model):
    for layer in (attention_of(model).q, attention_of(model).k, attention_of(model).v):
        layer.repeated_batch.forget()


def assert_equal_to_fresh(model, **kwargs):
    again = steps(model, **kwargs)
    forget(model)
    with fastpeft.share_inputs(False):
        fresh = steps(model, **kwargs)
    assert all(map(torch.equal, again, fresh))


def test_a_batch_that_comes_again(ops, monkeypatch):
    """From the third time on nobody looks at the adapters one by one."""
    model, looks = made(), []
    for place in (routed_layers, routed_sharing):
        look = place.plain_factors
        monkeypatch.setattr(place, "plain_factors", lambda *args, look=look: looks.append(args) or look(*args))
    steps(model, 5)
    assert ops == [3] * 5
    assert len(looks) == 2 * 3
    assert_equal_to_fresh(model)


def of_all(change):
    return lambda attention: [change(layer) for layer in (attention.q, attention.k, attention.v)]


def give(layer, adapter):
    layer.lora_B[adapter].weight = nn.Parameter(torch.randn_like(layer.lora_B[adapter].weight))


@pytest.mark.parametrize(
    "change",
    [
        lambda attention: attention.k.set_scale("second", 3.0),
        lambda attention: attention.k.lora_B["first"].register_forward_hook(lambda module, args, out: 2 * out),
        lambda attention: setattr(attention.k, "base_layer", nn.Linear(16, 8).requires_grad_(False)),
        lambda attention: attention.k.enable_adapters(False),
        lambda attention: attention.k.delete_adapter("first"),
        lambda attention: attention.q.set_scale("first", 0.5),
        of_all(lambda layer: layer.set_scale("first", 0.5)),
        of_all(lambda layer: give(layer, "second")),
        of_all(lambda layer: layer.delete_adapter("first")),
        lambda attention: [attention.q.set_scale("first", 0.5), give(attention.k, "second")],
    ],
)
def test_a_change_is_seen_at_once(change):
    """Of one of them or of all: the first that is called must not trust what the others remember."""
    model = made()
    before = steps(model, 5)
    change(attention_of(model))
    after = steps(model, 5)
    assert not any(map(torch.equal, after, before))
    forget(model)
    with fastpeft.share_inputs(False):
        assert all(map(torch.equal, after, steps(model, 5)))


def test_another_thread_on_the_same_batch(monkeypatch):
    """It may compute a layer by itself in the midst of the group."""
    model = made()
    wanted = steps(model, 5)[-1]
    attention, tables = attention_of(model), Routing.tables
    x = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(4))

    def interrupted(self, *args):
        found = tables(self, *args)
        with monkeypatch.context() as patch:
            patch.setattr(Routing, "tables", tables)
            with routed(self), fastpeft.share_inputs(False):
                attention.q(x)
        return found

    monkeypatch.setattr(Routing, "tables", interrupted)
    with inferring():
        assert torch.equal(model(x, adapter_names=NAMES), wanted)


def test_one_that_forgot_is_computed_by_itself(ops):
    model = made()
    steps(model, 5)
    ops.clear()
    attention_of(model).k.repeated_batch.forget()
    steps(model, 4)
    assert ops[0] == 2
    assert ops[-1] == 3
    assert_equal_to_fresh(model)
