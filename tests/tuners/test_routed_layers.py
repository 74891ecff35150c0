"""Layers in a batch of mixed adapters: each row as by its own adapter alone, whatever kind of adapter that is."""

import copy

import pytest
import torch
from numerics import assert_as_close_as_torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.routing import Routing
from fastpeft.routing_scope import routed
from fastpeft.tuners.ia3 import IA3Config
from fastpeft.tuners.ia3.layer import Linear as IA3Linear
from fastpeft.tuners.lora import LoraConfig
from fastpeft.tuners.lora.fused import adapter_parts, plain_factors
from fastpeft.tuners.lora.layer import Embedding, Linear
from fastpeft.utils.auxiliary import ModulesToSaveWrapper
from fastpeft_kernels.dropout import dropout_scale

K, N = 37, 23
NAMES = ["b", "__base__", "d", "elsewhere", "b", "a", "c", "__base__", "d"]
DTYPES = [torch.float32, torch.bfloat16]


def batch(dtype=torch.float32, rows=9, tokens=5):
    torch.manual_seed(3)
    return torch.randn(rows, tokens, K).to(dtype)


def lora_of(base, dtype=torch.float32, embedding=False, dora=("d",), **options):
    """Adapters a to d of four ranks; b is rank-stabilised, d is DoRA."""
    torch.manual_seed(0)
    layer = None
    for name, r in zip("abcd", (1, 3, 16, 17), strict=True):
        own = {"use_rslora": name == "b", "use_dora": name in dora and not embedding} | options
        config = LoraConfig(r=r, lora_alpha=r + 2, init_lora_weights=False, **own)
        if layer is None:
            layer = (Embedding if embedding else Linear)(base.to(dtype), name, config, r=r, lora_alpha=r + 2)
        else:
            layer.update_layer(name, r, lora_alpha=r + 2, config=config)
    for _, part in layer._parts():
        for p in part.parameters() if isinstance(part, nn.Module) else [part]:
            p.data = torch.randn(p.shape) * 0.2 + (1.0 if p.ndim == 1 else 0.0)
    layer.base_layer.requires_grad_(False)
    return layer.eval()


def ia3_of(feedforward, dtype=torch.float32):
    torch.manual_seed(0)
    layer = IA3Linear(nn.Linear(K, N).to(dtype), "a", IA3Config(init_ia3_weights=False), feedforward)
    for name in "bcd":
        layer.update_layer(name, IA3Config(init_ia3_weights=False), feedforward)
    for _, part in layer._parts():
        part.data = part.data.float()
    layer.base_layer.requires_grad_(False)
    return layer.eval()


MAKERS = {
    "linear": lambda dtype: lora_of(nn.Linear(K, N), dtype),
    "linear without bias": lambda dtype: lora_of(nn.Linear(K, N, bias=False), dtype),
    "linear, all DoRA": lambda dtype: lora_of(nn.Linear(K, N), dtype, dora="abcd"),
    "conv1d": lambda dtype: lora_of(Conv1D(N, K), dtype),
    "lora_bias": lambda dtype: lora_of(nn.Linear(K, N), dtype, dora=(), lora_bias=True),
    "ia3, output": lambda dtype: ia3_of(False, dtype),
    "ia3, input": lambda dtype: ia3_of(True, dtype),
}


def alone(layer, name, x):
    """What the layer gives for the whole batch with one adapter, or with none."""
    if name in layer._get_available_adapters():
        layer.set_adapter(name)
        return layer(x)
    return layer.base_layer(x)


def exactly(layer, name, x):
    return alone(copy.deepcopy(layer).double(), name, x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_each_row_as_by_its_adapter_alone(kind, dtype):
    layer, x = MAKERS[kind](dtype), batch(dtype)
    for recording in (True, False):
        with torch.set_grad_enabled(recording), routed(Routing.by_row(NAMES)):
            out = layer(x)
        for row, name in enumerate(NAMES):
            expected, exact = alone(layer, name, x)[row], exactly(layer, name, x)[row]
            if name in "abcd":
                assert_as_close_as_torch(f"{name} in row {row}", out[row], expected, exact)
            else:
                assert torch.equal(out[row], expected)


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_rows_of_ids(padding, max_norm):
    layer = lora_of(nn.Embedding(K, N, padding_idx=padding, max_norm=max_norm), embedding=True)
    ids = torch.randint(0, K, (len(NAMES), 5))
    layer(ids)  # with max_norm, the base scales its rows when they are first read
    expected = {name: alone(layer, name, ids) for name in set(NAMES)}
    for recording in (True, False):
        with torch.set_grad_enabled(recording), routed(Routing.by_row(NAMES)):
            out = layer(ids)
        for row, name in enumerate(NAMES):
            torch.testing.assert_close(out[row], expected[name][row])
    layer.set_requires_grad(list("abcd"))
    layer.zero_grad()
    with routed(Routing.by_row(NAMES)):
        layer(ids).square().sum().backward()
    together = {name: A.grad.clone() for name, A in layer.lora_embedding_A.items()}
    for name in "abcd":
        rows = [row for row, other in enumerate(NAMES) if other == name]
        layer.set_adapter(name)
        layer.zero_grad()
        layer(ids[rows]).square().sum().backward()
        torch.testing.assert_close(together[name], layer.lora_embedding_A[name].grad)


def test_embeddings_that_scale_their_output():
    layer = lora_of(nn.Embedding(K, N), embedding=True)
    layer.base_layer.embed_scale = 3.0
    ids = torch.randint(0, K, (2, 5))
    with routed(Routing.by_row(["b", "a"])):
        out = layer(ids)
    for row, name in enumerate("ba"):
        torch.testing.assert_close(out[row], alone(layer, name, ids)[row])


@pytest.mark.parametrize("kind", MAKERS)
def test_weighted_adapters_add_what_each_adds_alone(kind):
    layer, x = MAKERS[kind](torch.float32), batch(rows=4)
    rows = [{"a": 0.5, "d": -1.5}, "b", {"c": 2.0, "elsewhere": 1.0}, {"a": 0.25, "b": 0.25, "c": 0.5}]
    with torch.no_grad(), routed(Routing.by_row(rows)):
        out = layer(x)
    with torch.no_grad():
        base = layer.base_layer(x)
        if kind == "ia3, input":  # the input is what is scaled, and the sum is one of inputs
            factor = lambda name: layer.ia3_l[name].flatten() - 1  # noqa: E731
            own = [{row: 1.0} if isinstance(row, str) else row for row in rows]
            scaled = [1 + sum(w * factor(name) for name, w in row.items() if name in "abcd") for row in own]
            expected = layer.base_layer(x * torch.stack(scaled).unsqueeze(1))
        else:
            expected = base.clone()
            for i, row in enumerate(rows):
                for name, weight in ({row: 1.0} if isinstance(row, str) else row).items():
                    expected[i] += weight * (alone(layer, name, x) - base)[i]
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "lora_bias"])
def test_gradients_are_those_of_each_adapter_alone(kind):
    layer, x = MAKERS[kind](torch.float32), batch().requires_grad_()
    layer.set_requires_grad(list("abcd"))
    target = torch.randn(len(NAMES), 5, N)
    with routed(Routing.by_row(NAMES)):
        (layer(x) * target).sum().backward()
    together, dx = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None}, x.grad
    seen = set()
    for name in sorted(set(NAMES)):
        rows = [row for row, other in enumerate(NAMES) if other == name]
        x.grad, layer_of_one = None, copy.deepcopy(layer)
        layer_of_one.zero_grad()
        (alone(layer_of_one, name, x)[rows] * target[rows]).sum().backward()
        torch.testing.assert_close(dx[rows], x.grad[rows])
        for key, p in layer_of_one.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(together[key], p.grad, msg=key)
                seen.add(key)
    assert seen == together.keys()


@pytest.mark.parametrize("ps", [(0.4, 0.4, 0.4, 0.4), (0.0, 0.4, 0.8, 0.4)], ids=str)
def test_dropout_of_each_row_is_that_of_its_adapter(ps):
    """With A = [1 0], B = [1 0]ᵀ the output says what of x was kept."""
    torch.manual_seed(0)
    layer = Linear(nn.Linear(1, 1, bias=False), "a", LoraConfig(r=1, lora_dropout=ps[0]), r=1, lora_alpha=1)
    for name, p in zip("bcd", ps[1:], strict=True):
        layer.update_layer(name, 1, lora_alpha=1, config=LoraConfig(r=1, lora_dropout=p))
    for name in "abcd":
        layer.lora_A[name].weight.data.fill_(1.0)
        layer.lora_B[name].weight.data.fill_(1.0)
    layer.base_layer.weight.data.zero_()
    names = ["d", "__base__", "a", "c", "b", {"b": 1.0, "c": 1.0}]
    with routed(Routing.by_row(names)):
        out = layer.train()(torch.ones(len(names), 20_000, 1)).squeeze(2)
    for row, name in zip(out, names, strict=True):
        if isinstance(name, dict):
            values = {round(float(v), 3) for v in row.unique()}
            kept = [dropout_scale(ps[1]), dropout_scale(ps[2])]
            assert values == {0.0, *(round(v, 3) for v in (*kept, sum(kept)))}  # independent of each other
        elif name == "__base__":
            assert not row.any()
        else:
            p = ps["abcd".index(name)]
            assert abs(float((row == 0).float().mean()) - p) < 0.02
            torch.testing.assert_close(row.max(), torch.tensor(dropout_scale(p)))


def test_adapters_that_somebody_watches_run_as_modules():
    layer, x = lora_of(nn.Linear(K, N), dora=()), batch()
    expected = {name: alone(layer, name, x) for name in set(NAMES)}
    calls = []
    layer.lora_A["b"].register_forward_hook(lambda *_: calls.append("b"))
    with torch.no_grad(), routed(Routing.by_row(NAMES)):
        out = layer(x)
    assert calls == ["b"]
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(out[row], expected[name][row])


def test_adapters_of_two_dtypes():
    layer, x = lora_of(nn.Linear(K, N), torch.bfloat16, dora=()), batch(torch.bfloat16)
    for part in (layer.lora_A["b"], layer.lora_B["b"]):
        part.to(torch.bfloat16)
    with torch.no_grad(), routed(Routing.by_row(NAMES)):
        out = layer(x)
    for row, name in enumerate(NAMES):
        assert_as_close_as_torch(name, out[row], alone(layer, name, x)[row], exactly(layer, name, x)[row])


@pytest.mark.parametrize("kind", ["linear", "ia3, output", "ia3, input"])
def test_functional_transforms_and_forward_mode(kind):
    layer, x = MAKERS[kind](torch.float32), batch()
    with routed(Routing.by_row(NAMES)):
        value, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        expected = layer(x)
        step = 1e-2
        slope = (layer(x + step) - layer(x - step)) / (2 * step)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(tangent, slope, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", MAKERS)
def test_empty_batches_and_batches_of_base_rows(kind):
    layer = MAKERS[kind](torch.float32)
    with routed(Routing.by_row([])):
        assert layer(batch(rows=0)).shape == (0, 5, N)
    x = batch(rows=2)
    with routed(Routing.by_row(["__base__", None])):
        assert torch.equal(layer(x), layer.base_layer(x))
    with routed(Routing.by_row(["a"])), pytest.raises(ValueError, match="expected 2 names, got 1"):
        layer(x)


def test_merged_and_disabled_layers():
    for layer in (MAKERS["linear"](torch.float32), MAKERS["ia3, output"](torch.float32)):
        x = batch()
        base = layer.base_layer(x)
        layer.enable_adapters(False)
        with routed(Routing.by_row(NAMES)):
            assert torch.equal(layer(x), base)
        layer.enable_adapters(True)
        layer.merge(adapter_names=["a"])
        with routed(Routing.by_row(NAMES)), pytest.raises(ValueError, match=r"while \['a'\] are merged"):
            layer(x)


def test_packed_tokens():
    layer, x = MAKERS["linear"](torch.float32), batch(rows=1, tokens=9)
    routing = Routing.by_token(["b", "__base__", "d"], [4, 2, 3])
    with torch.no_grad(), routed(routing):
        out = layer(x)
    for name, tokens in (("b", slice(0, 4)), ("__base__", slice(4, 6)), ("d", slice(6, 9))):
        torch.testing.assert_close(out[:, tokens], alone(layer, name, x)[:, tokens])


def test_whole_modules_add_by_weight():
    wrapper = ModulesToSaveWrapper(nn.Linear(K, N), "a")
    wrapper.update("b")
    for name in "ab":
        wrapper.modules_to_save[name].weight.data.normal_()
    x = batch(rows=3)
    base, a, b = wrapper.original_module(x), *(wrapper.modules_to_save[name](x) for name in "ab")
    for one, other in ((0.5, 2.0), (1.0, 1.0)):
        with routed(Routing.by_row([{"a": one, "b": other}, "b", "__base__"])):
            out = wrapper(input=x)
        torch.testing.assert_close(out[0], (base + one * (a - base) + other * (b - base))[0])
        torch.testing.assert_close(out[1], b[1])
        assert torch.equal(out[2], base[2])


def test_whole_modules_of_another_dtype_and_kind():
    wrapper = ModulesToSaveWrapper(nn.Linear(K, N).bfloat16(), "a")
    wrapper.modules_to_save["a"].float()
    x = batch(rows=2)
    with routed(Routing.by_row(["__base__", None])):
        assert torch.equal(wrapper(x.bfloat16()), wrapper.original_module(x.bfloat16()))
    whole = ModulesToSaveWrapper(nn.Sequential(nn.Linear(K, N)), "a")
    with routed(Routing.by_row(["__base__", "elsewhere"])):
        assert torch.equal(whole(x), whole.original_module(x))  # nobody's rows have to be told apart
    embedding = ModulesToSaveWrapper(nn.Embedding(K, N).bfloat16(), "a")
    embedding.modules_to_save["a"].float()
    with routed(Routing.by_row(["a", "__base__"])):
        out = embedding(torch.zeros(2, 3, dtype=torch.int64))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[0], embedding.modules_to_save["a"].weight[[0, 0, 0]].bfloat16())


def test_dora_beside_adapters_of_another_dtype():
    layer, x = lora_of(nn.Linear(K, N), torch.bfloat16), batch(torch.bfloat16)
    for name in "ac":
        layer.lora_A[name].to(torch.bfloat16)
        layer.lora_B[name].to(torch.bfloat16)
    rows = [{"a": 1.0, "d": 1.0}, "d", "a", {"b": 1.0, "c": 1.0, "d": 1.0}, *["__base__"] * 5]
    with torch.no_grad(), routed(Routing.by_row(rows)):
        out = layer(x)
    base = layer.base_layer(x).double()
    for i, row in enumerate(rows[:4]):
        names = [row] if isinstance(row, str) else list(row)
        exact = base[i] + sum(exactly(layer, name, x)[i] - exactly_base(layer, x)[i] for name in names)
        eager = (base[i] + sum(alone(layer, name, x)[i].double() - base[i] for name in names)).bfloat16()
        assert_as_close_as_torch(str(row), out[i], eager, exact.detach())


def exactly_base(layer, x):
    return copy.deepcopy(layer.base_layer).double()(x.double())


def test_dora_with_a_trained_bias():
    layer, x = lora_of(nn.Linear(K, N)), batch()
    layer.base_layer.bias.requires_grad_()
    target = torch.randn(len(NAMES), 5, N)
    with routed(Routing.by_row(NAMES)):
        (layer(x) * target).sum().backward()
    together, layer.base_layer.bias.grad = layer.base_layer.bias.grad, None
    for row, name in enumerate(NAMES):
        (alone(layer, name, x)[row] * target[row]).sum().backward()
    torch.testing.assert_close(together, layer.base_layer.bias.grad)


def test_a_wide_output_is_not_rounded_to_narrow_factors():
    layer = lora_of(nn.Embedding(K, N), embedding=True)
    for part in (layer.lora_embedding_A, layer.lora_embedding_B):
        for name in part:
            part[name].data = part[name].data.bfloat16() * 0
    ids = torch.arange(4).unsqueeze(1)
    with torch.no_grad(), routed(Routing.by_row(["a", "b", "__base__", "c"])):
        assert torch.equal(layer(ids), layer.base_layer(ids))


def test_ia3_vectors_of_two_dtypes():
    layer, x = ia3_of(False), batch()
    layer.ia3_l["b"].data = layer.ia3_l["b"].data.bfloat16()
    with torch.no_grad(), routed(Routing.by_row(NAMES)):
        out = layer(x)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(out[row], alone(layer, name, x)[row])


def test_shapes_alone():
    """On the meta device, where nothing is computed."""
    for layer in (MAKERS["linear"](torch.float32), ia3_of(False)):
        layer, x = layer.to("meta"), batch().to("meta")
        layer.set_adapter("b")
        with torch.no_grad():
            assert layer(x).shape == (len(NAMES), 5, N)
            with routed(Routing.by_row(NAMES)):
                assert layer(x).shape == (len(NAMES), 5, N)


def test_a_single_row_without_a_batch():
    layer, x = MAKERS["linear"](torch.float32), batch()[0, 0]
    with torch.no_grad(), routed(Routing.by_row(["b"])):
        torch.testing.assert_close(layer(x), alone(layer, "b", x))


def test_who_has_no_rows_gets_zeros_where_gradients_are_recorded():
    layer = lora_of(nn.Linear(K, N), dora=(), lora_bias=True)
    layer.set_requires_grad(list("abcd"))
    with routed(Routing.by_row(["a", "a"], names="abcd")):
        layer(batch(rows=2)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    assert not layer.lora_B["b"].weight.grad.any()
    assert layer.lora_B["a"].weight.grad.any()


DISTURBANCES = {
    "hook on lora_A": lambda layer: layer.lora_A["b"].register_forward_hook(lambda *_: None),
    "hook on lora_B": lambda layer: layer.lora_B["b"].register_forward_pre_hook(lambda *_: None),
    "hook on the dropout": lambda layer: layer.lora_dropout["b"].register_forward_hook(lambda *_: None),
    "replaced forward": lambda layer: setattr(layer.lora_A["b"], "forward", nn.Linear(K, 3).forward),
    "another Linear": lambda layer: setattr(layer.lora_A["b"], "__class__", type("Other", (nn.Linear,), {})),
    "another dropout": lambda layer: layer.lora_dropout.update({"b": nn.AlphaDropout(0.1)}),
    "bias": lambda layer: layer.lora_B["b"].register_parameter("bias", nn.Parameter(torch.zeros(N))),
    "bias of lora_A": lambda layer: layer.lora_A["b"].register_parameter("bias", nn.Parameter(torch.zeros(3))),
    "no Parameter": lambda layer: layer.lora_A["b"]._parameters.update(weight=torch.randn(3, K)),
    "meta": lambda layer: layer.lora_A["b"].to("meta"),
    "dtypes differ": lambda layer: layer.lora_B["b"].double(),
    "casting off": lambda layer: setattr(layer, "cast_input_dtype_enabled", False),
}


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_many_adapters_are_judged_as_one_by_one(kind):
    layer = lora_of(nn.Linear(K, N), dora=())
    plain = plain_factors(layer, "abcd")
    for name, *parts in zip("abcd", *plain, strict=True):
        assert all(ours is theirs for ours, theirs in zip(parts[:2], adapter_parts(layer, name)[:2], strict=True))
    DISTURBANCES[kind](layer)
    assert isinstance(adapter_parts(layer, "b"), str)
    assert plain_factors(layer, "abcd") is None


def test_many_adapters_with_one_that_is_no_sum():
    layer = lora_of(nn.Linear(K, N))
    assert plain_factors(layer, "abcd") is None
    assert plain_factors(layer, "abc") is not None
