"""Calls of `generate` in which nobody's code but the libraries' own runs between two tokens.

A layer that decodes a mixed batch asks for every token whether its adapters are what they were. While such a call runs
they can be changed by another thread alone; so it asks once a call, and what that thread writes into modules by hand
is seen from the next call on.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from fastpeft.routing_scope import is_routed, unattended
from fastpeft.tuners.mixed_batch import outside_of_adapters
from fastpeft.utils.walks import all_modules

# What may call code of the user's, beside anything that can be called.
_ATTENDING = {
    "assistant_model",
    "custom_generate",
    "logits_processor",
    "past_key_values",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
}


def left_alone(model: nn.Module, args: Sequence[Any], options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """The context of a call model.generate(*args, **options) under a routing: `unattended` where it is."""
    if not is_routed() or len(args) > 2:  # beyond inputs and generation_config
        return nullcontext()
    attended = any(options.get(name) is not None for name in _ATTENDING) or any(map(callable, options.values()))
    return nullcontext() if attended or not _generates_as_transformers(model) or _is_hooked(model) else unattended()


def _generates_as_transformers(model: Any) -> bool:
    from transformers import GenerationMixin

    return type(model).generate is GenerationMixin.generate and "generate" not in vars(model)


def _is_hooked(model: nn.Module) -> bool:
    """Whether code that is not ours hangs on a module; those of the adapters look after themselves."""
    for module in all_modules(model, outside_of_adapters):
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) or not all(map(_is_ours, hooks)):
            return True
    return False


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("fastpeft.")
