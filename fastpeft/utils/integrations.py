"""What the library asks of accelerate and DeepSpeed: weights on the meta device, offloaded or sharded weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights as _init_empty_weights
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from accelerate.utils import named_module_tensors
from torch import nn


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Parameters (buffers too, when asked) that are registered inside go to the meta device: shape, no memory."""
    with _init_empty_weights(include_buffers=include_buffers):
        yield


def check_deepspeed_zero3_enabled() -> bool:
    """Whether DeepSpeed ZeRO stage 3 is on: parameters are then empty outside `gather_params_ctx`."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def gather_params_ctx(
    params: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Whole parameters under DeepSpeed ZeRO stage 3; nothing to do otherwise."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(params, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The accelerate hook that keeps this module's weights elsewhere between its forwards, if there is one."""
    hook: ModelHook | None = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Bring the offloaded weights of a tuner layer to their execution device, and offload them again afterwards.

    What changed meanwhile (a merge) is kept. A base weight that was offloaded to disk lives in CPU memory from then
    on: the file is the user's and is not rewritten.
    """
    offloaded = [
        (module, hook)
        for name, module in layer.named_modules()
        if name and (hook := offload_hook(module)) is not None  # the layer's own hook does not hold its children's
    ]
    for module, hook in offloaded:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in offloaded:
            tensors = named_module_tensors(module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules)
            hook.weights_map = {name: tensor.detach().to("cpu") for name, tensor in tensors}
            hook.post_forward(module, torch.empty(0))
