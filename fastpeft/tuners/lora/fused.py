"""Which path a LoRA layer takes: the fused ops where they are known to be right, the modules themselves elsewhere.

    fused   one op owns the base product as well; reads base.weight, never calls the base module
    added   the base module runs as it is, one op adds the low-rank part onto its output
    plain   the base module, then lora_dropout, lora_A and lora_B as modules

Calling a module runs whatever others hung on it: hooks, offloading, a replaced forward. A path that reads a module's
weight instead must first see that nothing hangs there: wrong numbers would come out finite. The checks run on every
forward, because hooks come and go; nothing is remembered.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from fastpeft_kernels import lora_add, lora_linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LINEAR_FORWARD = nn.Linear.forward


def obstacle_to_adding(layer: Any, adapter: str) -> str | None:
    """Why an adapter's own modules must be called, or None: then its weights may go to an op."""
    if adapter not in layer.lora_A:
        return "not a linear layer"
    A, B, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if B.bias is not None:
        return "lora_bias is set"
    if not layer.cast_input_dtype_enabled:
        return "input dtype casting is switched off"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"lora_dropout is a {type(dropout).__name__}"
    for name, module in (("lora_A", A), ("lora_B", B)):
        if (reason := _not_a_plain_linear(name, module)) is not None:
            return reason
    if A.weight.dtype != B.weight.dtype:
        return "lora_A and lora_B differ in dtype"
    return _watched({"lora_A": A, "lora_B": B, "lora_dropout": dropout})


def obstacle_to_owning(layer: Any) -> str | None:
    """Why the base module must be called, or None: then an op may read its weight and own the base product."""
    base = layer.base_layer
    if (reason := _not_a_plain_linear("the base layer", base)) is not None:
        return reason
    weight, bias = base.weight, base.bias
    if weight.requires_grad:
        return "the base weight is trained"
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype != weight.dtype):
        return "the base bias is no Parameter of the weight's dtype"
    return _watched({"the base layer": base})


def _not_a_plain_linear(name: str, module: nn.Module) -> str | None:
    """Subclasses of Linear (quantised ones) and of Tensor inside a Linear (quantisers, sharding) compute otherwise."""
    if type(module) is not nn.Linear:
        return f"{name} is a {type(module).__name__}, not exactly torch.nn.Linear"
    if type(module.weight) is not nn.Parameter:
        return f"the weight of {name} is a {type(module.weight).__name__}"
    return f"the weight of {name} is on the meta device" if module.weight.is_meta else None


def _watched(modules: dict[str, nn.Module]) -> str | None:
    """Who would notice that a module was not called."""
    if any(getattr(torch_module, f"_global{kind}") for kind in _HOOKS):
        return "a global module hook is registered"
    if nn.Linear.forward is not _LINEAR_FORWARD:
        return "the forward of torch.nn.Linear was replaced"
    for name, module in modules.items():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"a hook is registered on {name}"
        if "forward" in module.__dict__:
            return f"the forward of {name} was replaced"
    return None


def obstacle_to_fusing(layer: Any, adapters: Sequence[str], x_dtype: torch.dtype, autocast: bool) -> str | None:
    """Why base product and adapters are no single op for an input of this dtype, or None."""
    if (reason := obstacle_to_owning(layer)) is not None:
        return reason
    for name in adapters:
        if not layer.variants[name].fusable:
            return f"{type(layer.variants[name]).__name__} has no op that owns the base product"
        if (reason := obstacle_to_adding(layer, name)) is not None:
            return reason
    weight_dtype = layer.base_layer.weight.dtype
    dtypes = {name: layer.lora_A[name].weight.dtype for name in adapters}
    if autocast:
        together = {x_dtype, weight_dtype, *dtypes.values()}
        if torch.float64 in together and len(together) > 1:
            return "autocast leaves float64 as it is and casts the others"
    elif x_dtype != weight_dtype:
        return "the input is not of the base weight's dtype"
    else:
        for name, dtype in dtypes.items():
            if dtype not in (weight_dtype, torch.float32):
                return f"adapter {name!r} is neither fp32 nor of the base weight's dtype"
    if len(adapters) > 1:
        if len(set(dtypes.values())) > 1:
            return "the adapters differ in dtype"
        if any(_dropout_p(layer, name) for name in adapters):
            return "several adapters with dropout take a mask each"
    return None


def _ordinary(x: Tensor) -> bool:
    """Not a tensor subclass, not inside a functional transform, not on its way to a portable graph."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return (
        type(x) in (Tensor, nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0  # the ops have no forward-mode derivative
    )


def _dropout_p(layer: Any, adapter: str) -> float:
    dropout = layer.lora_dropout[adapter]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def fused_forward(layer: Any, adapters: Sequence[str], x: Tensor) -> Tensor | None:
    """Base product and adapters in one op: (..., N) in x's dtype. None where that op is not the right one.

    Several adapters without dropout are one of the sum of their ranks.
    """
    if not adapters or not _ordinary(x):
        return None
    if obstacle_to_fusing(layer, adapters, x.dtype, torch.is_autocast_enabled(x.device.type)) is not None:
        return None
    base = layer.base_layer
    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in adapters]
    if len(adapters) == 1:
        name, (A, B) = adapters[0], pairs[0]
        return lora_linear(x, base.weight, base.bias, A, B, layer.scaling[name], _dropout_p(layer, name))
    A = torch.cat([A for A, _ in pairs])
    B = torch.cat([B * layer.scaling[name] for name, (_, B) in zip(adapters, pairs, strict=True)], dim=1)
    return lora_linear(x, base.weight, base.bias, A, B, 1.0)


def add_low_rank(layer: Any, adapter: str, out: Tensor, x: Tensor) -> Tensor:
    """out + scaling · drop(x) Aᵀ Bᵀ: by the op, in out's dtype; or by the modules, in the wider of both dtypes."""
    if not (_ordinary(x) and _ordinary(out)) or obstacle_to_adding(layer, adapter) is not None:
        return out + layer.base.low_rank(layer, adapter, x)
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return lora_add(out, x, A, B, layer.scaling[adapter], _dropout_p(layer, adapter))


def path_of(layer: Any, adapters: Sequence[str]) -> tuple[str, str]:
    """(path, why not a better one) for these adapters on this layer: for `fastpeft.explain`."""
    for name in adapters:
        if (reason := obstacle_to_adding(layer, name)) is not None:
            return "plain", reason
    if (reason := obstacle_to_fusing(layer, adapters, layer.get_base_layer().weight.dtype, autocast=False)) is not None:
        return "added", reason
    return "fused", ""
