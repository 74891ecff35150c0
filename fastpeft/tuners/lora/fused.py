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

from fastpeft.tuners.shared_inputs import InputGroup, sharing_is_on
from fastpeft_kernels import LoraOperands, lora_add, lora_group, lora_linear

_LINEAR_FORWARD = nn.Linear.forward


def obstacle_to_adding(layer: Any, adapter: str) -> str | None:
    """Why an adapter's own modules must be called, or None: then its weights may go to an op."""
    A, B, dropout = _pair(layer, adapter)
    if A is None:
        return "not a linear layer"
    if B._parameters["bias"] is not None:
        return "lora_bias is set"
    if not layer.cast_input_dtype_enabled:
        return "input dtype casting is switched off"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"lora_dropout is a {type(dropout).__name__}"
    for name, module in (("lora_A", A), ("lora_B", B)):
        if (reason := _not_a_plain_linear(name, module)) is not None:
            return reason
    if A._parameters["weight"].dtype != B._parameters["weight"].dtype:
        return "lora_A and lora_B differ in dtype"
    return _watched_everywhere() or watched("lora_A", A) or watched("lora_B", B) or watched("lora_dropout", dropout)


def _pair(layer: Any, adapter: str) -> tuple[Any, Any, Any]:
    """lora_A, lora_B and lora_dropout of an adapter, None where this layer has none.

    Read from the modules' own tables, here and below: nn.Module's attribute look-up, thirty times a forward, would cost
    as much as the products of a single row.
    """
    modules = layer._modules
    return tuple(modules[name]._modules.get(adapter) for name in ("lora_A", "lora_B", "lora_dropout"))  # type: ignore[return-value]


def obstacle_to_owning(layer: Any) -> str | None:
    """Why the base module must be called, or None: then an op may read its weight and own the base product."""
    base = layer._modules["base_layer"]
    if (reason := _not_a_plain_linear("the base layer", base)) is not None:
        return reason
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if weight.requires_grad:
        return "the base weight is trained"
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype != weight.dtype):
        return "the base bias is no Parameter of the weight's dtype"
    return _watched_everywhere() or watched("the base layer", base)


def _not_a_plain_linear(name: str, module: nn.Module) -> str | None:
    """Subclasses of Linear (quantised ones) and of Tensor inside a Linear (quantisers, sharding) compute otherwise."""
    if type(module) is not nn.Linear:
        return f"{name} is a {type(module).__name__}, not exactly torch.nn.Linear"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"the weight of {name} is a {type(getattr(module, 'weight', None)).__name__}"
    return f"the weight of {name} is on the meta device" if weight.is_meta else None


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


def watched(name: str, module: nn.Module) -> str | None:
    """Who would notice that this module was not called."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"a hook is registered on {name}"
    return f"the forward of {name} was replaced" if "forward" in module.__dict__ else None


def obstacle_to_fusing(layer: Any, adapters: Sequence[str], x_dtype: torch.dtype, autocast: bool) -> str | None:
    """Why base product and adapters are no single op for an input of this dtype, or None."""
    if (reason := obstacle_to_owning(layer)) is not None:
        return reason
    for name in adapters:
        if (reason := obstacle_to_adding(layer, name) or layer.variants[name].obstacle(layer, name)) is not None:
            return reason
    weight_dtype = layer._modules["base_layer"]._parameters["weight"].dtype
    dtypes = {name: _pair(layer, name)[0]._parameters["weight"].dtype for name in adapters}
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
        if not all(layer.variants[name].is_a_sum for name in adapters):
            return "one of several adapters is DoRA, which scales what the others add"
        if len(set(dtypes.values())) > 1:
            return "the adapters differ in dtype"
        if any(_dropout_p(layer, name) for name in adapters):
            return "several adapters with dropout take a mask each"
    return None


def may_read_weights(layer: Any, adapter: str, x: Tensor) -> bool:
    """Whether base weight and factors may go to an op that only looks at them, for an input x of the layer."""
    weight = layer.get_base_layer()._parameters.get("weight")
    return type(weight) is nn.Parameter and _ordinary(x) and obstacle_to_adding(layer, adapter) is None


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
    dropout = _pair(layer, adapter)[2]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def fused_forward(layer: Any, adapters: Sequence[str], x: Tensor) -> Tensor | None:
    """Base product and adapters in one op: (..., N) in x's dtype. None where that op is not the right one.

    Layers that their parent calls on this x next are computed along with the first of them, and pick up what is theirs.
    """
    variant = layer.variants[adapters[0]]
    if not variant.is_a_sum:
        operands = _operands(layer, adapters, x)
        return None if operands is None else variant.fused(layer, adapters[0], x, operands)
    group = layer.input_group
    if group is None or not group.is_on() or (name := group.name_of(layer)) is None:
        operands = _operands(layer, adapters, x)
        return None if operands is None else lora_linear(x, *operands)
    out = group.take(name, x)
    if out is not None:
        return out
    operands = _operands(layer, adapters, x)
    if operands is None:
        return None
    members = {name: operands} | _sharing(group, name, operands, x)
    if len(members) == 1:
        return lora_linear(x, *operands)
    return group.keep(name, x, dict(zip(members, lora_group(x, list(members.values())), strict=True)))


def _sharing(group: InputGroup, name: str, operands: LoraOperands, x: Tensor) -> dict[str, LoraOperands]:
    """The siblings that one op can compute along with the layer `name`."""
    found = {}
    for other, sibling in group.siblings(name, x):
        adapters = sibling.adapters_to_apply()
        if not all(sibling.variants[adapter].is_a_sum for adapter in adapters):
            continue
        theirs = _operands(sibling, adapters, x)
        if theirs is not None and _fits(theirs, operands):
            found[other] = theirs
    return found


def _fits(theirs: LoraOperands, operands: LoraOperands) -> bool:
    same_input = theirs.W.shape[1] == operands.W.shape[1] and theirs.W.device == operands.W.device
    return same_input and theirs.lora_A.dtype == operands.lora_A.dtype


def _operands(layer: Any, adapters: Sequence[str], x: Tensor) -> LoraOperands | None:
    """What the op that owns the base product takes, or None where it is not the right one.

    Several adapters without dropout are one of the sum of their ranks.
    """
    if not adapters or not _ordinary(x):
        return None
    if obstacle_to_fusing(layer, adapters, x.dtype, torch.is_autocast_enabled(x.device.type)) is not None:
        return None
    base = layer._modules["base_layer"]._parameters
    pairs = [_weights(layer, name) for name in adapters]
    if len(adapters) == 1:
        name, (A, B) = adapters[0], pairs[0]
        scaling, p = layer.scaling[name], _dropout_p(layer, name)
    else:
        A = torch.cat([A for A, _ in pairs])
        B = torch.cat([B * layer.scaling[name] for name, (_, B) in zip(adapters, pairs, strict=True)], dim=1)
        scaling, p = 1.0, 0.0
    return LoraOperands(base["weight"], base["bias"], A, B, scaling, p)


def _weights(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    A, B, _ = _pair(layer, adapter)
    return A._parameters["weight"], B._parameters["weight"]


def add_low_rank(layer: Any, adapter: str, out: Tensor, x: Tensor) -> Tensor:
    """out + scaling · drop(x) Aᵀ Bᵀ: by the op, in out's dtype; or by the modules, in the wider of both dtypes."""
    if not (_ordinary(x) and _ordinary(out)) or obstacle_to_adding(layer, adapter) is not None:
        return out + layer.base.low_rank(layer, adapter, x)
    A, B = _weights(layer, adapter)
    return lora_add(out, x, A, B, layer.scaling[adapter], _dropout_p(layer, adapter))


def path_of(layer: Any, adapters: Sequence[str]) -> tuple[str, str]:
    """(path, why not a better one) for these adapters on this layer: for `fastpeft.explain`."""
    for name in adapters:
        if (reason := obstacle_to_adding(layer, name)) is not None:
            return "plain", reason
    if (reason := obstacle_to_fusing(layer, adapters, layer.get_base_layer().weight.dtype, autocast=False)) is not None:
        return "added" if all(layer.variants[name].is_a_sum for name in adapters) else "plain", reason
    return "fused", ""


def sharing_siblings(layer: Any) -> tuple[str, ...]:
    """The siblings that are computed along with this layer when their parent calls them: for `fastpeft.explain`."""
    group: InputGroup | None = layer.input_group
    if group is None or not sharing_is_on() or (name := group.name_of(layer)) is None:
        return ()
    weight = layer.get_base_layer().weight
    x = weight.new_empty((1, weight.shape[1]))
    adapters = layer.adapters_to_apply()
    if not all(layer.variants[adapter].is_a_sum for adapter in adapters):
        return ()
    operands = _operands(layer, adapters, x)
    return () if operands is None else tuple(_sharing(group, name, operands, x))
