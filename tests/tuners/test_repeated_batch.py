"""A batch that comes again: what a layer remembers gives the same bits, in every mode."""

import copy
import pickle

import pytest
import torch
from lora_operands import BACKENDS
from repeated_layers import NAMES, K, N, anew, decode, doubled, layer_of, routing_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.routing import Routing
from fastpeft.routing_scope import routed
from fastpeft.tuners.eligibility import hooks_registered
from fastpeft.tuners.lora import repeated_batch
from fastpeft.tuners.lora import routed as routed_layers
from fastpeft.tuners.lora.repeated_batch import RepeatedBatch
from fastpeft_kernels import backend
from fastpeft_kernels.routed_few import Products


@pytest.fixture
def looks(monkeypatch):
    """A list that grows whenever a layer looks at all of its adapters."""
    seen, look = [], routed_layers.plain_factors
    monkeypatch.setattr(routed_layers, "plain_factors", lambda *args: seen.append(args) or look(*args))
    return seen


@pytest.mark.parametrize("path", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "names", [NAMES, ["a", "a"], ["a", "b", "c"], ["c", "b", "a", "a"], ["__base__"] * 2], ids=lambda names: names[-1]
)
def test_the_same_bits_again(names, dtype, path, looks):
    layer = layer_of(dtype)
    with backend(path):
        for seed in range(5):
            out = decode(layer, names, dtype, seed)
            count = len(looks)
            assert torch.equal(out, anew(layer, names=names, dtype=dtype, seed=seed))
            del looks[count:]
    assert len(looks) == (2 if set(names) & set("abc") else 0)


def test_a_prompt_and_its_tokens(looks):
    """The first token after the prompt is remembered; a prompt, or the tokens of another routing, are not."""
    layer, routing, other, counts = layer_of(), Routing.by_row(NAMES), Routing.by_row(NAMES[::-1]), []
    for where, tokens in [(routing, 7), (routing, 1), (routing, 1), (routing, 2), (other, 1), (other, 1)]:
        x = torch.randn(len(NAMES), tokens, K, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad(), routed(where):
            out = layer(x)
            counts.append(len(looks))
            remembered, layer.repeated_batch = layer.repeated_batch, RepeatedBatch()
            assert torch.equal(out, layer(x))
        layer.repeated_batch = remembered
        del looks[counts[-1] :]
    assert counts == [1, 2, 2, 3, 4, 5]


def test_several_ranks(looks):
    layer = layer_of(ranks=[16] * 5 + [4] * 6)
    names = list("abcdefghijk")
    for seed in range(4):
        out = decode(layer, names, seed=seed)
        count = len(looks)
        assert torch.equal(out, anew(layer, names=names, seed=seed))
        del looks[count:]
    assert len(looks) == 2


def test_kernels_take_factors_wherever_they_lie(looks):
    """Of any ranks, and rows with weights."""
    layer = layer_of(ranks=[16, 4, 8])
    routing = Routing.by_row([{"a": 0.5, "c": -1.0}, {"b": 2.0}, "__base__"])
    for seed in range(4):
        x = torch.randn(3, 1, K, generator=torch.Generator().manual_seed(seed)).bfloat16()
        layer.base_layer.bfloat16()
        with backend("triton"), torch.no_grad(), routed(routing):
            out = layer(x)
            count = len(looks)
            remembered, layer.repeated_batch = layer.repeated_batch, RepeatedBatch()
            assert torch.equal(out, layer(x))
        layer.repeated_batch = remembered
        del looks[count:]
    assert len(looks) == 2


def test_what_one_path_remembers_is_not_the_others(looks):
    layer = layer_of()
    for path in ("torch", "triton", "torch"):
        with backend(path):
            for _ in range(3):
                out = decode(layer)
            assert torch.equal(out, anew(layer))


def test_factors_that_lie_apart_are_looked_at_every_time(looks, monkeypatch):
    layer, tries = layer_of(ranks=[16, 4, 8]), []
    find = repeated_batch.products_of_few
    monkeypatch.setattr(repeated_batch, "products_of_few", lambda *args: tries.append(args) or find(*args))
    for _ in range(4):
        decode(layer)
    assert len(looks) == 4
    assert len(tries) == 1


def test_after_a_change_it_is_remembered_anew(looks):
    layer = layer_of()
    for _ in range(3):
        decode(layer)
    layer.set_scale("b", 3.0)
    for _ in range(4):
        decode(layer)
    assert len(looks) == 4


def test_values_may_change(looks):
    layer = layer_of()
    for _ in range(3):
        before = decode(layer)
    with torch.no_grad():
        layer.lora_B["b"].weight.mul_(2)
        layer.base_layer.weight.add_(1)
    count = len(looks)
    out = decode(layer)
    assert len(looks) == count
    assert torch.equal(out, anew(layer))
    assert not torch.equal(out, before)


def test_modes_in_force():
    """Gradients, autocast, dropout, a mode that sees each operator: what they ask for is done."""
    layer = layer_of()
    for _ in range(3):
        before = decode(layer)
    x = torch.randn(len(NAMES), 1, K, generator=torch.Generator().manual_seed(1))
    layer.set_requires_grad(["a", "b", "c"])
    with routed(routing_of(tuple(NAMES))):
        out = layer(x)
        out.sum().backward()
    assert layer.lora_B["c"].weight.grad.abs().sum() > 0
    torch.testing.assert_close(out.detach(), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert decode(layer).dtype == torch.bfloat16
    layer.train()
    torch.manual_seed(0)
    assert not torch.allclose(decode(layer), before, rtol=0.1)
    layer.eval()
    for _ in range(3):
        decode(layer)

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if func is torch.ops.aten.addmm.default:
                outputs.append((out, out.clone()))
            return out

    outputs = []  # of the base
    with Keep():
        assert torch.equal(decode(layer), before)
    base, then = outputs[0]
    assert torch.equal(base, then)


def test_merged_and_disabled_layers():
    layer = layer_of()
    for _ in range(3):
        before = decode(layer)
    layer.enable_adapters(False)
    x = torch.randn(len(NAMES), 1, K, generator=torch.Generator().manual_seed(1))
    assert torch.equal(decode(layer), layer.base_layer(x).detach())
    layer.enable_adapters(True)
    assert torch.equal(decode(layer), before)
    layer.merge(adapter_names=["a"])
    with pytest.raises(ValueError, match="cannot be used while"):
        decode(layer)


def test_refilled_routings_and_other_batches(looks):
    layer = layer_of()
    routing, sizes = Routing.by_row(["a", "b", "c"]), []
    for names in (["a", "b", "c"], ["c", "c", "a"]):
        routing.refill(names)
        for seed in range(4):
            x = torch.randn(3, 1, K, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad(), routed(routing):
                out = layer(x)
            count = len(looks)
            assert torch.equal(out, anew(layer, names=names, seed=seed))
            del looks[count:]
        sizes.append(len(looks))
    assert sizes == [2, 4]
    x = torch.randn(3, 2, K)
    with torch.no_grad(), routed(routing):
        torch.testing.assert_close(layer(x), torch.cat([layer(x[:, i : i + 1]) for i in range(2)], dim=1))
    with pytest.raises(ValueError, match="one name per row"), routed(routing):
        layer(torch.randn(2, 1, K))


def test_hooks_elsewhere(looks, monkeypatch):
    """They are a reason to look for hooks here, twice, and no reason to forget."""
    layer, asked = layer_of(), []
    any_watched = repeated_batch.any_watched
    monkeypatch.setattr(repeated_batch, "any_watched", lambda modules: asked.append(modules) or any_watched(modules))
    for _ in range(6):
        before = decode(layer)
    count, times = len(looks), len(asked)
    assert times == 2
    nn.Linear(1, 1).register_forward_hook(doubled)
    for _ in range(6):
        assert torch.equal(decode(layer), before)
    assert len(looks) == count
    assert len(asked) == times + 2


def test_a_hook_that_is_counted_before_it_is_there():
    layer = layer_of()
    for _ in range(5):
        before = decode(layer)
    hooks = layer.lora_A["b"]._forward_hooks
    handle = layer.lora_A["b"].register_forward_hook(doubled)
    hook = hooks.pop(handle.id)
    assert torch.equal(decode(layer), before)  # between two steps of another thread
    hooks[handle.id] = hook
    assert not torch.equal(decode(layer), before)


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_hook(doubled),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: module.register_full_backward_pre_hook(lambda *_: None),
        lambda module: nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda module: nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
    ],
)
def test_torch_counts_the_hooks_it_registers(register):
    before = hooks_registered()
    register(nn.Linear(1, 1)).remove()
    assert hooks_registered() > before


def test_copies_and_pickles_have_seen_nothing(looks):
    layer = layer_of()
    for _ in range(3):
        before = decode(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        count = len(looks)
        with torch.no_grad():
            other.lora_B["b"].weight.zero_()
        assert not torch.equal(decode(other), before)
        assert len(looks) == count + 1
    assert torch.equal(decode(layer), before)


def test_weighted_rows():
    layer = layer_of()
    rows = [{"a": 0.5}, {"b": 2.0}, "__base__"]
    wanted = decode(layer, ["a", "b", "__base__"])
    base = decode(layer, ["__base__"] * 3)
    routing = Routing.by_row(rows)
    x = torch.randn(3, 1, K, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        with torch.no_grad(), routed(routing):
            out = layer(x)
        torch.testing.assert_close(out - base, (wanted - base) * torch.tensor([0.5, 2.0, 1.0]).view(3, 1, 1))


def test_inputs_wider_than_the_factors(products):
    """Sums in the factors' dtype would round the base."""
    layer = layer_of()
    layer.base_layer.double()
    for _ in range(4):
        assert torch.equal(decode(layer, dtype=torch.float64), anew(layer, dtype=torch.float64))
    assert not products


def test_scalings_that_may_change_in_place():
    layer = layer_of()
    layer.scaling["b"] = torch.tensor(1.0)
    for value in (1.0, 2.0, 5.0, 1.0):
        layer.scaling["b"].fill_(value)
        assert torch.equal(decode(layer), anew(layer))


def test_factors_read_as_another_dtype():
    layer = layer_of()
    for _ in range(3):
        decode(layer)
    weight = layer.lora_A["b"].weight.requires_grad_(False)
    weight.data = weight.data.view(torch.int32)
    with pytest.raises(RuntimeError, match="dtype"):
        decode(layer)


def test_an_input_of_another_dtype():
    """Factors narrower than the output have to be called as modules."""
    layer = layer_of(torch.bfloat16).to(torch.bfloat16)
    for _ in range(3):
        decode(layer, dtype=torch.bfloat16)
    layer.base_layer.weight.data, layer.base_layer.bias.data = torch.randn(N, K), torch.randn(N)
    for _ in range(3):
        assert torch.equal(decode(layer), anew(layer))


@pytest.fixture
def products(monkeypatch):
    """A list that grows whenever batched products are computed."""
    seen, add = [], Products.add_to_
    monkeypatch.setattr(Products, "add_to_", lambda *args: seen.append(args) or add(*args))
    return seen


def test_inputs_that_are_no_ordinary_tensors(products):
    class Other(torch.Tensor):
        pass

    layer, x = layer_of(), torch.randn(len(NAMES), 1, K)
    before = [decode(layer) for _ in range(3)]
    count = len(products)
    assert count >= len(before)
    with torch.no_grad(), routed(routing_of(tuple(NAMES))):
        assert type(layer(x.as_subclass(Other))) is Other
        torch.func.vmap(layer)(x.expand(2, *x.shape))
    assert len(products) == count


def test_who_watches_all_modules(products, monkeypatch):
    layer = layer_of()
    before = [decode(layer) for _ in range(3)]
    count, calls, forward = len(products), [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda module, x: calls.append(module) or forward(module, x))
    torch.testing.assert_close(decode(layer), before[0])
    assert len(calls) == 1 + 2 * 3
    assert len(products) == count


def test_a_backend_that_was_demanded(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer = layer_of()
    for _ in range(3):
        decode(layer)
    with backend("triton"), pytest.raises(RuntimeError, match='backend "triton" needs'):
        decode(layer)
