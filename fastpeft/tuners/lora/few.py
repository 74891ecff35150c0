"""A LoRA layer on a few rows, as in decoding and on small batches: bound by Python and by torch's operators.

The same decision as in fastpeft.tuners.lora.fused, in one function for the one case that every token pays for: a plain
adapter on an nn.Linear, on the torch path, or inferring on a GPU whose backend is not demanded. It looks at all that
the eligibility rule looks at, and leaves whatever is not exactly this case to the others. Gradients are torch's own
then, see `are_few`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.tuners.eligibility import any_watched, is_ordinary, watched_everywhere
from fastpeft_kernels.dispatch import are_few, inferring_few
from fastpeft_kernels.reference import lora_add_of_few, lora_linear_of_few

_PARAMETERS = {nn.Parameter}
_DROPOUTS = {nn.Identity, nn.Dropout}


def forward_of_few(layer: Any, x: Tensor) -> Tensor | None:
    """The layer's output with its one active adapter, (..., N) in x's dtype; None where this is not the case."""
    decodes = inferring_few(x)
    if not (decodes or _trains_few(layer, x)) or not is_ordinary(x) or watched_everywhere():
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    own = layer.__dict__  # the tables themselves: attributes of modules are slow, and cold code as well
    active, modules = own["_active_adapter"], own["_modules"]
    name = active[0] if len(active) == 1 and type(active) is list else None
    if name not in own["r"] or layer._disable_adapters or own["merged_adapters"] or not layer.cast_input_dtype_enabled:
        return None
    base, A, B = modules["base_layer"], modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
    dropout = modules["lora_dropout"]._modules[name]
    if not type(base) is type(A) is type(B) is nn.Linear or type(dropout) not in _DROPOUTS:
        return None
    if any_watched((base, A, B, dropout)):
        return None
    bias: Any = base._parameters["bias"]
    W: Any = base._parameters["weight"]
    a: Any = A._parameters["weight"]
    b: Any = B._parameters["weight"]
    if (
        {type(W), type(a), type(b)} != _PARAMETERS
        or A._parameters["bias"] is not None
        or B._parameters["bias"] is not None
        or not own["variants"][name].is_a_sum
    ):
        return None
    dtype = x.dtype
    if W.dtype != dtype or a.dtype != b.dtype or (a.dtype != dtype and a.dtype != torch.float32):
        return None
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype != dtype):
        return None
    scale = own["scaling"][name]
    if not (own["training"] or dropout.training or torch.is_grad_enabled()):
        return lora_linear_of_few(x, W, bias, a, b, scale) if decodes else None
    if decodes and not _trains_few(layer, x):
        return None
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    # not in place: the base's output may be a view, or be kept by a checkpoint
    return lora_add_of_few(F.linear(x, W, bias), x, a, b, scale, p)


def _trains_few(layer: Any, x: Tensor) -> bool:
    """Whether training leaves this input to torch's own gradients: that of all layers who share it, or of none."""
    group = layer.input_group
    return are_few(x, layer.out_features if group is None else group.columns)
