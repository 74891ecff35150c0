"""train, eval and zero_grad of adapted models do what nn.Module's do."""

import pytest
import torch
from models import batch, tiny_llama
from torch import nn

from fastpeft import LoraConfig, get_peft_model
from fastpeft.tuners.lora import LoraLayer


def adapted():
    model = get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj", "up_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    )
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], use_dora=True))
    return model


@pytest.mark.parametrize("mode", [True, False])
def test_every_module_gets_the_mode(mode):
    model = adapted()
    for module in model.modules():
        module.training = not mode
    assert model.train(mode) is model
    assert all(module.training == mode for module in model.modules())
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    assert layer.train(not mode) is layer
    assert all(module.training != mode for module in layer.modules())


def test_modules_with_a_say_in_it_are_asked():
    class Stubborn(nn.Linear):
        def train(self, mode=True):
            self.asked = mode
            return super().train(False)

    class Watching(nn.Linear):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "training":
                super().__setattr__("told", value)

    model = adapted().eval()
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.lora_A["default"], layer.lora_B["default"] = Stubborn(32, 8, bias=False), Watching(8, 32, bias=False)
    model.train()
    assert layer.lora_A["default"].asked is True
    assert layer.lora_A["default"].training is False
    assert layer.lora_B["default"].told is True


def test_a_mode_that_is_none_is_refused():
    layer = next(module for module in adapted().modules() if isinstance(module, LoraLayer))
    with pytest.raises(ValueError, match="expected to be boolean, got 'yes'"):
        layer.train("yes")


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model = adapted().train()
    norm = model.get_base_model().model.norm.weight.requires_grad_()  # not an adapter's
    model(**batch("llama")).loss.backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    assert any(p is norm for p in trained)
    assert len(trained) > 4
    model.zero_grad(set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in model.parameters())
    else:
        assert all(torch.count_nonzero(p.grad) == 0 for p in trained)
