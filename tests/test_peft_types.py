"""PeftType, TaskType and the table of methods."""

import subprocess
import sys

import pytest

from fastpeft.config import PeftConfig
from fastpeft.utils import peft_types
from fastpeft.utils.peft_types import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftType,
    TaskType,
    UnsupportedMethodError,
    register_peft_method,
)


@pytest.fixture
def tables(monkeypatch):
    """Registration on copies of the tables."""
    for name in ("CONFIG", "TUNER", "MIXED_MODEL", "PREFIX"):
        attribute = f"PEFT_TYPE_TO_{name}_MAPPING"
        table = getattr(peft_types, attribute)
        copy = dict(table) if isinstance(table, dict) else type(table)(dict(table))
        monkeypatch.setattr(peft_types, attribute, copy)
    return peft_types


def test_names_are_those_of_reference_peft():
    import peft

    assert {t.name: t.value for t in PeftType} == {t.name: t.value for t in peft.PeftType}
    assert {t.name: t.value for t in TaskType} == {t.name: t.value for t in peft.TaskType}
    assert f"{PeftType.LORA}" == f"{peft.PeftType.LORA}"
    assert PeftType.LORA == "LORA"


@pytest.mark.parametrize("name", ["LORA", PeftType.LORA, "IA3", PeftType.IA3], ids=repr)
def test_a_method_is_found_by_name_and_by_member(name):
    from fastpeft.tuners.ia3 import IA3Config, IA3Model
    from fastpeft.tuners.lora import LoraConfig, LoraModel

    config, tuner = {"LORA": (LoraConfig, LoraModel), "IA3": (IA3Config, IA3Model)}[name]
    assert name in PEFT_TYPE_TO_CONFIG_MAPPING
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[name] is tuner
    assert PEFT_TYPE_TO_MIXED_MODEL_MAPPING[name] is tuner
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == tuner.prefix
    assert set(PEFT_TYPE_TO_CONFIG_MAPPING.values()) == {LoraConfig, IA3Config}


def test_a_table_imports_nothing_until_it_is_read():
    code = (
        "import sys; from fastpeft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING as t; assert 'LORA' in t;"
        "assert not [m for m in sys.modules if m.startswith('fastpeft.tuners')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_that_is_not_built_says_so():
    with pytest.raises(UnsupportedMethodError, match="ADALORA is not supported yet: this release builds IA3, LORA"):
        PEFT_TYPE_TO_CONFIG_MAPPING["ADALORA"]
    with pytest.raises(KeyError):  # as reference PEFT's dicts do
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ADALORA]
    assert "ADALORA" not in PEFT_TYPE_TO_CONFIG_MAPPING
    assert PEFT_TYPE_TO_CONFIG_MAPPING.get("ADALORA") is None


@pytest.mark.parametrize("name", ["NO_SUCH", "lora", None])
def test_an_unknown_method_says_which_there_are(name):
    with pytest.raises(UnsupportedMethodError, match=r"unknown PEFT type .*expected one of .*LORA"):
        PEFT_TYPE_TO_CONFIG_MAPPING[name]
    assert name not in PEFT_TYPE_TO_CONFIG_MAPPING


def test_register(tables):
    class OftConfig(PeftConfig):
        pass

    class OftModel:
        prefix = "oft_"

    register_peft_method(name="oft", config_cls=OftConfig, model_cls=OftModel, is_mixed_compatible=True)
    assert tables.PEFT_TYPE_TO_CONFIG_MAPPING["OFT"] is OftConfig
    assert tables.PEFT_TYPE_TO_TUNER_MAPPING["OFT"] is OftModel
    assert tables.PEFT_TYPE_TO_MIXED_MODEL_MAPPING["OFT"] is OftModel
    assert tables.PEFT_TYPE_TO_PREFIX_MAPPING["OFT"] == "oft_"
    with pytest.raises(KeyError, match="already registered"):
        register_peft_method(name="oft", config_cls=OftConfig, model_cls=OftModel)


def test_register_by_path(tables):
    register_peft_method(name="oft", config_cls="fastpeft.config:PeftConfig", model_cls=None, prefix="oft_r")
    assert tables.PEFT_TYPE_TO_CONFIG_MAPPING["OFT"] is PeftConfig
    assert tables.PEFT_TYPE_TO_TUNER_MAPPING["OFT"] is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "OFT"}, ValueError, "lower case"),
        ({"name": "no_such"}, ValueError, "one of the PEFT types"),
        ({"name": "lora"}, KeyError, "already registered"),
        ({"name": "oft", "prefix": "lora_"}, KeyError, "belongs to another"),
        ({"name": "oft", "model_cls": type("M", (), {"prefix": "other_"})}, ValueError, "must be equal"),
    ],
)
def test_register_refuses(tables, arguments, error, message):
    before = dict(tables.PEFT_TYPE_TO_PREFIX_MAPPING)
    with pytest.raises(error, match=message):
        register_peft_method(**{"config_cls": PeftConfig, "model_cls": None} | arguments)
    assert before == tables.PEFT_TYPE_TO_PREFIX_MAPPING
