"""Fused ops of fastpeft: each with a plain-torch reference, a Triton kernel, a custom op and its gradient."""

from fastpeft_kernels.dispatch import Backend, backend, current_backend
from fastpeft_kernels.dora import dora_linear, dora_norm
from fastpeft_kernels.dropout import dropout
from fastpeft_kernels.lora import lora_add, lora_linear
from fastpeft_kernels.lora_group import LoraOperands, lora_group

__all__ = [
    "Backend",
    "LoraOperands",
    "backend",
    "current_backend",
    "dora_linear",
    "dora_norm",
    "dropout",
    "lora_add",
    "lora_group",
    "lora_linear",
]
