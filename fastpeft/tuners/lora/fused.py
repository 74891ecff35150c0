"""Which path a LoRA layer takes: the fused ops where they are known to be right, the modules themselves elsewhere.

    fused   one op owns the base product as well; reads base.weight, never calls the base module
    added   the base module runs as it is, one op adds the low-rank part onto its output
    plain   the base module, then lora_dropout, lora_A and lora_B as modules

Calling a module runs whatever others hung on it: hooks, offloading, a replaced forward. A path that reads a module's
weight instead must first see that nothing hangs there: wrong numbers would come out finite. The checks run on every
forward, because hooks come and go; nothing is remembered. They read the modules' own tables: nn.Module's attribute
look-up, thirty times a forward, would cost as much as the products of a single row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from fastpeft.tuners.shared_inputs import InputGroup, sharing_is_on
from fastpeft_kernels import LoraOperands, lora_add, lora_group, lora_linear

_LINEAR_FORWARD = nn.Linear.forward


def adapter_parts(layer: Any, adapter: str) -> tuple[Tensor, Tensor, float] | str:
    """(weight of lora_A, weight of lora_B, dropout probability in force), or why the modules must be called."""
    modules = layer._modules
    A = modules["lora_A"]._modules.get(adapter)
    if A is None:
        return "not a linear layer"
    B, dropout = modules["lora_B"]._modules[adapter], modules["lora_dropout"]._modules[adapter]
    if B._parameters["bias"] is not None:
        return "lora_bias is set"
    if not layer.cast_input_dtype_enabled:
        return "input dtype casting is switched off"
    kind = type(dropout)
    if kind is not nn.Identity and kind is not nn.Dropout:
        return f"lora_dropout is a {kind.__name__}"
    a, b = _plain_weight("lora_A", A), _plain_weight("lora_B", B)
    if isinstance(a, str):
        return a
    if isinstance(b, str):
        return b
    if a.dtype != b.dtype:
        return "lora_A and lora_B differ in dtype"
    watched = (
        _watched_everywhere() or _watched("lora_A", A) or _watched("lora_B", B) or _watched("lora_dropout", dropout)
    )
    if watched is not None:
        return watched
    return a, b, dropout.p if kind is nn.Dropout and dropout.training else 0.0


def base_parts(layer: Any) -> tuple[Tensor, Tensor | None] | str:
    """(weight, bias) of the base layer, for an op that owns the base product; or why the module must be called."""
    base = layer._modules["base_layer"]
    weight = _plain_weight("the base layer", base)
    if isinstance(weight, str):
        return weight
    if weight.requires_grad:
        return "the base weight is trained"
    bias = base._parameters["bias"]
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype != weight.dtype):
        return "the base bias is no Parameter of the weight's dtype"
    watched = _watched_everywhere() or _watched("the base layer", base)
    return (weight, bias) if watched is None else watched


def _plain_weight(name: str, module: nn.Module) -> Tensor | str:
    """Subclasses of Linear (quantised ones) and of Tensor inside a Linear (quantisers, sharding) compute otherwise."""
    if type(module) is not nn.Linear:
        return f"{name} is a {type(module).__name__}, not exactly torch.nn.Linear"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"the weight of {name} is a {type(getattr(module, 'weight', None)).__name__}"
    return f"the weight of {name} is on the meta device" if weight.is_meta else weight


def _watched_everywhere() -> str | None:
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


def _watched(name: str, module: nn.Module) -> str | None:
    """Who would notice that this module was not called."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"a hook is registered on {name}"
    return f"the forward of {name} was replaced" if "forward" in module.__dict__ else None


def fused_operands(layer: Any, adapters: Sequence[str], x_dtype: torch.dtype, autocast: bool) -> LoraOperands | str:
    """What the op that owns the base product takes for an input of this dtype, or why it is not the right one.

    Several adapters without dropout are one of the sum of their ranks.
    """
    base = base_parts(layer)
    if isinstance(base, str):
        return base
    parts = []
    for name in adapters:
        if not layer.variants[name].fusable:
            return f"{type(layer.variants[name]).__name__} has no op that owns the base product"
        found = adapter_parts(layer, name)
        if isinstance(found, str):
            return found
        parts.append(found)
    W, bias = base
    if autocast:
        together = {x_dtype, W.dtype, *(A.dtype for A, _, _ in parts)}
        if torch.float64 in together and len(together) > 1:
            return "autocast leaves float64 as it is and casts the others"
    elif x_dtype != W.dtype:
        return "the input is not of the base weight's dtype"
    else:
        for name, (A, _, _) in zip(adapters, parts, strict=True):
            if A.dtype != W.dtype and A.dtype != torch.float32:
                return f"adapter {name!r} is neither fp32 nor of the base weight's dtype"
    if len(parts) == 1:
        A, B, p = parts[0]
        return LoraOperands(W, bias, A, B, layer.scaling[adapters[0]], p)
    if len({A.dtype for A, _, _ in parts}) > 1:
        return "the adapters differ in dtype"
    if any(p for _, _, p in parts):
        return "several adapters with dropout take a mask each"
    A = torch.cat([A for A, _, _ in parts])
    B = torch.cat([B * layer.scaling[name] for name, (_, B, _) in zip(adapters, parts, strict=True)], dim=1)
    return LoraOperands(W, bias, A, B, 1.0)


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


def fused_forward(layer: Any, adapters: Sequence[str], x: Tensor) -> Tensor | None:
    """Base product and adapters in one op: (..., N) in x's dtype. None where that op is not the right one.

    Layers that their parent calls on this x next are computed along with the first of them, and pick up what is theirs.
    """
    group: InputGroup | None = layer.input_group
    name = group.name_of(layer) if group is not None and group.is_on() else None
    if group is not None and name is not None:
        out = group.take(name, x)
        if out is not None:
            return out
    if not _ordinary(x):
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    operands = fused_operands(layer, adapters, x.dtype, autocast)
    if isinstance(operands, str):
        return None
    if group is not None and name is not None:
        members = {name: operands} | _sharing(group, name, operands, x, autocast)
        if len(members) > 1:
            return group.keep(name, x, dict(zip(members, lora_group(x, list(members.values())), strict=True)))
    return lora_linear(x, *operands)


def _sharing(
    group: InputGroup, name: str, operands: LoraOperands, x: Tensor, autocast: bool
) -> dict[str, LoraOperands]:
    """The siblings that one op can compute along with the layer `name`."""
    found = {}
    for other, sibling in group.siblings(name, x):
        adapters = sibling.adapters_to_apply()
        theirs = fused_operands(sibling, adapters, x.dtype, autocast) if adapters else "nothing to apply"
        if isinstance(theirs, str):
            continue
        same_input = theirs.W.shape[1] == operands.W.shape[1] and theirs.W.device == operands.W.device
        if same_input and theirs.lora_A.dtype == operands.lora_A.dtype:
            found[other] = theirs
    return found


def add_low_rank(layer: Any, adapter: str, out: Tensor, x: Tensor) -> Tensor:
    """out + scaling · drop(x) Aᵀ Bᵀ: by the op, in out's dtype; or by the modules, in the wider of both dtypes."""
    parts = adapter_parts(layer, adapter) if _ordinary(x) and _ordinary(out) else "not an ordinary tensor"
    if isinstance(parts, str):
        return out + layer.base.low_rank(layer, adapter, x)
    A, B, p = parts
    return lora_add(out, x, A, B, layer.scaling[adapter], p)


# For `fastpeft.explain`.


def path_of(layer: Any, adapters: Sequence[str]) -> tuple[str, str]:
    """(path, why not a better one) for these adapters on this layer."""
    for name in adapters:
        if isinstance(parts := adapter_parts(layer, name), str):
            return "plain", parts
    operands = fused_operands(layer, adapters, layer.get_base_layer().weight.dtype, autocast=False)
    return ("added", operands) if isinstance(operands, str) else ("fused", "")


def sharing_siblings(layer: Any) -> tuple[str, ...]:
    """The siblings that are computed along with this layer when their parent calls them."""
    group: InputGroup | None = layer.input_group
    if group is None or not sharing_is_on() or (name := group.name_of(layer)) is None:
        return ()
    weight = layer.get_base_layer().weight
    operands = fused_operands(layer, layer.adapters_to_apply(), weight.dtype, autocast=False)
    if isinstance(operands, str):
        return ()
    return tuple(_sharing(group, name, operands, weight.new_empty((1, weight.shape[1])), autocast=False))
