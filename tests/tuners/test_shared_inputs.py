"""Layers that their parent calls on one tensor, computed by one op: right whatever happens between them."""

import contextlib
import copy
import io
import pickle
from typing import Any

import pytest
import torch
from models import batch, tiny_llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.tuners import shared_inputs
from fastpeft.tuners.lora import fused
from fastpeft_kernels import product

pytestmark = pytest.mark.usefixtures("ops_for_few")


def nothing() -> None:
    """In the place of what runs between two calls."""


class Attention(nn.Module):
    """q, k and v on one tensor; o on another one of the same width. `between` runs after q."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 16), nn.Linear(16, 16)
        self.between: Any = nothing

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        self.between()
        k, v = self.k(x), self.v(x)
        return self.o(q * k.repeat(1, 2) + v)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def adapted(targets: Any = ("q", "k", "v", "o"), **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": 4, "init_lora_weights": False} | options
    return fastpeft.get_peft_model(Net(), fastpeft.LoraConfig(target_modules=list(targets), **options))


def attention_of(model: Any) -> Any:
    return model.base_model.model.attention


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each op computed, in order."""
    calls: list[int] = []
    alone, group = fused.lora_linear, fused.lora_group
    monkeypatch.setattr(fused, "lora_linear", lambda *args: calls.append(1) or alone(*args))
    monkeypatch.setattr(fused, "lora_group", lambda x, members: calls.append(len(members)) or group(x, members))
    return calls


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    out = model(x)
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad, **grads}


def assert_equal_to_separate(model: nn.Module, x: Tensor) -> None:
    together = results(model, x)
    with fastpeft.share_inputs(False):
        separate = results(model, x)
    assert together.keys() == separate.keys()
    for name in separate:
        torch.testing.assert_close(together[name], separate[name], msg=lambda m, n=name: f"{n}: {m}")


# Computed together.


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.0, "rank_pattern": {"k": 7}, "use_rslora": True}], ids=str)
def test_one_op_and_the_numbers_of_three(options, ops):
    model = adapted(**options)
    x = torch.randn(5, 16)
    results(model, x)
    assert ops == [3, 1]
    assert_equal_to_separate(model, x)
    assert ops[2:] == [3, 1, 1, 1, 1, 1]


def test_mixed_targets(ops):
    """Only q and v have an adapter: they share, k's gradient comes from the base model."""
    model = adapted(targets=["q", "v"])
    assert_equal_to_separate(model, torch.randn(5, 16))
    assert ops == [2, 1, 1]


def test_several_adapters(ops):
    model = adapted()
    model.add_adapter("other", fastpeft.LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert_equal_to_separate(model, torch.randn(5, 16))
    assert ops == [3, 1, 1, 1, 1, 1]
    model.set_adapter("other")
    results(model, torch.randn(5, 16))
    assert ops[6:] == [2]


def test_dropout_masks_are_independent():
    model = adapted(lora_dropout=0.5).train()
    attention = attention_of(model)
    for name in ("q", "k", "v"):
        layer = getattr(attention, name)
        with torch.no_grad():
            layer.base_layer.weight.zero_()
            layer.base_layer.bias.zero_()
            layer.lora_A["default"].weight.fill_(1.0)
            layer.lora_B["default"].weight.fill_(1.0)
    seen: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out[:, 0]}))
    model(torch.rand(200, 16))
    correlation = torch.corrcoef(torch.stack([seen[name] for name in ("q", "k", "v")]).detach())
    # the sums over the kept half of x: what they share is x itself; one mask would correlate them fully
    assert (correlation - torch.eye(3)).abs().max() < 0.6


def test_a_layer_that_is_called_alone_pays_for_itself(ops):
    model = adapted()
    attention, x = attention_of(model), torch.randn(5, 16)
    attention.q(x)
    attention.k(torch.randn(5, 16))
    assert ops == [1, 1]
    assert attention.q.input_group._together is None


def test_another_tensor_another_mode_or_a_changed_one(ops):
    """Between q and k anything may happen: what was computed is then not used."""
    model = adapted()
    attention = attention_of(model)
    x = torch.randn(5, 16)
    expected = results(model, x)

    with torch.no_grad():
        first, second = x.clone(), x.clone()
        attention.between = lambda: first.add_(1)
        changed = model(first)
        attention.between = lambda: second.add_(1)
        with fastpeft.share_inputs(False):
            torch.testing.assert_close(changed, model(second))

    attention.between = lambda: torch.set_grad_enabled(True)
    with torch.no_grad():
        assert model(x).requires_grad  # k and v were computed under grad mode

    def fail() -> None:
        raise RuntimeError("boom")

    attention.between = fail
    with pytest.raises(RuntimeError, match="boom"):
        model(x)
    assert attention.q.input_group._together is None
    assert not attention.q.input_group.is_on()
    attention.between = lambda: None
    torch.testing.assert_close(results(model, x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected["out"])


def test_nothing_is_kept_after_the_forward():
    model = adapted()
    model(torch.randn(5, 16))
    group = attention_of(model).q.input_group
    assert group._together is None
    assert not group.is_on()


def test_nothing_is_kept_after_an_interrupted_forward(ops):
    """torch calls no hook after a KeyboardInterrupt."""
    model = adapted()

    def interrupt():
        attention.between = nothing
        pickle.dumps(group)  # a forward that runs is no obstacle
        raise KeyboardInterrupt

    attention, group = attention_of(model), attention_of(model).q.input_group
    attention.between = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(40, 16))
    del ops[:]
    attention.q(torch.randn(40, 16))  # alone, it pays for itself
    assert ops == [1]
    assert group._together is None
    assert pickle.loads(pickle.dumps(group)).names == group.names


@pytest.mark.parametrize(
    "change", ["hook on lora_A", "pre-hook on the layer", "forward replaced", "merged", "disabled", "backward hook"]
)
def test_a_member_that_is_not_fused_stays_out(change, ops):
    model = adapted()
    k = attention_of(model).k
    ran: list[int] = []
    if change == "hook on lora_A":
        k.lora_A["default"].register_forward_hook(lambda *args: ran.append(1))
    elif change == "pre-hook on the layer":
        k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif change == "forward replaced":
        forward = k.forward
        k.forward = lambda x: forward(x * 2)
    elif change == "backward hook":
        k.register_full_backward_hook(lambda *args: None)
    elif change == "merged":
        k.merge()
    else:
        k.enable_adapters(False)
    x = torch.randn(5, 16)
    out = model(x)
    assert ops[0] == 2, "q and v"
    assert bool(ran) == (change == "hook on lora_A")
    with fastpeft.share_inputs(False):
        torch.testing.assert_close(out, model(x))


class ChangesBetween(Attention):
    """What is called between q and k changes x in place, where no version tells."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        self.act(x)
        return self.o(q * self.k(x).repeat(1, 2) + self.v(x))


@pytest.mark.parametrize("mode", ["inference", "compile"])
def test_a_module_in_between_may_change_the_input(mode):
    net = Net()
    net.attention = ChangesBetween()
    config = fastpeft.LoraConfig(r=4, target_modules=["q", "k", "v"], init_lora_weights=False)
    model: Any = fastpeft.get_peft_model(net, config)
    assert attention_of(model).k.input_group.names == ("k", "v")
    x = torch.randn(40, 16)
    with torch.no_grad(), fastpeft.share_inputs(False):
        expected = model(x.clone())
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if mode == "compile" else model
    with torch.inference_mode() if mode == "inference" else torch.no_grad():
        torch.testing.assert_close(forward(x.clone()), expected)


class Checkpointed(Attention):
    """Checkpoints a part of its own forward: the part runs again when the forward is over."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=self.reentrant)

    def part(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.v(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_parent_that_checkpoints_a_part_of_itself(reentrant, monkeypatch):
    monkeypatch.setattr(Checkpointed, "reentrant", reentrant)
    net = Net()
    net.attention = Checkpointed()
    config = fastpeft.LoraConfig(r=4, target_modules=["q", "v"], lora_dropout=0.3, init_lora_weights=False)
    model = fastpeft.get_peft_model(net, config).train()
    x = torch.randn(40, 16)
    shared = results(model, x)
    with fastpeft.share_inputs(False):
        alone = results(model, x)
    assert all(torch.equal(shared[name], alone[name]) for name in alone)  # the masks of the forward, both times


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_dropout_gives_the_same_gradients(reentrant, ops):
    """Bit by bit those of the forward without checkpoints: the recomputation groups and draws as the forward did."""
    config = fastpeft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = fastpeft.get_peft_model(tiny_llama(use_cache=False), config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(**batch("llama")).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert 3 in ops


def test_generation_with_a_cache_gives_the_same_tokens(ops):
    config = fastpeft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = fastpeft.get_peft_model(tiny_llama(), config).eval()
    ids = torch.randint(3, 90, (2, 11))  # a token at a time, each layer is computed by itself
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(input_ids=ids, **options)
    assert set(ops) == {1, 2, 3}
    with fastpeft.share_inputs(False):
        assert torch.equal(together, model.generate(input_ids=ids, **options))


# Found anew, and taken apart.


def test_copies_have_groups_of_their_own(ops):
    model, x = adapted(), torch.randn(5, 16)
    expected = results(model, x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    pickled = torch.load(stream, weights_only=False)
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), pickled):
        group = attention_of(twin).q.input_group
        assert group.parent is attention_of(twin)
        ops.clear()
        torch.testing.assert_close(results(twin, x), expected)
        assert ops == [3, 1]
    lonely = copy.deepcopy(attention_of(model).q)
    assert lonely.input_group is None
    torch.testing.assert_close(lonely(x), attention_of(model).q(x))


def test_layers_that_come_and_go(ops):
    model, x = adapted(targets=["q"]), torch.randn(5, 16)
    attention = attention_of(model)
    assert attention.q.input_group is None
    model.add_adapter("default2", fastpeft.LoraConfig(r=2, target_modules=["v"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "default2"])
    assert attention.v.input_group.names == ("q", "v")
    assert_equal_to_separate(model, x)
    assert len(attention._forward_pre_hooks) == 1
    base = model.unload()
    assert not base.attention._forward_pre_hooks
    assert not base.attention._forward_hooks
    assert type(base.attention.q) is nn.Linear


def test_a_layer_that_was_replaced_by_hand(ops):
    model, x = adapted(), torch.randn(5, 16)
    attention = attention_of(model)
    old = attention.k
    attention.k = nn.Linear(16, 8)
    model(x)
    assert ops == [2, 1]
    assert old.input_group.name_of(old) is None


def test_explain_shows_the_groups():
    model = adapted()
    shares = {layer.name.rpartition(".")[2]: layer.shares for layer in fastpeft.explain(model)}
    assert shares == {"q": ("k", "v"), "k": ("q", "v"), "v": ("q", "k"), "o": ()}
    attention_of(model).k.lora_A["default"].register_forward_hook(lambda *args: None)
    assert fastpeft.explain(model)[0].shares == ("v",)
    with fastpeft.share_inputs(False):
        assert not any(layer.shares for layer in fastpeft.explain(model))
    assert "shares" in str(fastpeft.explain(model)).splitlines()[0]


def test_our_own_product_takes_layers_one_by_one():
    with product("own"):
        assert not any(layer.shares for layer in fastpeft.explain(adapted()))


def test_the_environment_says_0_or_1():
    assert [shared_inputs._switch(value) for value in (None, "", "1", "0")] == [True, True, True, False]
    with pytest.raises(ValueError, match="must be 0 or 1; got 'off'"):
        shared_inputs._switch("off")


def test_switch_is_restored_after_an_error():
    with contextlib.suppress(RuntimeError), fastpeft.share_inputs(False):
        raise RuntimeError
    assert fastpeft.explain(adapted())[0].shares
