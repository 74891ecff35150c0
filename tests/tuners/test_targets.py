"""Which modules a config selects."""

import copy
import itertools
import re
from types import SimpleNamespace

import models
import peft
import pytest
import torch
from peft.tuners import tuners_utils as reference
from torch import nn

from fastpeft.tuners import targets
from fastpeft.tuners.lora import LoraConfig, LoraModel
from fastpeft.utils.error import NoMatchingPeftModuleError


def matched(family, **options):
    return targets.find_targets(LoraConfig(**options), models.build(family)).matched


CONFIGS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["attn.q_proj", "up_proj"]},  # no dot before attn: the first matches nothing
    {"target_modules": ["proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["layers", "h"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": r".*self_attn\.[qv]_proj"},
    {"target_modules": "q_proj"},  # an expression has to match the whole path
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    {"target_modules": ["embed_tokens", "mlp"]},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_selects_what_the_reference_selects(options):
    model = models.tiny_llama()
    config = peft.LoraConfig(**copy.deepcopy(options))
    keys = [key for key, _ in model.named_modules() if key]
    expected = [key for key in keys if reference.check_target_module_exists(config, key)]
    assert targets.find_targets(LoraConfig(**options), model).matched == expected


def test_layer_index_is_the_first_number_in_the_path():
    config = LoraConfig(target_modules=["w1"], layers_to_transform=[1])
    assert targets.is_target(config, "model.layers.1.experts.0.w1")
    assert not targets.is_target(config, "model.layers.0.experts.1.w1")
    assert not targets.is_target(config, "model.w1")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_classifier", "t5"])
def test_all_linear_selects_what_the_reference_selects(family):
    task_type = models.TASK_TYPES[family]
    model = models.build(family)
    theirs = reference._maybe_include_all_linear_layers(
        peft.LoraConfig(target_modules="all-linear", task_type=task_type), model
    )
    ours = targets.expand_all_linear(LoraConfig(target_modules="ALL-Linear", task_type=task_type), model)
    assert ours.target_modules == theirs.target_modules
    assert not any(name.endswith(("lm_head", "classifier")) for name in ours.target_modules)


def test_all_linear_again_selects_the_adapted_layers_and_not_their_insides():
    model = models.tiny_llama()
    expected = targets.expand_all_linear(LoraConfig(target_modules="all-linear"), model).target_modules
    LoraModel(model, LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]), "first")
    assert targets.expand_all_linear(LoraConfig(target_modules="all-linear"), model).target_modules == expected


def test_a_long_list_is_condensed_to_suffixes():
    model = models.tiny_llama(num_hidden_layers=3)
    config = targets.expand_all_linear(LoraConfig(target_modules="all-linear"), model)
    assert len(config.target_modules) == 21
    before = targets.find_targets(config, model).matched
    targets.condense_target_modules(config, model)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert targets.find_targets(config, model).matched == before


def test_condensing_keeps_what_a_shorter_suffix_would_blur():
    wanted = {f"encoder.{i}.q" for i in range(10)} | {f"decoder.{i}.self.q" for i in range(10)}
    others = {f"decoder.{i}.cross.q" for i in range(10)} | {"q"}
    chosen = targets.minimal_target_modules(wanted, others)
    everything = wanted | others
    assert {key for key in everything if targets.matches_name(chosen, key)} == wanted
    assert "self.q" in chosen
    assert len(chosen) == 11


def test_condensing_gives_the_reference_its_answer():
    names = [".".join(parts) for parts in itertools.product(["enc", "dec"], "012", ["attn", "mlp"], ["q", "k", "out"])]
    for step in range(1, 7):
        wanted, others = set(names[::step]), set(names) - set(names[::step])
        if others:
            assert targets.minimal_target_modules(wanted, others) == reference._find_minimal_target_modules(
                wanted, others
            )


@pytest.mark.parametrize(("wanted", "others"), [("q", []), ([], []), (["q", ""], []), (["q"], ["q"])])
def test_condensing_refuses_what_is_no_list_of_targets(wanted, others):
    with pytest.raises(ValueError, match="target"):
        targets.minimal_target_modules(wanted, others)


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ({}, "layers.0.q_proj", 8),
        (None, "layers.0.q_proj", 8),
        ({"q_proj": 3}, "layers.0.q_proj", 3),
        ({"proj": 3}, "layers.0.q_proj", 8),  # from a dot on
        ({"layers.0.q_proj": 3, "q_proj": 4}, "layers.0.q_proj", 3),  # the first that matches
        ({"q_proj": 4, "layers.0.q_proj": 3}, "layers.0.q_proj", 4),
        ({r"[qk]_proj": 5}, "layers.0.k_proj", 5),
        ({"^layers.0.q_proj": 6}, "model.layers.0.q_proj", 8),
        ({"^layers.0.q_proj": 6}, "layers.0.q_proj", 6),
    ],
)
def test_rank_and_alpha_by_pattern(pattern, key, expected):
    assert targets.resolve_pattern(pattern, key, 8) == expected


def unchanged_after(model, error, match, config, name="default"):
    before = [(key, id(module)) for key, module in model.named_modules()]
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match) as caught:
        LoraModel(model, config, name)
    assert [(key, id(module)) for key, module in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == grads
    assert not hasattr(model, "peft_config")
    return caught.value


def test_unknown_targets_name_the_linear_layers_there_are():
    error = unchanged_after(
        models.tiny_llama(), NoMatchingPeftModuleError, "matches no layer", LoraConfig(target_modules=["q_prj"])
    )
    assert str(error) == (
        "target_modules={'q_prj'} matches no layer of LlamaForCausalLM. Linear layers here end in:\n"
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": r".*q_prj"}, re.escape("target_modules='.*q_prj' matches no layer")),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "matches 2 layers .* exclude_modules="),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform=\[7\]"),
    ],
)
def test_nothing_selected_says_why(options, match):
    unchanged_after(models.tiny_llama(), NoMatchingPeftModuleError, match, LoraConfig(**options))


def test_no_default_targets_for_an_unknown_family():
    model = nn.Sequential(nn.Linear(3, 5))
    unchanged_after(model, ValueError, "no default target_modules for models of type 'custom'", LoraConfig())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 6)
        self.fp8 = nn.Linear(8, 6).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("norm", ValueError, r"norm \(LayerNorm\) cannot be adapted; supported are torch.nn.Linear"),
        ("conv", NotImplementedError, r"conv \(Conv2d\) is not supported yet"),
        ("attention", NotImplementedError, "MultiheadAttention"),
        ("attention.out_proj", NotImplementedError, "output layer of MultiheadAttention"),
        ("fp8", NotImplementedError, "float8_e4m3fn"),
    ],
)
def test_a_module_that_cannot_be_adapted_is_found_before_the_first_is_replaced(name, error, match):
    unchanged_after(Attention(), error, match, LoraConfig(target_modules=["linear", name]))


@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_mamba_modules_that_are_read_without_a_call(name):
    model = nn.ModuleDict({"mixer": nn.ModuleDict({"in_proj": nn.Linear(4, 4), name: nn.Linear(4, 4)})})
    model.config = SimpleNamespace(model_type="llama")
    targets.check_mamba_targets(LoraConfig(), model, name)
    model.config.model_type = "mamba2"
    with pytest.raises(ValueError, match=f"{name} cannot be adapted in a mamba2 model"):
        targets.check_mamba_targets(LoraConfig(), model, name)
    targets.check_mamba_targets(LoraConfig(), model, "in_proj")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"exclude_modules": ["nowhere"]}, "excludes no module"),
        ({"rank_pattern": {"nowhere": 3}}, "rank_pattern .*nowhere"),
        ({"alpha_pattern": {"k_proj": 3}}, "alpha_pattern .*k_proj"),
        ({"target_modules": ["q_proj", "v_prj"]}, "v_prj"),
    ],
)
def test_parts_of_a_config_without_effect_are_told(options, match):
    with pytest.warns((UserWarning, RuntimeWarning), match=match):
        LoraModel(models.tiny_llama(), LoraConfig(**{"target_modules": ["q_proj"]} | options), "default")


def test_a_checkpoint_decides_where_adapters_go():
    source = LoraModel(models.tiny_llama(), LoraConfig(target_modules=["q_proj", "up_proj"]), "default")
    keys = {
        key.replace(".default", ""): value
        for key, value in source.model.state_dict().items()
        if "lora_" in key and ".1." not in key
    }
    for prefix in ("", "base_model.model."):
        state_dict = {prefix + key: value for key, value in keys.items()}
        with pytest.warns(RuntimeWarning, match=r"also targets .*v_proj.*, for which .*up_proj.*does not target"):
            tuner = LoraModel(
                models.tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]), "default", state_dict=state_dict
            )
        assert tuner.targeted_module_names == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]


def test_a_checkpoint_of_another_model_is_refused():
    model = models.tiny_llama()
    with pytest.raises(NoMatchingPeftModuleError, match=r"begin with .*transformer\.h\.0"):
        LoraModel(model, LoraConfig(), "default", state_dict={"transformer.h.0.c_attn.lora_A.weight": torch.zeros(1)})
    assert not hasattr(model, "peft_config")
