"""When a layer may hand a module's weight to an op instead of calling the module: what every method checks.

Calling a module runs whatever others hung on it: hooks, offloading, a replaced forward. A path that reads a module's
weight instead must first see that nothing hangs there: wrong numbers would come out finite. The checks run on every
forward, because hooks come and go; what repeated_batch.py remembers, it asks again. They read the modules' own tables:
nn.Module's attribute look-up, thirty times a forward, would cost as much as the products of a single row.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

_LINEAR_FORWARD = nn.Linear.forward


def base_parts(layer: Any) -> tuple[Tensor, Tensor | None] | str:
    """(weight, bias) of the base layer, for an op that owns the base product; or why the module must be called."""
    base = layer._modules["base_layer"]
    weight = plain_weight("the base layer", base)
    if isinstance(weight, str):
        return weight
    if weight.requires_grad:
        return "the base weight is trained"
    bias = base._parameters["bias"]
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype != weight.dtype):
        return "the base bias is no Parameter of the weight's dtype"
    by = watched_everywhere() or watched("the base layer", base)
    return (weight, bias) if by is None else by


def plain_weight(name: str, module: nn.Module) -> Tensor | str:
    """Subclasses of Linear (quantised ones) and of Tensor inside a Linear (quantisers, sharding) compute otherwise."""
    if type(module) is not nn.Linear:
        return f"{name} is a {type(module).__name__}, not exactly torch.nn.Linear"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"the weight of {name} is a {type(getattr(module, 'weight', None)).__name__}"
    return f"the weight of {name} is on the meta device" if weight.is_meta else weight


def watched_everywhere() -> str | None:
    """Who would notice that any module was not called."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "a global module hook is registered"
    if nn.Linear.forward is not _LINEAR_FORWARD:
        return "the forward of torch.nn.Linear was replaced"
    return None


def watched(name: str, module: nn.Module) -> str | None:
    """Who would notice that this module was not called."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"a hook is registered on {name}"
    return f"the forward of {name} was replaced" if "forward" in module.__dict__ else None


def any_watched(modules: Iterable[nn.Module]) -> bool:
    """`watched` of many modules, where nobody asks for the reason: on the way of every token."""
    for module in modules:
        table = module.__dict__
        if (
            table["_forward_hooks"]
            or table["_forward_pre_hooks"]
            or table["_backward_hooks"]
            or table["_backward_pre_hooks"]
            or "forward" in table
        ):
            return True
    return False


def hooks_registered() -> int:
    """How many hooks torch began to register so far, on whatever it is.

    While it stays no module gets another one, unless somebody writes into the table of its hooks.
    """
    return RemovableHandle.next_id


def is_ordinary(x: Tensor) -> bool:
    """Not a tensor subclass or on meta, not inside a functional transform, not on its way to a portable graph."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return (
        type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0  # the ops have no forward-mode derivative
    )
