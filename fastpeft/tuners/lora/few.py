"""A LoRA layer on a few rows, as in decoding and on small batches: bound by Python and by torch's operators.

The same decision as in fastpeft.tuners.lora.fused, in one function for the one case that every token pays for: a plain
adapter on an nn.Linear, on the torch path. It looks at all that the eligibility rule looks at, and leaves whatever is
not exactly this case to the others. Gradients are torch's own then: the passes that our backward saves are worth less
than its Python, and so is the memory (a copy of x in the adapter's dtype; with dropout two more).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.tuners.eligibility import any_watched, is_ordinary, watched_everywhere
from fastpeft_kernels.dispatch import current_product, use_triton
from fastpeft_kernels.low_rank import FEW_ROWS
from fastpeft_kernels.reference import lora_linear_of_few, trained_lora_linear_of_few

FEW_ELEMENTS = (
    1 << 17
)  # of x and of the output; K = N = 512 and 1024, with and without dropout: even there, ahead below

_PARAMETERS = {nn.Parameter}
_DROPOUTS = {nn.Identity, nn.Dropout}


def forward_of_few(layer: Any, x: Tensor) -> Tensor | None:
    """The layer's output with its one active adapter, (..., N) in x's dtype; None where this is not the case."""
    if not _are_few(x) or not is_ordinary(x) or watched_everywhere() or torch.is_autocast_enabled(x.device.type):
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
    if not own["training"] and not torch.is_grad_enabled() and not dropout.training:
        return lora_linear_of_few(x, W, bias, a, b, scale)
    # A checkpoint runs this without gradients first, then with them: it must come here both times, to the same draws.
    if x.numel() > FEW_ELEMENTS or x.numel() // x.shape[-1] * W.shape[0] > FEW_ELEMENTS:
        return None
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return trained_lora_linear_of_few(x, W, bias, a, b, scale, p)


def _are_few(x: Tensor) -> bool:
    """Whether x is no larger than this pays for, on the torch path."""
    if torch.compiler.is_compiling() or current_product() == "own" or use_triton(x):
        return False
    size = x.numel()
    return size <= FEW_ELEMENTS or size <= FEW_ROWS * x.shape[-1]
