"""Fused ops of fastpeft: each with a plain-torch reference, a Triton kernel, a custom op and its gradient."""

from fastpeft_kernels.dispatch import Backend, backend, current_backend
from fastpeft_kernels.dropout import dropout
from fastpeft_kernels.lora import lora_add, lora_linear
from fastpeft_kernels.lora_group import LoraOperands, lora_group
from fastpeft_kernels.scale import scale_columns, scale_linear

__all__ = [
    "Backend",
    "LoraOperands",
    "backend",
    "current_backend",
    "dropout",
    "lora_add",
    "lora_group",
    "lora_linear",
    "scale_columns",
    "scale_linear",
]
