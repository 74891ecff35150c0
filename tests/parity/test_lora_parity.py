"""LoRA of this library against reference PEFT's: the same seed gives the same weights, outputs and gradients."""

import models
import pytest
import torch
from numerics import assert_as_close_as_torch
from pairs import exact_copy, output, output_and_gradients, pair

FAMILIES = list(models.BUILDERS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Options of LoraConfig that every family is tried with. "targets" that are not the family's own are made to fit below.
OPTIONS = {
    "default": {},
    "no reset": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "all-linear": {"target_modules": "all-linear"},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "adapter bias": {"lora_bias": True},
    "family's defaults": {"target_modules": None},
}

LLAMA_OPTIONS = {
    "rank and alpha patterns": {
        "rank_pattern": {"q_proj": 3, r".*\.1\.self_attn.v_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "^model.layers.1.mlp.down_proj": 2},
    },
    "expression": {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    "one layer": {"layers_to_transform": 1},
    "layers by pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "full path": {"target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"], "layers_to_transform": [0]},
    "exclude names": {"exclude_modules": ["layers.0.self_attn.q_proj", "down_proj"]},
    "exclude expression": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "embedding, gaussian": {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": "gaussian"},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "modules to save by suffix": {"target_modules": "all-linear", "modules_to_save": ["head", "embed_tokens"]},
    "twenty targets and more": {
        "target_modules": [
            f"model.layers.{i}.{name}"
            for i in range(3)
            for name in (
                *(f"self_attn.{x}_proj" for x in "qkvo"),
                *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
            )
        ]
    },
}

CASES = [(family, name) for family in FAMILIES for name in OPTIONS] + [("llama", name) for name in LLAMA_OPTIONS]
for unsupported in ("bert_tagger", "bert_qa"):  # the reference cannot: it takes the head, which it also trains whole
    CASES.remove((unsupported, "all-linear"))


def options_of(name):
    return {**OPTIONS, **LLAMA_OPTIONS}[name]


def assert_equal_states(both):
    theirs, ours = both.state_dicts()
    assert list(ours) == list(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype, key
        assert torch.equal(ours[key], theirs[key]), key
    assert both.trainable()[1] == both.trainable()[0]


@pytest.mark.parametrize(("family", "name"), CASES, ids=str)
def test_same_initial_weights(family, name):
    both = pair(family, **options_of(name))
    assert_equal_states(both)
    theirs, ours = (model.peft_config["default"] for model in both)
    assert ours.target_modules == theirs.target_modules
    assert ours.fan_in_fan_out == theirs.fan_in_fan_out
    assert sorted(both.ours.base_model.targeted_module_names) == sorted(both.theirs.base_model.targeted_module_names)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["raised", "as the base"])
def test_same_initial_weights_in_16_bits(dtype, autocast):
    """PEFT rounds the initial weights to the base's dtype and then raises them: both have to happen."""
    for family, targets in (("llama", ["embed_tokens", "q_proj"]), ("gpt2", "all-linear")):
        assert_equal_states(
            pair(family, dtype, autocast=autocast, target_modules=targets, modules_to_save=["ln_f", "norm"])
        )


def compare_numbers(both, family):
    """The output and all gradients, of three batches, against fp64.

    Rounding anywhere in a model reaches every gradient, and the largest of a few errors is a matter of luck: so the
    bar is twice the reference's worst relative error. Single layers have a bar for each tensor of their own.
    """
    exact_model = exact_copy(both.theirs)
    errors = {"theirs": {}, "ours": {}}
    for seed in range(3):
        theirs, ours = (output_and_gradients(model, family, seed) for model in both)
        exact = output_and_gradients(exact_model, family, seed)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype, name
            assert torch.isfinite(ours[name]).all(), name
            for side, tensors in (("theirs", theirs), ("ours", ours)):
                off = (tensors[name].double() - exact[name]).abs().max() / exact[name].abs().max()
                errors[side][name] = max(errors[side].get(name, 0), off.item())
    for names in ({"output"}, errors["ours"].keys() - {"output"}):
        bar = 2 * max(errors["theirs"][name] for name in names)
        for name in names:
            allowed = bar + torch.finfo(ours[name].dtype).eps
            assert errors["ours"][name] <= allowed, f"{name}: off by {errors['ours'][name]:.2e} of its largest entry"


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_output_and_gradients(family, dtype):
    compare_numbers(pair(family, dtype, init_lora_weights=False, lora_alpha=2, bias="lora_only"), family)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rank and alpha patterns", "embedding", "modules to save"])
def test_same_output_and_gradients_of_options(name, dtype):
    both = pair("llama", dtype, **{"init_lora_weights": False, "lora_alpha": 2, "use_rslora": True, **options_of(name)})
    compare_numbers(both, "llama")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_output_and_gradients_with_adapter_bias(dtype):
    both = pair(
        "gpt2", dtype, init_lora_weights=False, lora_alpha=2, lora_bias=True, bias="all", target_modules="all-linear"
    )
    compare_numbers(both, "gpt2")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_same_numbers_with_two_active_adapters(family, dtype):
    both = pair(family, dtype, init_lora_weights=False, lora_alpha=2)
    both.add_adapter("other", r=3, lora_alpha=1, target_modules="all-linear", init_lora_weights=False, use_rslora=True)
    assert_equal_states(both)
    both.each("base_model.set_adapter", ["default", "other"])
    assert_equal_states(both)
    compare_numbers(both, family)


@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_classifier"])
def test_same_merged_weights(family, dtype, safe):
    options = {"init_lora_weights": False, "lora_bias": family != "llama"}
    if family == "llama":
        options["target_modules"] = ["embed_tokens", "q_proj", "lm_head"]
    both = pair(family, dtype, **options)
    exact = exact_copy(both.theirs)
    exact.merge_adapter()
    both.each("merge_adapter", safe_merge=safe)
    for (key, ours), theirs in zip(both.ours.state_dict().items(), both.theirs.state_dict().values(), strict=True):
        assert_as_close_as_torch(key, ours, theirs, exact.state_dict()[key])
    both.each("unmerge_adapter")
    exact.unmerge_adapter()
    for (key, ours), theirs in zip(both.ours.state_dict().items(), both.theirs.state_dict().values(), strict=True):
        assert_as_close_as_torch(key, ours, theirs, exact.state_dict()[key])
    theirs, ours = both.each("merge_and_unload", safe_merge=safe)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert type(ours) is type(theirs)


def test_same_trainability_through_a_life():
    """requires_grad of every parameter, after each of the calls that may change it."""
    both = pair("llama", bias="lora_only", modules_to_save=["lm_head"])
    steps = [
        ("add_adapter", {"r": 2, "target_modules": ["k_proj", "q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("set_adapter", "second"),
        ("base_model.disable_adapter_layers",),
        ("base_model.enable_adapter_layers",),
        ("set_adapter", "default"),
        ("base_model.set_requires_grad", "second"),
        ("base_model.set_requires_grad", "default", False),
        ("base_model.set_adapter", ["default", "second"]),
        ("delete_adapter", "default"),
        ("merge_adapter",),
        ("set_adapter", "second"),
    ]
    for method, *args in steps:
        if method == "add_adapter":
            both.add_adapter("second", **args[0])
        else:
            both.each(method, *args)
        assert both.trainable()[1] == both.trainable()[0], method
        theirs, ours = (model.base_model.active_adapters for model in both)
        assert ours == theirs, method
        theirs, ours = (output(model.eval(), "llama") for model in both)
        torch.testing.assert_close(ours, theirs, msg=method)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_classifier", "t5"])
def test_same_rows_in_a_mixed_batch(family):
    targets = ["embed_tokens", "q_proj"] if family == "llama" else models.TARGETS[family]
    both = pair(family, init_lora_weights=False, target_modules=targets)
    both.add_adapter("other", r=3, target_modules=targets, init_lora_weights=False)
    names = ["other", "__base__", "default"]
    theirs, ours = (output(model.eval(), family, adapter_names=names) for model in both)
    torch.testing.assert_close(ours, theirs)
    for row, name in enumerate(names):
        if name == "__base__":
            with both.ours.disable_adapter():
                alone = output(both.ours, family)
            assert torch.equal(ours[row], alone[row])
        else:
            both.ours.set_adapter(name)
            torch.testing.assert_close(ours[row], output(both.ours, family)[row])
