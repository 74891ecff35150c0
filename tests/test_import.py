"""The top level: what importing it costs, what it exports, and what it says about names that are not built yet."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

import fastpeft
from fastpeft.not_yet import NOT_YET

HEAVY = ["transformers.modeling_utils", "triton", "peft", "bitsandbytes"]


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lazy():
    """Nothing heavy comes with the package, nor reference PEFT with any class of it: the class that inherits from PEFT
    is made with the first model. Submodules are reachable before anybody imported one."""
    code = f"""
import sys, fastpeft
print([name for name in {HEAVY} if name in sys.modules])
print(fastpeft.tuners.lora.LoraLayer.__name__, fastpeft.utils.ModulesToSaveWrapper.__name__)
from fastpeft import LoraConfig, PeftModel
LoraConfig(r=2)
print("peft" in sys.modules)
"""
    assert run_python(code).splitlines() == ["[]", "LoraLayer ModulesToSaveWrapper", "False"]


@pytest.mark.parametrize("name", fastpeft.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(fastpeft, name).__class__ is not None
    assert name in dir(fastpeft)


def test_a_name_of_peft_that_is_not_built_yet_says_so():
    with pytest.raises(AttributeError, match=r"fastpeft\.PeftMixedModel is not supported yet"):
        fastpeft.PeftMixedModel  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'OFTConfig'"):
        from fastpeft import OFTConfig  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        fastpeft.NoSuchThing  # noqa: B018


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs reference PEFT")
def test_every_name_of_peft_is_built_or_listed_as_not_yet():
    import peft

    missing = set(peft.__all__) - set(fastpeft.__all__) - NOT_YET
    assert not missing
    assert not NOT_YET & set(fastpeft.__all__)
    assert set(peft.__all__) >= NOT_YET


def test_type_checkers_see_every_public_name():
    """The TYPE_CHECKING imports and the table of lazy names list the same names."""
    import ast
    import pathlib

    tree = ast.parse(pathlib.Path(fastpeft.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    stated = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert stated == set(fastpeft.__all__)


def test_version_is_the_distributions():
    assert fastpeft.__version__ == importlib.metadata.version("fastpeft")


def test_works_under_the_name_peft():
    """Some programs put us into sys.modules as `peft`; building a model then finds ourselves, and must not mind."""
    code = """
import sys, fastpeft
sys.modules["peft"] = fastpeft
import torch
from torch import nn
from peft import LoraConfig, PeftModel, get_peft_model
model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(r=2, target_modules=["0"]))
print(isinstance(model, PeftModel), type(model).__mro__[0] is PeftModel, tuple(model(torch.ones(2, 3)).shape))
"""
    assert run_python(code) == "True True (2, 4)"
