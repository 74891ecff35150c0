"""A mixed batch: the `adapter_names` that a model is given, and how generation repeats its rows."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastpeft.routing import BASE, Routing, as_routing, check_names
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
    beams, sequences = _repeats_of_rows(options)
    if max(beams, sequences) > 1:
        if routing is not adapter_names:  # a Routing is for whatever rows its maker says
            _check_prompts(routing, model, options, beams, sequences)
        routing = routing.expanded(beams, sequences)
    _reach_checkpoints(model)
    with entered(routing, model):
        yield


def _reach_checkpoints(model: nn.Module) -> None:
    # Elsewhere nothing is recomputed, unless a model switches gradients on inside; and a walk is long for one token.
    if torch.is_grad_enabled() or model.training:
        carry_through_checkpoints(all_modules(model, outside_of_adapters))


def outside_of_adapters(part: nn.Module) -> Iterable[nn.Module | None]:
    """The modules below this one, but for those of adapters, of which there may be thousands."""
    return (part.base_layer,) if isinstance(part, BaseTunerLayer) else part._modules.values()


def _check_prompts(routing: Routing, model: nn.Module, options: Mapping[str, Any], beams: int, sequences: int) -> None:
    """Raise unless a list has a name per prompt: with more, the beams of one prompt would take different adapters.

    Layers cannot tell. They see every prompt once (an encoder), or once a beam.
    """
    prompts = _count_prompts(model, options)
    rows = {prompts} if beams > 1 else {prompts, prompts * sequences}  # without beams also one for each answer
    if prompts and len(routing.entries) not in rows:
        also = "" if len(rows) == 1 else f" (or {prompts * sequences}, one per returned sequence)"
        raise ValueError(
            f"adapter_names needs one name per prompt: expected {prompts} names{also}, got {len(routing.entries)}. The "
            f"{max(beams, sequences)} rows that generation makes of a prompt take its adapter; prompts that should "
            f"take none are named {BASE!r}."
        )


def _count_prompts(model: nn.Module, options: Mapping[str, Any]) -> int:
    """The rows that a generation is called with; 0 where that is not said in a way that is known here."""
    names = ("inputs", "input_ids", "inputs_embeds", getattr(model, "main_input_name", ""), "encoder_outputs")
    given = [value for name in names if (value := options.get(name)) is not None]
    if not given:
        return 0
    rows = given[0] if isinstance(given[0], torch.Tensor) else given[0][0]  # encoder_outputs begin with a tensor
    return len(rows)


def _repeats_of_rows(options: Mapping[str, Any]) -> tuple[int, int]:
    """Beams, and returned sequences: the model may see a row of a batch that it generates for so often."""
    configs = [options.get("generation_config"), options.get("model_config")]
    repeats = []
    for option in ("num_beams", "num_return_sequences"):
        said = [options.get(option), *(getattr(config, option, None) for config in configs)]
        repeats.append(next((value for value in said if value is not None), 1))
    return repeats[0], repeats[1]
