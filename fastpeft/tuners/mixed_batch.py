"""A mixed batch: the `adapter_names` that a model is given, and how generation repeats its rows."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastpeft.routing import as_routing, check_names
from fastpeft.routing_scope import carry_through_checkpoints, entered, is_routed
from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.utils.walks import all_modules


@contextmanager
def following(model: nn.Module, known: Collection[str], options: Mapping[str, Any]) -> Iterator[None]:
    """While this context lasts, the layers of the model follow `options["adapter_names"]`, if there is such a thing.

    Args:
        known: the model's adapters.
        options: keyword arguments of a forward or a generation: see `BaseTuner._enable_peft_forward_hooks`.
    """
    adapter_names = options.get("adapter_names")
    if adapter_names is None:
        if is_routed():  # by a block of the user's
            _reach_checkpoints(model)
        yield
        return
    routing = as_routing(adapter_names)
    check_names(routing, known)
    if repeats := _repeats_of_rows(options):
        routing = routing.expanded(*repeats)
    _reach_checkpoints(model)
    with entered(routing, model):
        yield


def _reach_checkpoints(model: nn.Module) -> None:
    # Elsewhere nothing is recomputed, unless a model switches gradients on inside; and a walk is long for one token.
    if torch.is_grad_enabled() or model.training:
        carry_through_checkpoints(all_modules(model, _outside_of_adapters))


def _outside_of_adapters(part: nn.Module) -> Iterable[nn.Module | None]:
    """The modules below this one, but for those of adapters, of which there may be thousands."""
    return (part.base_layer,) if isinstance(part, BaseTunerLayer) else part._modules.values()


def _repeats_of_rows(options: Mapping[str, Any]) -> set[int]:
    """How often the model may see a row of a batch that it generates for: once a beam, or a returned sequence."""
    configs = [options.get("generation_config"), options.get("model_config")]
    repeats = set()
    for option in ("num_beams", "num_return_sequences"):
        said = [options.get(option), *(getattr(config, option, None) for config in configs)]
        repeats.add(next((value for value in said if value is not None), 1))
    return repeats - {1}
