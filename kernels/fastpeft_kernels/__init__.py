"""Fused ops of fastpeft: each with a plain-torch reference, a Triton kernel, a custom op and its gradient."""

from fastpeft_kernels.dispatch import Backend, Product, backend, current_backend, current_product, product
from fastpeft_kernels.dora import dora_linear, dora_norm
from fastpeft_kernels.dropout import dropout
from fastpeft_kernels.lora import lora_add, lora_linear
from fastpeft_kernels.lora_group import LoraOperands, lora_group
from fastpeft_kernels.scale import scale_columns, scale_linear

__all__ = [
    "Backend",
    "LoraOperands",
    "Product",
    "backend",
    "current_backend",
    "current_product",
    "dora_linear",
    "dora_norm",
    "dropout",
    "lora_add",
    "lora_group",
    "lora_linear",
    "product",
    "scale_columns",
    "scale_linear",
]
