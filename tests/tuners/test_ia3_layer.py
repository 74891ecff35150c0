"""One IA3 layer and its tuner: numbers, merging, paths, what is kept, what is refused."""

import copy
import pickle
import warnings

import models
import pytest
import torch
from numerics import assert_as_close_as_torch
from peft import IA3Config as ReferenceConfig
from peft.tuners.ia3 import layer as reference
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft import IA3Config, get_peft_model
from fastpeft.benchmark.memory import saved_bytes
from fastpeft.tuners.ia3 import IA3Layer, Linear

K, N = 37, 23
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASES = {
    "linear": lambda: nn.Linear(K, N),
    "linear, no bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
}
SIDES = [True, False]
side = pytest.mark.parametrize("feedforward", SIDES, ids=["input", "output"])
kinds = pytest.mark.parametrize("kind", BASES)


def ia3(kind, feedforward, dtype=torch.float32, adapter_dtype=torch.float32, seed=0):
    """A layer of ours with one adapter, "default"; its vector is random."""
    torch.manual_seed(seed)
    layer = Linear(BASES[kind]().to(dtype), "default", IA3Config(init_ia3_weights=False), feedforward)
    layer.base_layer.requires_grad_(False)
    layer.ia3_l.to(adapter_dtype)
    return layer


def reference_of(layer, kind):
    """Reference PEFT's layer with the same weights and the same adapters."""
    config = ReferenceConfig(fan_in_fan_out=kind == "conv1d")
    names = list(layer.ia3_l)
    theirs = reference.Linear(copy.deepcopy(layer.base_layer), names[0], config, is_feedforward=layer.is_feedforward)
    for name in names[1:]:
        theirs.update_layer(name, config)
    for own, part in zip(theirs.parameters(), layer.parameters(), strict=True):
        own.data = part.data.clone()
        own.requires_grad = part.requires_grad
    theirs.set_adapter(layer.active_adapters)
    return theirs


def input_of(dtype=torch.float32, shape=(3, 11)):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(layer, x):
    """Output, gradient of the input and of every trainable parameter."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "dx": x.grad, **grads}


def assert_same_numbers(layer, theirs, x):
    ours, eager = run(layer, x), run(theirs, x)
    exact = run(copy.deepcopy(theirs).double(), x.double())
    assert ours.keys() == eager.keys()
    for name in ours:
        assert ours[name].dtype == eager[name].dtype, name
        assert_as_close_as_torch(name, ours[name], eager[name], exact[name])


@side
@pytest.mark.parametrize("adapter_dtype", ["fp32", "as the base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_output_and_gradients(kind, dtype, adapter_dtype, feedforward):
    layer = ia3(kind, feedforward, dtype, dtype if adapter_dtype == "as the base" else torch.float32)
    assert_same_numbers(layer, reference_of(layer, kind), input_of(dtype))


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


def path_of(model):
    return {layer.name.rpartition(".")[2]: (layer.path, layer.why) for layer in fastpeft.explain(model)}


def tiny(**options):
    return get_peft_model(models.tiny_llama(torch.bfloat16), IA3Config(init_ia3_weights=False, **options))


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


# The tuner.


def test_targets_and_sides():
    model = tiny()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, IA3Layer)}
    assert {name.rpartition(".")[2] for name in layers} == {"k_proj", "v_proj", "down_proj"}
    assert all(layer.is_feedforward == name.endswith("down_proj") for name, layer in layers.items())
    assert repr(next(iter(layers.values()))).startswith("ia3.Linear(")
    assert model.get_layer_status()[0].module_type == "ia3.Linear"
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["q"], "feedforward_modules": ["p"]}, ValueError, r"subset of target_modules; \['p'\] are"),
        ({"target_modules": 3}, TypeError, "target_modules must be a list"),
        ({"feedforward_modules": 3}, TypeError, "feedforward_modules must be a list"),
        ({"feedforward_modules": "("}, ValueError, r"feedforward_modules='\(' is no regular expression"),
        ({"target_modules": "("}, ValueError, r"target_modules='\(' is no regular expression"),
        ({"task_type": "no"}, ValueError, "task_type"),
    ],
)
def test_configs_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        IA3Config(**options)


def test_a_config_that_changed_is_checked_again():
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    config.feedforward_modules = {"p_proj"}
    with pytest.raises(ValueError, match="subset"):
        get_peft_model(models.tiny_llama(), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embed_tokens"], "feedforward_modules": []}, "is an Embedding"),
        ({"target_modules": ["no_such"], "feedforward_modules": []}, "matches no layer of LlamaForCausalLM"),
    ],
)
def test_targets_that_are_refused_leave_the_model_alone(options, message):
    model = models.tiny_llama()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, IA3Config(**options))
    assert [name for name, _ in model.named_modules()] == before


def test_families_without_defaults_must_name_both():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no default target_modules"):
        get_peft_model(model, IA3Config())
    with pytest.raises(ValueError, match=r"no default feedforward_modules .* or \[\] for none"):
        get_peft_model(model, IA3Config(target_modules=["0"]))


def test_names_that_scale_nothing_are_told():
    with pytest.warns(RuntimeWarning, match=r"feedforward_modules \['mlp.down_proj'\] match no targeted module"):
        tiny(target_modules=r".*k_proj", feedforward_modules=["mlp.down_proj"])


def test_one_layer_has_one_side():
    model = tiny(target_modules=["k_proj"], feedforward_modules=[])
    before = [name for name, _ in model.named_parameters()]
    other = IA3Config(target_modules=["k_proj"], feedforward_modules=["k_proj"])
    with pytest.raises(ValueError, match=r"scale the input of .*k_proj, whose adapters default scale the output"):
        model.add_adapter("other", other)
    assert [name for name, _ in model.named_parameters()] == before
    model.add_adapter("other", IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.delete_adapter("other")
    model.base_model.peft_config["default"] = other  # alone on its layers, an adapter may change sides
    model.base_model.inject_adapter(model.base_model.model, "default")
    assert {p.shape for name, p in model.named_parameters() if "ia3_l" in name} == {(1, 32)}


def test_other_methods_are_not_mixed_in():
    model, lora = tiny(), fastpeft.LoraConfig(target_modules=["k_proj"])
    with pytest.raises(ValueError, match="one method"):
        model.add_adapter("other", lora)
    with pytest.raises(ValueError, match="adapter of another method"), pytest.warns(UserWarning, match="has adapters"):
        fastpeft.inject_adapter_in_model(lora, model.base_model.model, "other")


def test_add_weighted_adapter_is_not_built_yet():
    with pytest.raises(AttributeError, match="add_weighted_adapter is not supported yet"):
        tiny().base_model.add_weighted_adapter  # noqa: B018


def test_unload_gives_the_base_back_and_merging_what_was_trained():
    base, inputs = models.tiny_llama(torch.bfloat16), models.batch("llama")
    expected = base(**inputs).logits
    model = get_peft_model(base, IA3Config(init_ia3_weights=False))
    assert not torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.unload()(**inputs).logits, expected)
    wrapped = get_peft_model(models.tiny_llama(), IA3Config(init_ia3_weights=False))
    adapted = wrapped(**inputs).logits
    torch.testing.assert_close(wrapped.merge_and_unload()(**inputs).logits, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_beside_another_adapter(low_cpu_mem_usage, tmp_path):
    model, inputs = tiny().eval(), models.batch("llama")
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model(**inputs).logits, expected)
    model.set_adapter("again")
    assert torch.equal(model(**inputs).logits, expected)


def test_reference_peft_recognises_the_tuner():
    import peft

    model = tiny()
    assert isinstance(model.base_model, peft.IA3Model)
    assert any(isinstance(module, reference.IA3Layer) for module in model.modules())


@side
def test_copies_and_pickles_compute_the_same(feedforward):
    layer, x = ia3("linear", feedforward), input_of()
    layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.unmerge()
        assert other.merged_adapters == []
        other.merge()
        torch.testing.assert_close(other(x), layer(x))
