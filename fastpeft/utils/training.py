"""Preparing a base model for training: dtypes, checkpointing, and how FSDP should cut it."""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def infer_device() -> str:
    """The kind of accelerator this machine trains on: "cuda", "xpu", "mps", "npu", "mlu", or "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a base model and make the parts that stay in 16 bits fp32, before adapters are put on it.

    As in PEFT, gradient checkpointing is switched on for quantised models only: a plain model's is its own business.

    Args:
        model: a transformers model; changed in place.
        use_gradient_checkpointing: for a quantised model, recompute activations in the backward.
        gradient_checkpointing_kwargs: passed on to the model's own method. Unless they say use_reentrant=False, the
            embedding's output is made to require grad: reentrant checkpointing needs that of its input.
        auto_clear_cache: give the memory of the 16-bit copies back to the device.

    Returns:
        The same model.
    """
    method = getattr(model, "quantization_method", None)
    in_kbit = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    has_packed_weights = method in ("gptq", "aqlm", "eetq", "torchao", "hqq") or getattr(model, "hqq_quantized", False)

    model.requires_grad_(False)
    if not has_packed_weights:
        for parameter in model.parameters():
            is_packed = type(parameter).__name__ == "Params4bit"
            if parameter.dtype in (torch.float16, torch.bfloat16) and not is_packed:
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    if use_gradient_checkpointing and (in_kbit or has_packed_weights):
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
            model.enable_input_require_grads()
        new_name = getattr(model, "activation_checkpointing_enable", None)  # of the method below, in later releases
        (new_name or model.gradient_checkpointing_enable)(gradient_checkpointing_kwargs)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters to `dtype`, trainable ones to fp32: what training under autocast wants. In place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """Decoder inputs from labels: one step to the right, the start token first, ignored labels (-100) padded.

    Args:
        input_ids: (B, T) int64.

    Returns:
        (B, T) int64, a new tensor.
    """
    if pad_token_id is None:
        raise ValueError("pad_token_id is None: set model.config.pad_token_id, it replaces the ignored labels (-100)")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """A policy for FullyShardedDataParallel: each decoder layer is a unit, and each trainable leaf is one of its own.

    FSDP (version 1) flattens a unit's parameters into one tensor, which cannot be half frozen: hence the leaves.
    The layer classes are the model's `_no_split_modules`; the environment variable FSDP_TRANSFORMER_CLS_TO_WRAP
    (comma separated) overrides them.

    Raises:
        TypeError: a class of that name is not in the model.
    """
    from accelerate.utils.dataclasses import get_module_class_from_name
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    default = ",".join(getattr(model, "_no_split_modules", None) or ())
    names = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", default).split(",") if name]
    classes = {name: get_module_class_from_name(model, name) for name in names}
    missing = sorted(name for name, found in classes.items() if found is None)
    if missing:
        raise TypeError(
            f"no module of class {', '.join(missing)} in {type(model).__name__}: set FSDP_TRANSFORMER_CLS_TO_WRAP to "
            "the class names of its decoder layers"
        )

    def is_trainable_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return next(module.children(), None) is None and weight is not None and weight.requires_grad

    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trainable_leaf)
    layers = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=set(classes.values()))
    return functools.partial(_or_policy, policies=[leaves, layers])
