"""A frozen head multiplies the last positions of a prompt as one matrix, as a trainable one does, and keeps no hook."""

import pytest
import torch
from models import VOCAB, tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import LoraConfig, get_peft_model
from fastpeft.utils.frozen_head import rows_of_head_together

OPTIONS = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


class HeadProducts(TorchDispatchMode):
    """Names of the products whose output has a column for each token of the vocabulary."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "linear") and out.shape[-1] == VOCAB:
            self.names.add(name)
        return out


def generated(model):
    ids = torch.arange(3, 15).view(3, 4)
    with HeadProducts() as products:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    return out, products.names


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.parametrize("names", [None, ["a", "__base__", "a"]], ids=["active", "mixed"])
def test_rows_of_the_head_are_one_product(task, names):
    plain, _ = generated(tiny_llama())
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type=task), adapter_name="a").eval()
    assert not model.get_base_model().lm_head.weight.requires_grad
    out, products = generated(model if names is None else _Mixed(model, names))
    assert products == {"mm"}
    assert torch.equal(out.logits[0], plain.logits[0])  # a fresh adapter changes nothing
    assert not model.get_base_model().lm_head._forward_pre_hooks


class _Mixed:
    def __init__(self, model, names):
        self.model, self.names = model, names

    def generate(self, **kwargs):
        return self.model.generate(**kwargs, adapter_names=self.names)


def test_without_it_torch_takes_them_one_by_one():
    """Else all this can go."""
    _, products = generated(tiny_llama().requires_grad_(False))
    assert "bmm" in products


def test_the_hook_goes_when_generate_fails():
    model = tiny_llama().requires_grad_(False)
    seen = []

    def fail(*args):
        seen.extend(model.lm_head._forward_pre_hooks)
        raise KeyError

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyError), rows_of_head_together(model):
        generated(model)
    assert seen
    assert not model.lm_head._forward_pre_hooks


def test_other_heads_are_left_alone():
    model = tiny_llama()
    with rows_of_head_together(model):  # trainable
        assert not model.lm_head._forward_pre_hooks
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["lm_head"])).get_base_model()
    with rows_of_head_together(adapted):
        assert not adapted.lm_head._forward_pre_hooks
        assert not adapted.lm_head.base_layer._forward_pre_hooks
    with rows_of_head_together(nn.Linear(2, 2)):  # a model without a head
        pass
