"""Reference PEFT and this library side by side: the same model, the same seed, the same config."""

import copy
import warnings
from typing import Any, NamedTuple

import models
import peft
import torch
from torch import Tensor, nn

import fastpeft


class Pair(NamedTuple):
    """Two models that should not be told apart."""

    theirs: nn.Module
    ours: nn.Module

    def state_dicts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.theirs.state_dict(), self.ours.state_dict()

    def trainable(self) -> tuple[dict[str, bool], dict[str, bool]]:
        return trainable(self.theirs), trainable(self.ours)

    def each(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Call a method of both models, found by a dotted path; arguments are copied for the second."""
        results = []
        for model in self:
            for name in method.split("."):
                model = getattr(model, name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        return results[0], results[1]

    def add_adapter(self, name: str, seed: int = 5, method: str = "LoraConfig", **options: Any) -> None:
        """Add a second adapter of the same config to both."""
        for model, library in zip(self, (peft, fastpeft), strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                model.add_adapter(name, getattr(library, method)(**copy.deepcopy(options)))


def pair(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    overrides: dict[str, Any] | None = None,
    autocast: bool = True,
    method: str = "LoraConfig",
    **options: Any,
) -> Pair:
    """Both libraries' PeftModel around the tiny model of a family.

    Args:
        seed: of the adapter; the base model's is always 0.
        overrides: of the base model's config.
        autocast: `autocast_adapter_dtype` of get_peft_model.
        method: the config class, under the name that both libraries have for it.
        options: of the config; task_type, and for LoRA target_modules, are the family's unless given.
    """
    # reference PEFT 0.21's class for seq2seq models looks for a method that transformers 5.23 no longer has
    task_type = None if family == "t5" else models.TASK_TYPES[family]
    defaults = {"target_modules": models.TARGETS[family], "r": 4} if method == "LoraConfig" else {}
    options = {"task_type": task_type} | defaults | options
    both = []
    for library in (peft, fastpeft):
        base = models.build(family, dtype, **(overrides or {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            config = getattr(library, method)(**copy.deepcopy(options))
            both.append(library.get_peft_model(base, config, autocast_adapter_dtype=autocast))
    return Pair(*both)


def trainable(model: nn.Module) -> dict[str, bool]:
    """requires_grad of every parameter, by name."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def output(model: nn.Module, family: str, seed: int = 0, **kwargs: Any) -> Tensor:
    """One tensor that depends on everything the model computes."""
    result = model(**models.batch(family, seed=seed), **kwargs)
    if family == "bert_qa":
        return torch.stack([result.start_logits, result.end_logits])
    return result.last_hidden_state if family == "bert" else result.logits


def output_and_gradients(model: nn.Module, family: str, seed: int = 0) -> dict[str, Tensor]:
    """The output, and the gradient of every trainable parameter for a random gradient of the output."""
    model.zero_grad()
    out = output(model.train(), family, seed)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    out.backward(dout)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    return {"output": out.detach()} | {name: grad for name, grad in gradients.items() if grad is not None}


def exact_copy(model: nn.Module) -> nn.Module:
    """The same model in fp64."""
    return copy.deepcopy(model).double()
