"""One IA3 layer: numbers, merging, paths, what is kept."""

import copy

import pytest
import torch
from ia3_layers import DTYPES, K, N, assert_same_numbers, ia3, input_of, kinds, path_of, reference_of, run, side, tiny
from numerics import assert_as_close_as_torch
from torch import nn

from fastpeft import IA3Config
from fastpeft.benchmark.memory import saved_bytes
from fastpeft.tuners.ia3 import Linear
from fastpeft.tuners.ia3 import layer as layer_module
from fastpeft_kernels import dispatch


@pytest.mark.usefixtures("either_path")
@side
@pytest.mark.parametrize("adapter_dtype", ["fp32", "as the base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_output_and_gradients(kind, dtype, adapter_dtype, feedforward):
    layer = ia3(kind, feedforward, dtype, dtype if adapter_dtype == "as the base" else torch.float32)
    assert_same_numbers(layer, reference_of(layer, kind), input_of(dtype))


@pytest.mark.usefixtures("either_path")
@side
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_two_adapters_multiply(kind, dtype, feedforward):
    layer = ia3(kind, feedforward, dtype)
    layer.update_layer("other", IA3Config(init_ia3_weights=False))
    layer.ia3_l["other"].data = layer.ia3_l["other"].data.float()
    layer.set_adapter(["other", "default"])
    assert_same_numbers(layer, reference_of(layer, kind), input_of(dtype))


@side
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@kinds
def test_autocast(kind, autocast, feedforward):
    layer = ia3(kind, feedforward)
    theirs, x = reference_of(layer, kind), input_of()
    with torch.autocast("cpu", dtype=autocast):
        ours, eager = layer(x), theirs(x)
    assert ours.dtype == eager.dtype
    assert_as_close_as_torch("out", ours, eager, copy.deepcopy(theirs).double()(x.double()))


@side
def test_new_adapters_change_nothing_until_they_are_trained(feedforward):
    layer = Linear(nn.Linear(K, N), "default", IA3Config(), feedforward)
    assert layer.ia3_l["default"].shape == ((1, K) if feedforward else (N, 1))
    torch.testing.assert_close(layer(input_of()), layer.base_layer(input_of()))
    layer.ia3_l["default"].data.fill_(2)
    layer.reset_ia3_parameters("default")
    assert torch.equal(layer.ia3_l["default"], torch.ones_like(layer.ia3_l["default"]))


@side
@kinds
def test_disabled_and_without_active_adapter_is_the_base_bit_by_bit(kind, feedforward):
    layer, x = ia3(kind, feedforward, torch.bfloat16), input_of(torch.bfloat16)
    base = layer.base_layer(x)
    assert not torch.equal(layer(x), base)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    layer.set_adapter("absent")
    assert torch.equal(layer(x), base)


@side
@pytest.mark.parametrize("elements", [33 * K, 33 * K - 1])  # the input's, which are more than the output's
def test_small_inputs_are_left_to_torch(elements, feedforward, monkeypatch):
    ops = []
    for name in ("scale_columns", "scale_linear"):
        op = getattr(layer_module, name)
        monkeypatch.setattr(layer_module, name, lambda *args, name=name, op=op: ops.append(name) or op(*args))
    monkeypatch.setattr(dispatch, "MOST_ELEMENTS", elements)
    ia3("linear", feedforward)(input_of())
    assert ops == (["scale_linear"] if feedforward and elements < 33 * K else [])
    if not feedforward:  # its input is the base's output
        monkeypatch.setattr(dispatch, "MOST_ELEMENTS", 33 * N - 1)
        ia3("linear", feedforward)(input_of())
        assert ops == ["scale_columns"]


@pytest.mark.usefixtures("either_path")
def test_no_rows_and_one_row():
    layer = ia3("linear", True)
    assert layer(torch.empty(0, K)).shape == (0, N)
    with torch.no_grad():
        torch.testing.assert_close(layer(input_of(shape=(1, 1))), reference_of(layer, "linear")(input_of(shape=(1, 1))))


# Merging.


@side
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_merge_is_that_of_the_reference_and_comes_back(kind, dtype, safe_merge, feedforward):
    layer, x = ia3(kind, feedforward, dtype), input_of(dtype)
    theirs, base, before = reference_of(layer, kind), copy.deepcopy(layer.base_layer), layer(x)
    storage = layer.weight.data_ptr()
    for each in (layer, theirs):
        each.merge(safe_merge=safe_merge)
    for own, part in zip(layer.base_layer.parameters(), theirs.base_layer.parameters(), strict=True):
        assert torch.equal(own, part)
    assert layer.merged_adapters == ["default"]
    assert layer.weight.data_ptr() == storage  # tied weights stay tied
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), before, rtol=8 * eps, atol=8 * eps)
    layer.unmerge()
    for own, part in zip(layer.base_layer.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(own, part, rtol=2 * eps, atol=torch.finfo(dtype).smallest_normal)


@side
@kinds
def test_what_a_zero_wipes_out_comes_back(kind, feedforward):
    layer = ia3(kind, feedforward)
    layer.ia3_l["default"].data.flatten()[3] = 0.0
    layer.ia3_l["default"].data.flatten()[5] = -1e-8  # what reference PEFT would divide by zero
    base, vector = copy.deepcopy(layer.base_layer), layer.ia3_l["default"]
    layer.merge()
    along = layer.weight.T if kind == "conv1d" else layer.weight
    assert not (along[:, 3] if feedforward else along[3]).any()
    vector.data.mul_(2)  # what happens to the adapter meanwhile is not the merge's
    layer.unmerge()
    for own, part in zip(layer.base_layer.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(own, part)


def test_two_adapters_merged_one_after_the_other():
    layer = ia3("linear", False)
    layer.update_layer("other", IA3Config(init_ia3_weights=False))
    layer.set_adapter(["default", "other"])
    before, base = layer(input_of()), copy.deepcopy(layer.base_layer)
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="merged already"):
        layer.merge()
    assert layer.merged_adapters == ["default", "other"]
    torch.testing.assert_close(layer(input_of()), before)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, base.weight)
    torch.testing.assert_close(layer.bias, base.bias)
    with pytest.warns(UserWarning, match="nothing to do"):
        layer.unmerge()


@side
def test_safe_merge_leaves_a_broken_adapter_out(feedforward):
    layer = ia3("linear", feedforward)
    layer.ia3_l["default"].data.flatten()[0] = float("nan")
    before = copy.deepcopy(layer.base_layer.state_dict())
    with pytest.raises(ValueError, match="'default' would put NaN"):
        layer.merge(safe_merge=True)
    with pytest.raises(ValueError, match="'default' would put NaN"):
        layer.check_merge(safe_merge=True)
    assert not layer.merged
    assert all(torch.equal(value, before[key]) for key, value in layer.base_layer.state_dict().items())


@side
@kinds
def test_delta_weight_is_what_merging_adds(kind, feedforward):
    layer = ia3(kind, feedforward)
    weight, delta = layer.weight.clone(), layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(weight + delta, layer.weight)
    with pytest.raises(ValueError, match="unmerge them first"):
        layer.get_delta_weight("default")


def test_an_adapter_without_weights_cannot_be_merged():
    layer = ia3("linear", True)
    layer.ia3_l["default"] = nn.Parameter(torch.empty(1, K, device="meta"))
    with pytest.raises(ValueError, match="load them first"):
        layer.merge()


def test_a_merged_adapter_is_not_replaced():
    layer = ia3("linear", True)
    layer.merge()
    with pytest.raises(ValueError, match="unmerge it before"):
        layer.update_layer("default", IA3Config())


# Paths.


def test_explain():
    model = tiny()
    paths = path_of(model)
    assert paths["down_proj"] == ("fused", "")
    assert paths["k_proj"][0] == "added"
    assert "output" in paths["k_proj"][1]
    with torch.no_grad():
        assert path_of(model)["down_proj"] == ("added", "no gradients are recorded")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, out: None)
    assert path_of(model)["down_proj"] == ("added", "a hook is registered on the base layer")
    with model.disable_adapter():
        assert path_of(model)["down_proj"][0] == "base"
    model.merge_adapter()
    assert "merged" in path_of(model)["down_proj"][1]


@pytest.mark.usefixtures("ops_for_few")
@pytest.mark.parametrize("obstacle", ["hook", "trained", "no_grad", "autocast", "dtype", "argument"])
def test_the_base_module_is_called_wherever_something_hangs_on_it(obstacle, monkeypatch):
    layer, x = ia3("linear", True), input_of()
    expected = layer(x)
    calls = []

    def spied(self, *args, **kwargs):
        calls.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr("fastpeft.tuners.ia3.layer.scale_linear", lambda *args: pytest.fail("the op owned the product"))
    real = type(layer.base_layer).__call__
    monkeypatch.setattr(nn.Linear, "__call__", spied)
    if obstacle == "hook":
        layer.base_layer.register_forward_pre_hook(lambda module, args: None)
    elif obstacle == "trained":
        layer.base_layer.weight.requires_grad_(True)
    if obstacle == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
    elif obstacle == "no_grad":
        with torch.no_grad():
            out = layer(x)
    elif obstacle == "dtype":
        with pytest.raises(RuntimeError):  # as nn.Linear says it
            layer(x.double())
        out = expected
    elif obstacle == "argument":
        with pytest.raises(TypeError):
            layer(x, unknown=1)
        out = expected
    else:
        out = layer(x)
    assert calls == [layer.base_layer]
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


def test_a_trained_base_weight_gets_its_gradient():
    layer = ia3("linear", True)
    layer.base_layer.weight.requires_grad_(True)
    assert_same_numbers(layer, reference_of(layer, "linear"), input_of())


def test_functional_transforms_take_plain_torch():
    layer, x = ia3("linear", True), input_of()
    expected = run(layer, x)
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(vector):
        out = torch.func.functional_call(layer, values | {"ia3_l.default": vector}, (x,))
        return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum()

    torch.testing.assert_close(torch.func.grad(loss)(values["ia3_l.default"]), expected["ia3_l.default"])


@pytest.mark.usefixtures("ops_for_few")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@side
def test_kept_for_backward(dtype, feedforward):
    """The input by reference, or the base's output, in the base's dtype: at most half of the reference's copies."""
    layer, x = ia3("linear", feedforward, dtype), input_of(dtype).requires_grad_()
    theirs = reference_of(layer, "linear")
    kept = saved_bytes(lambda: layer(x), inputs=[x], parameters=layer.parameters())
    reference_kept = saved_bytes(lambda: theirs(x), inputs=[x], parameters=theirs.parameters())
    assert kept.own == (0 if feedforward else x.numel() // K * N * x.element_size())
    assert kept.by_reference == (x.nbytes if feedforward else 0)
    total, reference_total = (saved.own + saved.by_reference for saved in (kept, reference_kept))
    assert total <= reference_total / (2 if feedforward and dtype == torch.bfloat16 else 1)
