"""LoraConfig: every field of reference PEFT's, its checks, and what is not built yet."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama

import fastpeft
from fastpeft.config import PeftConfig
from fastpeft.tuners.lora.config import _NOT_BUILT, LoraConfig, LoraRuntimeConfig


def test_fields_and_defaults_are_those_of_reference_peft():
    import peft

    ours, theirs = dataclasses.fields(LoraConfig), dataclasses.fields(peft.LoraConfig)
    assert [f.name for f in ours] == [f.name for f in theirs]  # in this order: they can be given by position
    left, right = LoraConfig().to_dict(), peft.LoraConfig().to_dict()
    assert left == right
    assert all(type(left[key]) is type(right[key]) for key in left if key != "peft_type")


def test_target_modules_become_a_set():
    for given_ in (["q", "v"], ("q", "v"), {"q", "v"}):
        assert LoraConfig(target_modules=given_).target_modules == {"q", "v"}
        assert LoraConfig(exclude_modules=given_).exclude_modules == {"q", "v"}
    assert LoraConfig(target_modules=".*q").target_modules == ".*q"
    assert LoraConfig(target_modules=[]).target_modules == set()
    assert LoraConfig().target_modules is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be a positive integer.*got 0"),
        ({"r": -4}, ValueError, "got -4"),
        ({"r": 8.0}, ValueError, "positive integer"),
        ({"r": True}, ValueError, "positive integer"),
        ({"r": "8"}, ValueError, "positive integer"),
        ({"r": float("nan")}, ValueError, "positive integer"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be a positive integer"),
        ({"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern must map"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be a finite number"),
        ({"lora_alpha": float("inf")}, ValueError, "finite"),
        ({"lora_alpha": None}, ValueError, "finite"),
        ({"alpha_pattern": {"q": float("nan")}}, ValueError, r"alpha_pattern\['q'\]"),
        ({"lora_dropout": 1.0}, ValueError, r"probability in \[0, 1\); got 1.0"),
        ({"lora_dropout": -0.1}, ValueError, "probability"),
        ({"lora_dropout": 1.5}, ValueError, "probability"),
        ({"lora_dropout": float("nan")}, ValueError, "probability"),
        ({"lora_dropout": "0.1"}, ValueError, "probability"),
        ({"bias": "some"}, ValueError, "'none', 'all' or 'lora_only'; got 'some'"),
        ({"init_lora_weights": "xavier"}, ValueError, "True, False or 'gaussian'; got 'xavier'"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, ValueError, "lora_bias=True needs"),
        ({"target_modules": 5}, TypeError, "target_modules must be a list"),
        ({"target_modules": ["q", 5]}, TypeError, "target_modules must be a list"),
        ({"exclude_modules": 5}, TypeError, "exclude_modules must be a list"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, ValueError, "layers_to_transform cannot be used"),
        ({"target_modules": ".*q", "layers_pattern": "h"}, ValueError, "layers_pattern cannot be used"),
        ({"layers_pattern": ["h"]}, ValueError, "needs layers_to_transform"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform must be a layer's number or a list"),
        ({"layers_to_transform": ["1"]}, TypeError, "layers_to_transform must be a layer's number or a list"),
        ({"target_modules": "q_("}, ValueError, r"target_modules='q_\(' is no regular expression"),
        ({"exclude_modules": "*"}, ValueError, r"exclude_modules='\*' is no regular expression"),
        ({"rank_pattern": {"(": 3}}, ValueError, r"rank_pattern\['\('\] is no regular expression"),
        ({"alpha_pattern": {"q[": 3}}, ValueError, r"alpha_pattern\['q\['\] is no regular expression"),
        ({"no_such_field": 1}, TypeError, "no_such_field"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 0},
        {"lora_alpha": -1.5},
        {"lora_dropout": 0},
        {"lora_dropout": 0.999},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "Gaussian"},
        {"init_lora_weights": None},
        {"layers_to_transform": 1},
        {"layers_to_transform": range(2)},
        {"layers_to_transform": [0], "layers_pattern": "h"},
        {"lora_bias": True, "init_lora_weights": False},
        {"rank_pattern": None, "alpha_pattern": None},
        {"target_modules": "all-linear", "exclude_modules": ".*head"},
    ],
    ids=str,
)
def test_what_reference_peft_takes_is_taken(options):
    import peft

    assert LoraConfig(**options).to_dict() == peft.LoraConfig(**options).to_dict()


AWAY = {  # a value of each field that reference PEFT would act on
    "megatron_config": {"a": 1},
    "megatron_core": "my.core",
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 1.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"scale": "unit"},
    "velora_config": {"num_groups": 8},
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "qalora_group_size": 32,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [(0, 2)],
    "target_parameters": ["experts.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("name", _NOT_BUILT)
def test_what_is_not_built_yet_says_so(name, tmp_path):
    with pytest.raises(NotImplementedError, match=rf"{name}=.* is not supported yet\. Leave {name} at its default"):
        LoraConfig(**{name: AWAY[name]})
    values = LoraConfig().to_dict() | {name: AWAY[name]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(NotImplementedError, match=name):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "init", ["eva", "olora", "pissa", "pissa_niter_4", "corda", "loftq", "orthogonal", "mica", "lora_ga"]
)
def test_initialisations_that_are_not_built_yet_say_so(init):
    with pytest.raises(NotImplementedError, match=f"init_lora_weights='{init}' is not supported yet"):
        LoraConfig(init_lora_weights=init)


def test_ephemeral_offload_is_not_built_yet():
    with pytest.raises(NotImplementedError, match="ephemeral_gpu_offload"):
        LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))


NAMES = st.text("abcdefgh_.", min_size=1, max_size=8)
CONFIGS = st.builds(
    LoraConfig,
    r=st.integers(1, 512),
    target_modules=st.none() | NAMES | st.lists(NAMES, max_size=4),
    exclude_modules=st.none() | NAMES | st.sets(NAMES, max_size=4),
    lora_alpha=st.integers(-64, 64) | st.floats(-1e6, 1e6),
    lora_dropout=st.floats(0, 1, exclude_max=True),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    use_rslora=st.booleans(),
    fan_in_fan_out=st.booleans(),
    modules_to_save=st.none() | st.lists(NAMES, max_size=3),
    init_lora_weights=st.sampled_from([True, False, "gaussian"]),
    rank_pattern=st.dictionaries(NAMES, st.integers(1, 64), max_size=3),
    alpha_pattern=st.dictionaries(NAMES, st.floats(-8, 8), max_size=3),
    task_type=st.none() | st.sampled_from(["CAUSAL_LM", "SEQ_CLS"]),
    base_model_name_or_path=st.none() | st.text(max_size=12),
    inference_mode=st.booleans(),
)


@given(CONFIGS)
def test_round_trip(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("config", numbered=True)
    config.save_pretrained(folder)
    loaded = PeftConfig.from_pretrained(folder)
    assert loaded == config
    assert loaded.signature() == config.signature()
    assert loaded.to_json() == config.to_json()


def test_a_config_is_checked_again_when_it_is_used():
    """What is set after construction, or in a config of reference PEFT, is refused as well, not ignored."""
    import peft

    changed = LoraConfig(r=2, target_modules=["q_proj"])
    changed.use_qalora = True
    reference = peft.LoraConfig(r=2, target_modules=["q_proj"], use_qalora=True)
    for config in (changed, reference):
        model = tiny_llama()
        with pytest.raises(NotImplementedError, match="use_qalora=True: QA-LoRA is not supported yet"):
            fastpeft.get_peft_model(model, config)
        assert not hasattr(model, "peft_config")
    changed.use_qalora, changed.lora_dropout = False, 1.5
    with pytest.raises(ValueError, match="lora_dropout must be a probability"):
        fastpeft.get_peft_model(tiny_llama(), changed)
    plain = fastpeft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="QA-LoRA"):
        plain.add_adapter("second", reference)
    assert list(plain.peft_config) == ["default"]
