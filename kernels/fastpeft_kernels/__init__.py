"""Fused ops of fastpeft: each with a plain-torch reference, a Triton kernel, a custom op and its gradient."""

from fastpeft_kernels.dispatch import Backend, Product, backend, current_backend, current_product, product
from fastpeft_kernels.dora import dora_linear, dora_norm
from fastpeft_kernels.dropout import dropout
from fastpeft_kernels.lora import lora_add, lora_linear
from fastpeft_kernels.lora_group import LoraOperands, lora_group
from fastpeft_kernels.routed import expand_routed, lora_routed, shrink_routed
from fastpeft_kernels.routed_columns import gather_routed, scale_routed
from fastpeft_kernels.routed_group import RoutedOperands, lora_routed_group
from fastpeft_kernels.scale import scale_columns, scale_linear

__all__ = [
    "Backend",
    "LoraOperands",
    "Product",
    "RoutedOperands",
    "backend",
    "current_backend",
    "current_product",
    "dora_linear",
    "dora_norm",
    "dropout",
    "expand_routed",
    "gather_routed",
    "lora_add",
    "lora_group",
    "lora_linear",
    "lora_routed",
    "lora_routed_group",
    "product",
    "scale_columns",
    "scale_linear",
    "scale_routed",
    "shrink_routed",
]
