"""DoRA of this library against reference PEFT's: weights, numbers, merging and files."""

import copy
import warnings

import peft
import pytest
import torch
from models import build
from numerics import assert_as_close_as_torch, assert_no_noisier_than_torch
from pairs import exact_copy, output, output_and_gradients, pair
from safetensors.torch import load_file
from torch import nn

import fastpeft

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES = ["llama", "gpt2"]  # nn.Linear, which is fused; Conv1D, which is not
PATHS = {"llama": {"fused"}, "gpt2": {"plain"}}


def dora_pair(family, dtype=torch.float32, **options):
    """Both libraries' model with DoRA on all linears; magnitudes are not the norms, unless `init_lora_weights`."""
    defaults = {"use_dora": True, "target_modules": "all-linear", "init_lora_weights": False, "lora_alpha": 2}
    both = pair(family, dtype, **(defaults | options))
    if not (defaults | options)["init_lora_weights"]:
        for model in both:
            torch.manual_seed(11)
            for name, parameter in model.named_parameters():
                if "lora_magnitude_vector" in name:
                    parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return both


def assert_equal_states(both):
    theirs, ours = both.state_dicts()
    assert list(ours) == list(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype, key
        assert torch.equal(ours[key], theirs[key]), key
    assert both.trainable()[1] == both.trainable()[0]


@pytest.mark.parametrize("autocast", [True, False], ids=["raised", "as the base"])
@pytest.mark.parametrize("init", [True, "gaussian", False], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_initial_weights(family, dtype, init, autocast):
    both = pair(
        family, dtype, autocast=autocast, use_dora=True, init_lora_weights=init, target_modules="all-linear",
        use_rslora=True, lora_alpha=3, rank_pattern={"q_proj": 3, "c_fc": 5},
    )  # fmt: skip
    assert_equal_states(both)
    assert any("lora_magnitude_vector.default.weight" in key for key in both.ours.state_dict())


def assert_same_numbers(both, family):
    """The worst of the output, and of all gradients, over three batches: at most twice the reference's error."""
    exact_model = exact_copy(both.theirs)
    worst = {"theirs": {}, "ours": {}}
    for seed in range(3):
        theirs, ours = (output_and_gradients(model, family, seed) for model in both)
        exact = output_and_gradients(exact_model, family, seed)
        assert ours.keys() == theirs.keys()
        for side, tensors in (("theirs", theirs), ("ours", ours)):
            for name, tensor in tensors.items():
                assert tensor.dtype == theirs[name].dtype, name
                kind = "output" if name == "output" else "gradients"
                error = ((tensor.double() - exact[name]).abs().max() / exact[name].abs().max()).item()
                worst[side][kind] = max(worst[side].get(kind, 0.0), error)
    for kind, error in worst["ours"].items():
        assert error <= 2 * worst["theirs"][kind] + torch.finfo(theirs["output"].dtype).eps, kind


@pytest.mark.parametrize("autocast", [True, False], ids=["raised", "as the base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_output_and_gradients(family, dtype, autocast):
    both = dora_pair(family, dtype, autocast=autocast)
    assert {layer.path for layer in fastpeft.explain(both.ours)} == PATHS[family]
    assert_same_numbers(both, family)


def test_the_magnitude_alone_is_trained():
    both = dora_pair("llama")
    for model in both:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_magnitude_vector" in name)
    assert_same_numbers(both, "llama")


class Net(nn.Module):
    def __init__(self, dtype, layer):
        super().__init__()
        torch.manual_seed(1)
        self.linear = layer(24, 20).to(dtype)

    def forward(self, x):
        return self.linear(x)


def net_pair(dtype, layer=nn.Linear, **options):
    models = []
    for library in (peft, fastpeft):
        config = library.LoraConfig(target_modules=["linear"], r=4, use_dora=True, init_lora_weights=False, **options)
        net = Net(dtype, layer)
        torch.manual_seed(2)
        models.append(library.get_peft_model(net, config))
    for model in models:
        torch.manual_seed(3)
        magnitude = model.base_model.model.linear.lora_magnitude_vector["default"].weight
        magnitude.data.mul_(torch.rand_like(magnitude) + 0.5)
    return models


class KeepsFirst(nn.Dropout):
    """Drops every third column, always the same ones."""

    def forward(self, x):
        keep = (torch.arange(x.shape[-1]) % 3 != 0).to(x.dtype)
        return x * keep / (1 - self.p) if self.training else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_plain_path_with_dropout(dtype, training):
    """A dropout of somebody else's: the same one in both, so that the numbers can be compared."""
    theirs, ours = (model.train(training) for model in net_pair(dtype, lora_dropout=0.25))
    for model in (theirs, ours):
        model.base_model.model.linear.lora_dropout["default"] = KeepsFirst(0.25).train(training)
    assert {layer.path for layer in fastpeft.explain(ours)} == {"plain"}
    exact_model = copy.deepcopy(theirs).double()
    results = []
    for model in (ours, theirs, exact_model):
        x = torch.randn(7, 24, generator=torch.Generator().manual_seed(5)).to(dtype)
        x = x.to(next(model.parameters()).dtype).requires_grad_()
        out = model(x)
        out.backward(torch.randn(7, 20, generator=torch.Generator().manual_seed(6)).to(out.dtype))
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append({"out": out.detach(), "x": x.grad, **grads})
    for name in results[1]:
        assert_as_close_as_torch(name, *(result[name] for result in results), dtype)


def test_fused_dropout_has_the_reference_s_mean():
    """PEFT's distribution: the base product sees all of x, what DoRA adds to it sees drop(x)."""
    theirs, ours = (model.train() for model in net_pair(torch.float64, lora_dropout=0.4))
    assert {layer.path for layer in fastpeft.explain(ours)} == {"fused"}
    x = torch.randn(1, 24, dtype=torch.float64)
    with torch.no_grad():
        draws = [model(x.expand(60000, 24)) for model in (theirs, ours)]
    spread = draws[0].std(0) * 60000**-0.5
    for draw in draws:
        assert ((draw.mean(0) - theirs.eval()(x)[0]).abs() < 5 * spread).all()
    torch.testing.assert_close(draws[1].std(0), draws[0].std(0), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("second", [True, False], ids=["two DoRA", "DoRA and LoRA"])
def test_same_numbers_with_two_active_adapters(family, dtype, second):
    both = dora_pair(family, dtype)
    both.add_adapter("other", r=3, use_dora=second, target_modules="all-linear", init_lora_weights=False)
    for names in (["default", "other"], ["other", "default"]):
        both.each("base_model.set_adapter", names)
        assert_equal_states(both)
        assert_same_numbers(both, family)


def test_two_active_adapters_with_dropout_outside_training():
    """The second one scales what the first one gave, where in training it scales the base product."""
    both = dora_pair("llama", lora_dropout=0.3)
    both.add_adapter(
        "other", r=3, use_dora=True, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.3
    )
    for model in both:
        torch.manual_seed(12)
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector.other" in name:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    both.each("base_model.set_adapter", ["default", "other"])
    theirs, ours = (output(model.eval(), "llama") for model in both)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_merged_weights(family, dtype, safe):
    both = dora_pair(family, dtype)
    both.add_adapter("other", r=3, use_dora=True, target_modules="all-linear", init_lora_weights=False)
    both.add_adapter("plain", r=3, target_modules="all-linear", init_lora_weights=False)
    exact = exact_copy(both.theirs)

    def compare():
        theirs, ours = both.state_dicts()
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype
            assert_as_close_as_torch(key, value, theirs[key], exact.state_dict()[key])

    for together in (["default", "other", "plain"], ["plain", "default"]):
        both.each("merge_adapter", adapter_names=together, safe_merge=safe)
        exact.merge_adapter(adapter_names=together)
        compare()
        both.each("unmerge_adapter")
        exact.unmerge_adapter()
        compare()
    for one_by_one in ("plain", "default", "other"):  # the norms are those of the unmerged weight all the same
        both.each("merge_adapter", adapter_names=[one_by_one], safe_merge=safe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exact.merge_adapter(adapter_names=[one_by_one])
        compare()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_computes_what_the_adapter_did(family):
    both = dora_pair(family)
    before = output(both.ours.eval(), family)
    theirs, ours = both.each("merge_and_unload")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(output(ours, family), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_delta_weight(family):
    both = dora_pair(family)
    theirs, ours = (
        {name: m.get_delta_weight("default") for name, m in model.named_modules() if hasattr(m, "lora_A") and m.lora_A}
        for model in both
    )
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_equal_and_each_library_loads_the_other(family, dtype, tmp_path):
    both = dora_pair(family, dtype)
    folders = tmp_path / "theirs", tmp_path / "ours"
    for model, folder in zip(both, folders, strict=True):
        model.save_pretrained(folder)
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert right.keys() == left.keys()
    assert all(torch.equal(right[key], left[key]) and right[key].dtype == left[key].dtype for key in left)
    assert any(key.endswith("lora_magnitude_vector") for key in left)
    theirs, ours = (output(model.eval(), family) for model in both)
    assert torch.equal(output(peft.PeftModel.from_pretrained(build(family, dtype), folders[1]), family), theirs)
    assert torch.equal(output(fastpeft.PeftModel.from_pretrained(build(family, dtype), folders[0]), family), ours)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_state_dicts_of_one_adapter_among_several(low_cpu_mem_usage):
    both = dora_pair("llama")
    both.add_adapter("other", target_modules=["q_proj"], r=3, use_dora=True)
    for name in ("default", "other"):
        theirs = peft.get_peft_model_state_dict(both.theirs, adapter_name=name)
        ours = fastpeft.get_peft_model_state_dict(both.ours, adapter_name=name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    state = {key: value + 1 for key, value in theirs.items()}
    result = fastpeft.set_peft_model_state_dict(
        both.ours, state, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert not result.unexpected_keys
    again = fastpeft.get_peft_model_state_dict(both.ours, adapter_name="other")
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointing_changes_nothing(p, reentrant):
    model = dora_pair("llama", lora_dropout=p).ours

    def once():
        torch.manual_seed(4)
        return output_and_gradients(model, "llama")

    plain = once()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = once()
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_compiles_to_one_graph():
    model = dora_pair("llama").ours
    eager_model, exact_model = copy.deepcopy(model), copy.deepcopy(model).double()
    eager, exact = (output_and_gradients(m, "llama") for m in (eager_model, exact_model))
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert_no_noisier_than_torch(output_and_gradients(model, "llama"), eager, exact)


def test_lora_bias_is_refused_as_by_the_reference():
    for library in (peft, fastpeft):
        with pytest.raises(ValueError, match="use_dora"):
            library.LoraConfig(use_dora=True, lora_bias=True)


def test_scaling_through_the_layer():
    """The norm follows the scaling, as PEFT's does."""
    both = dora_pair("llama")
    for model in both:
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 0.3)
    theirs, ours = (output(model.eval(), "llama") for model in both)
    torch.testing.assert_close(ours, theirs)
