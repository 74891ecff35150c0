"""Which path a LoRA layer takes: the fused ops where they are known to be right, the modules themselves elsewhere.

    fused   one op owns the base product as well; reads base.weight, never calls the base module
    added   the base module runs as it is, one op adds the low-rank part onto its output
    plain   the base module, then lora_dropout, lora_A and lora_B as modules

Of few rows on the torch path, and of few that are inferred on a GPU, plain operators take the ops' place: few.py for
the first, `add_low_rank` for the second. When is in fastpeft.tuners.eligibility: what others hung on a module must run,
so a path that goes past it looks first.
"""

from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.tuners.eligibility import any_watched, base_parts, is_ordinary, plain_weight, watched, watched_everywhere
from fastpeft.tuners.shared_inputs import InputGroup, sharing_is_on
from fastpeft_kernels import LoraOperands, current_product, lora_add, lora_group, lora_linear
from fastpeft_kernels.dispatch import are_few, inferring_few
from fastpeft_kernels.reference import lora_add_of_few

_LINEAR, _DROPOUTS, _PARAMETER = {nn.Linear}, {nn.Identity, nn.Dropout}, {nn.Parameter}
_is_meta, _dtype, _is_a_sum = attrgetter("is_meta"), attrgetter("dtype"), attrgetter("is_a_sum")


def adapter_parts(layer: Any, adapter: str) -> tuple[Tensor, Tensor, float] | str:
    """(weight of lora_A, weight of lora_B, dropout probability in force), or why the modules must be called."""
    modules = layer._modules
    A = modules["lora_A"]._modules.get(adapter)
    if A is None:
        return "not a linear layer"
    B, dropout = modules["lora_B"]._modules[adapter], modules["lora_dropout"]._modules[adapter]
    if B._parameters["bias"] is not None:
        return "lora_bias is set"
    if A._parameters.get("bias") is not None:
        return "lora_A has a bias"
    if not layer.cast_input_dtype_enabled:
        return "input dtype casting is switched off"
    kind = type(dropout)
    if kind is not nn.Identity and kind is not nn.Dropout:
        return f"lora_dropout is a {kind.__name__}"
    a, b = plain_weight("lora_A", A), plain_weight("lora_B", B)
    if isinstance(a, str):
        return a
    if isinstance(b, str):
        return b
    if a.dtype != b.dtype:
        return "lora_A and lora_B differ in dtype"
    by = watched_everywhere() or watched("lora_A", A) or watched("lora_B", B) or watched("lora_dropout", dropout)
    if by is not None:
        return by
    return a, b, dropout.p if kind is nn.Dropout and dropout.training else 0.0


class PlainFactors(NamedTuple):
    """Of adapters that ops may read: weights of lora_A and lora_B, dropout probabilities in force."""

    As: list[Tensor]
    Bs: list[Tensor]
    ps: list[float]


def plain_factors(layer: Any, adapters: Sequence[str]) -> PlainFactors | None:
    """`adapter_parts` of many adapters that are sums, in one dtype; None if any is another, or is not to be read.

    It looks at the same things, all adapters at a time: one by one, 64 of them take longer than their products.
    """
    modules = layer._modules
    As, Bs, dropouts = (
        list(map(modules[container]._modules.get, adapters)) for container in ("lora_A", "lora_B", "lora_dropout")
    )
    if {*map(type, As), *map(type, Bs)} != _LINEAR or not _DROPOUTS.issuperset(map(type, dropouts)):
        return None
    if watched_everywhere() or not layer.cast_input_dtype_enabled:
        return None
    if any_watched(chain(As, Bs, dropouts)):
        return None
    parameters = [module._parameters for module in chain(As, Bs)]
    weights: list[Any] = list(map(dict.get, parameters, repeat("weight")))
    if set(map(type, weights)) != _PARAMETER or any(map(_is_meta, weights)) or len(set(map(_dtype, weights))) > 1:
        return None
    if set(map(dict.get, parameters, repeat("bias"))) != {None}:
        return None
    if not all(map(_is_a_sum, map(layer.variants.__getitem__, adapters))):
        return None
    ps = [dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0 for dropout in dropouts]
    return PlainFactors(weights[: len(As)], weights[len(As) :], ps)


def fused_operands(layer: Any, adapters: Sequence[str], x_dtype: torch.dtype, autocast: bool) -> LoraOperands | str:
    """What the op that owns the base product takes for an input of this dtype, or why it is not the right one.

    Several adapters without dropout are one of the sum of their ranks.
    """
    base = base_parts(layer)
    if isinstance(base, str):
        return base
    parts = []
    for name in adapters:
        found = adapter_parts(layer, name)
        if isinstance(found, str):
            return found
        if (reason := layer.variants[name].obstacle(layer, name)) is not None:
            return reason  # type: ignore[no-any-return]
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
    if not all(layer.variants[name].is_a_sum for name in adapters):
        return "one of several adapters is DoRA, which scales what the others add"
    if len({A.dtype for A, _, _ in parts}) > 1:
        return "the adapters differ in dtype"
    if any(p for _, _, p in parts):
        return "several adapters with dropout take a mask each"
    A = torch.cat([A for A, _, _ in parts])
    B = torch.cat([B * layer.scaling[name] for name, (_, B, _) in zip(adapters, parts, strict=True)], dim=1)
    return LoraOperands(W, bias, A, B, 1.0)


def may_read_weights(layer: Any, adapter: str, x: Tensor) -> bool:
    """Whether base weight and factors may go to an op that only looks at them, for an input x of the layer."""
    weight = layer.get_base_layer()._parameters.get("weight")
    return type(weight) is nn.Parameter and is_ordinary(x) and not isinstance(adapter_parts(layer, adapter), str)


def fused_forward(layer: Any, adapters: Sequence[str], x: Tensor) -> Tensor | None:
    """Base product and adapters in one op: (..., N) in x's dtype. None where that op is not the right one.

    Layers that their parent calls on this x next are computed along with the first of them, and pick up what is theirs;
    not where decoding, bound by the host, has nothing to share.
    """
    group: InputGroup | None = layer.input_group
    shares = group is not None and group.is_on() and not inferring_few(x)
    name = group.name_of(layer) if group is not None and shares else None
    if group is not None and name is not None:
        out = group.take(name, x)
        if out is not None:
            return out
    if not is_ordinary(x):
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    operands = fused_operands(layer, adapters, x.dtype, autocast)
    if isinstance(operands, str):
        return None
    if not layer.variants[adapters[0]].is_a_sum:
        return layer.variants[adapters[0]].fused(layer, adapters[0], x, operands)  # type: ignore[no-any-return]
    if group is not None and name is not None:
        members = {name: operands} | _sharing(group, name, operands, x, autocast)
        if len(members) > 1:
            return group.keep(name, x, dict(zip(members, lora_group(x, list(members.values())), strict=True)))
    return lora_linear(x, *operands)


def _sharing(
    group: InputGroup, name: str, operands: LoraOperands, x: Tensor, autocast: bool
) -> dict[str, LoraOperands]:
    """The siblings that one op can compute along with the layer `name`."""
    if current_product() == "own":  # it takes layers one by one
        return {}
    found = {}
    for other, sibling in group.siblings(name, x):
        adapters = sibling.adapters_to_apply()
        if not adapters or not all(sibling.variants[adapter].is_a_sum for adapter in adapters):
            continue
        theirs = fused_operands(sibling, adapters, x.dtype, autocast)
        if isinstance(theirs, str):
            continue
        same_input = theirs.W.shape[1] == operands.W.shape[1] and theirs.W.device == operands.W.device
        if same_input and theirs.lora_A.dtype == operands.lora_A.dtype:
            found[other] = theirs
    return found


def add_low_rank(layer: Any, adapter: str, out: Tensor, x: Tensor) -> Tensor:
    """out + scaling · drop(x) Aᵀ Bᵀ: from the factors in out's dtype, or by the modules in the wider of both dtypes."""
    parts = adapter_parts(layer, adapter) if is_ordinary(x) and is_ordinary(out) else "not an ordinary tensor"
    if isinstance(parts, str):
        return out + layer.base.low_rank(layer, adapter, x)
    A, B, p = parts
    scale = layer.scaling[adapter]
    if are_few(x, out.shape[-1]) and not torch.is_autocast_enabled(x.device.type):
        return lora_add_of_few(out, x, A, B, scale, p)
    return lora_add(out, x, A, B, scale, p)


# For `fastpeft.explain`.


def path_of(layer: Any, adapters: Sequence[str]) -> tuple[str, str]:
    """(path, why not a better one) for these adapters on this layer."""
    for name in adapters:
        if isinstance(parts := adapter_parts(layer, name), str):
            return "plain", parts
    operands = fused_operands(layer, adapters, layer.get_base_layer().weight.dtype, autocast=False)
    if not isinstance(operands, str):
        return "fused", ""
    return "added" if all(layer.variants[name].is_a_sum for name in adapters) else "plain", operands


def sharing_siblings(layer: Any) -> tuple[str, ...]:
    """The siblings that are computed along with this layer when their parent calls them."""
    group: InputGroup | None = layer.input_group
    if group is None or not sharing_is_on() or (name := group.name_of(layer)) is None:
        return ()
    weight = layer.get_base_layer().weight
    adapters = layer.adapters_to_apply()
    if not all(layer.variants[adapter].is_a_sum for adapter in adapters):
        return ()
    operands = fused_operands(layer, adapters, weight.dtype, autocast=False)
    if isinstance(operands, str):
        return ()
    return tuple(_sharing(group, name, operands, weight.new_empty((1, weight.shape[1])), autocast=False))
