"""The path of a few rows: what it computes, and that it steps aside for whatever is not its case."""

import copy
from functools import partial

import pytest
import torch
from numerics import assert_as_close_as_torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.helpers import disable_input_dtype_casting
from fastpeft.tuners.lora import LoraConfig, few, fused
from fastpeft.tuners.lora.few import forward_of_few
from fastpeft.tuners.lora.layer import Embedding, Linear
from fastpeft_kernels import dispatch
from fastpeft_kernels.dispatch import FEW_ROWS

K, N = 37, 23


class OtherLinear(nn.Linear):
    """Computes who knows what."""


def lora(base=None, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=5, init_lora_weights=False, **options)
    layer = Linear(base or nn.Linear(K, N), "default", config, r=5, lora_alpha=3)
    layer.base_layer.requires_grad_(False)
    return layer.eval()


def row(dtype=torch.float32, rows=2):
    torch.manual_seed(1)
    return torch.randn(rows, 1, K).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_layer(dtype, bias):
    layer = lora(nn.Linear(K, N, bias=bias).to(dtype), lora_dropout=0.5)
    x = row(dtype)
    for adapter_dtype in (torch.float32, dtype):
        layer.lora_A.to(adapter_dtype)
        layer.lora_B.to(adapter_dtype)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            out = forward_of_few(layer, x)
            assert torch.equal(layer(x), out)
            eager = (layer.base_layer(x) + (x.to(A.dtype) @ A.T @ B.T * 0.6)).to(dtype)
            exact = nn.functional.linear(x.double(), layer.base_layer.weight.double()) + 0.6 * (
                x.double() @ A.double().T @ B.double().T
            )
            exact = exact if not bias else exact + layer.base_layer.bias.double()
        assert_as_close_as_torch("out", out, eager, exact)


def by_modules(layer, x):
    """PEFT's forward, and so its draws of dropout."""
    A, B, dropout = (modules["default"] for modules in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    out = layer.base_layer(x)
    return (out + B(A(dropout(x.to(A.weight.dtype)))) * layer.scaling["default"]).to(out.dtype)


def output_and_gradients(forward, layer, x):
    """By name; of everything that is trained, and of x."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    out = forward(x)
    layer.zero_grad()
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad} | gradients


def assert_gradients_of_modules(forward, layer, x):
    exact_layer = copy.deepcopy(layer).double()
    ours = output_and_gradients(forward, layer, x)
    eager = output_and_gradients(partial(by_modules, layer), layer, x)
    exact = output_and_gradients(partial(by_modules, exact_layer), exact_layer, x.double())
    assert ours.keys() == eager.keys() == exact.keys()
    for name in eager:
        assert ours[name].dtype == eager[name].dtype
        assert_as_close_as_torch(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_its_gradients(dtype, bias, dropout, training):
    layer = lora(nn.Linear(K, N, bias=bias).to(dtype), lora_dropout=dropout).train(training)
    layer.base_layer.requires_grad_(bias)
    for adapter_dtype in (torch.float32, dtype):
        layer.lora_A.to(adapter_dtype)
        layer.lora_B.to(adapter_dtype)
        assert_gradients_of_modules(partial(forward_of_few, layer), layer, row(dtype))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_where_the_base_is_called(dtype, dropout, monkeypatch):
    layer = lora(nn.Linear(K, N).to(dtype), lora_dropout=dropout).train()
    called = []
    layer.base_layer.register_forward_hook(lambda *_: called.append(True))
    monkeypatch.setattr(fused, "lora_add", lambda *_: pytest.fail("the op"))
    layer(row(dtype))
    assert called == [True]
    assert_gradients_of_modules(layer, layer, row(dtype))


@pytest.mark.parametrize("training", [(True, True), (True, False), (False, True)], ids=str)
def test_a_reentrant_checkpoint_draws_the_same_again(training):
    """It runs the layer without gradients first."""
    layer = lora(lora_dropout=0.5)
    layer.train(training[0])
    layer.lora_dropout.train(training[1])
    expected = output_and_gradients(layer, layer, row())
    found = output_and_gradients(lambda x: checkpoint(layer, x, use_reentrant=True), layer, row())
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


def test_its_output_is_nobodys_view():
    out = lora(nn.Linear(K, N))(row())
    out.detach_()
    assert not lora(nn.Linear(K, N))(row())._is_view()


@pytest.mark.parametrize("recorded", [True, False])
def test_a_single_id_of_an_embedding(recorded):
    layer = Embedding(nn.Embedding(K, N), "default", LoraConfig(r=5), r=5, lora_alpha=3)
    with torch.set_grad_enabled(recorded):
        assert torch.equal(layer(torch.tensor(3)), layer(torch.tensor([3]))[0])


def test_no_columns():
    layer = Linear(nn.Linear(0, N), "default", LoraConfig(r=5), r=5, lora_alpha=3)
    assert torch.equal(layer(torch.randn(3, 0)), layer.base_layer.bias.expand(3, N))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
def test_larger_inputs_are_left_to_the_op(recorded, training, monkeypatch):
    def is_taken(rows, columns=N, elements=10 * K, most_rows=100):
        monkeypatch.setattr(dispatch, "MOST_ELEMENTS", elements)
        monkeypatch.setattr(dispatch, "MOST_ROWS", most_rows)
        layer = lora(nn.Linear(K, columns)).train(training)
        with torch.set_grad_enabled(recorded):
            return forward_of_few(layer, row(rows=rows)) is not None

    if recorded or training:
        assert is_taken(10)
        assert not is_taken(11)
        assert not is_taken(10, columns=K + 1)
        assert is_taken(9, columns=K + 1)
        assert not is_taken(10, most_rows=9)
    else:  # decoding
        assert is_taken(FEW_ROWS, columns=K + 1)
        assert not is_taken(FEW_ROWS + 1, elements=100 * K)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, 4 * N), nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize(("elements", "are_few"), [(20 * 4 * N, True), (20 * 4 * N - 1, False)])
def test_layers_that_share_an_input_go_one_way(elements, are_few, monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_ELEMENTS", elements)
    layers, alone = [], []
    group_op, add = fused.lora_group, few.lora_add_of_few
    monkeypatch.setattr(few, "lora_add_of_few", lambda *args: alone.append(1) or add(*args))
    monkeypatch.setattr(fused, "lora_group", lambda x, members: layers.extend(members) or group_op(x, members))
    monkeypatch.setattr(fused, "lora_linear", lambda *_: pytest.fail("a layer for itself"))
    model = fastpeft.get_peft_model(Attention(), LoraConfig(r=2, target_modules=["q", "k", "v"])).train()
    assert model.base_model.model.q.input_group is not None
    model(torch.randn(20, K))
    assert (len(alone), len(layers)) == ((3, 0) if are_few else (0, 3))


def hook_on(find):
    def disturb(layer):
        find(layer).register_forward_hook(lambda *_: None)

    return disturb


def replaced(layer):
    layer.base_layer.forward = nn.Linear(K, N).forward


def with_another_adapter(layer):
    layer.update_layer("other", 2, lora_alpha=1, config=LoraConfig(r=2))
    layer.set_adapter(["default", "other"])


def without_an_adapter(layer):
    layer.set_adapter([])


DISTURBANCES = {
    "hook on the base": hook_on(lambda layer: layer.base_layer),
    "hook on lora_A": hook_on(lambda layer: layer.lora_A["default"]),
    "hook on lora_B": hook_on(lambda layer: layer.lora_B["default"]),
    "hook on the dropout": hook_on(lambda layer: layer.lora_dropout["default"]),
    "pre-hook": lambda layer: layer.base_layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.lora_A["default"].register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda layer: layer.lora_A["default"].register_full_backward_pre_hook(lambda *_: None),
    "replaced forward": replaced,
    "two adapters": with_another_adapter,
    "no adapter": without_an_adapter,
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "dtypes differ": lambda layer: layer.lora_B.to(torch.float64),
    "adapter in float64": lambda layer: (layer.lora_A.double(), layer.lora_B.double()),
    "another input dtype": lambda layer: layer.base_layer.double(),
    "a bias": lambda layer: setattr(layer.lora_A["default"], "bias", nn.Parameter(torch.randn(5))),
    "parametrised": lambda layer: nn.utils.parametrizations.weight_norm(layer.lora_A["default"]),
    "no Parameter": lambda layer: (
        layer.lora_A["default"].__dict__["_parameters"].update(weight=torch.randn(5, K))
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_it_steps_aside(kind):
    layer = lora(lora_dropout=0.5)
    DISTURBANCES[kind](layer)
    with torch.no_grad():
        assert forward_of_few(layer, row()) is None


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=repr)
def test_it_is_for_plain_lora(options):
    with torch.no_grad():
        assert forward_of_few(lora(**options), row()) is None


def test_it_is_for_linear_layers():
    embedding = Embedding(nn.Embedding(K, N), "default", LoraConfig(r=5), r=5, lora_alpha=3).eval()
    with torch.no_grad():
        assert forward_of_few(lora(OtherLinear(K, N)), row()) is None
        assert forward_of_few(embedding, torch.zeros(2, 1, dtype=torch.int64)) is None


def test_it_looks_at_what_is_around():
    layer = lora()
    with torch.no_grad():
        assert forward_of_few(layer, row()) is not None
        assert forward_of_few(layer, nn.Parameter(row())) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert forward_of_few(layer, row()) is None
        with disable_input_dtype_casting(layer):
            assert forward_of_few(layer, row()) is None
        handle = register_module_forward_hook(lambda *_: None)
        assert forward_of_few(layer, row()) is None
        handle.remove()
        with fastpeft.backend("torch"):
            assert forward_of_few(layer, row()) is not None
        torch.func.vmap(lambda x: (forward_of_few(layer, x) is None or pytest.fail("transformed"), x)[1])(row())
