"""Who is measured: fastpeft and, where it is installed, reference PEFT. Both are used through the same public names."""

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

OURS, REFERENCE = "fastpeft", "peft"
FROZEN = "frozen"  # the floor: the same layer or model without an adapter, its input wanting a gradient


def is_ours(contender: str) -> bool:
    """Whether a contender is fastpeft, alone or in some mode: "fastpeft-compiled", "fastpeft+liger"."""
    return contender.startswith(OURS)


def available() -> dict[str, ModuleType]:
    """The libraries that are here, ours first. Where `peft` is only another name for us there is no reference."""
    found = {OURS: importlib.import_module(OURS)}
    if importlib.util.find_spec(REFERENCE):
        reference = importlib.import_module(REFERENCE)
        if reference is not found[OURS]:
            found[REFERENCE] = reference
    return found


def lora_layer(
    library: ModuleType,
    base: nn.Linear,
    *,
    r: int,
    dropout: float,
    alpha: float | None = None,
    fp32_adapters: bool = True,
    use_dora: bool = False,
) -> Any:
    """`base` in the library's LoRA layer, made by `get_peft_model`, in training mode. lora_B is random, not zero."""
    model = nn.Sequential()
    model.add_module("linear", base)
    config = library.LoraConfig(
        r=r, lora_alpha=alpha or 2 * r, target_modules=["linear"], lora_dropout=dropout, use_dora=use_dora
    )
    wrapped = library.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters).train()
    randomise_adapters(wrapped)
    return wrapped.base_model.model.linear


def lora_model(
    library: ModuleType, model: nn.Module, *, r: int, dropout: float, targets: list[str] | str = "all-linear"
) -> Any:
    """`model` with LoRA on `targets`, in training mode, adapters in fp32. lora_B is random, not zero."""
    config = library.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, lora_dropout=dropout)
    wrapped = library.get_peft_model(model, config).train()
    randomise_adapters(wrapped)
    return wrapped


def randomise_adapters(model: nn.Module, seed: int = 0) -> None:
    """Fill lora_A and lora_B with numbers that depend on the seed and the layers' order alone, not on the library.

    DoRA's magnitudes stay as they start, at the norms of the base weight.
    """
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.ndim > 1:
            generator = torch.Generator().manual_seed(seed)
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            with torch.no_grad():
                parameter.copy_(values)
            seed += 1


def adapter_weights(layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a layer's only adapter: {"lora_A": (r, K), "lora_B": (N, r)}."""
    kinds = ("lora_A", "lora_B")
    return {kind: p for kind in kinds for name, p in layer.named_parameters() if name.startswith(f"{kind}.")}


def frozen_linear(K: int, N: int, dtype: torch.dtype, device: str, seed: int = 0) -> nn.Linear:
    """A base layer as a model holds it: no bias, no gradient; the same numbers for the same seed and kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    linear = nn.Linear(K, N, bias=False, device="meta").to_empty(device=device)
    with torch.no_grad():
        linear.weight.copy_(torch.randn((N, K), generator=generator, device=device) * K**-0.5)
    return linear.to(dtype).requires_grad_(False)
