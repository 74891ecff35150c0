"""The routing in force: who entered it, which layers follow it, and how it gets through activation checkpoints."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from fastpeft.routing import Routing
from fastpeft.utils.saved_tensors import Hooks, hooks_around, in_backward, is_checkpoint


class _Entered(NamedTuple):
    """A routing in force, and what was around where it was entered."""

    routing: Routing | None
    model: nn.Module | None  # whose forward entered it; None for a block of the user's
    recorded: bool  # whether gradients were recorded
    hooks: Hooks | None  # on what autograd saves
    call: object | None = None  # of `generate` that nobody attends


class _Current(threading.local):
    entered = _Entered(None, None, False, None)


_current = _Current()
_any_unrecorded = False
_unrecorded: WeakSet[nn.Module] = WeakSet()  # layers that followed a routing where a checkpoint may have hidden it


@contextmanager
def routed(routing: Routing | None) -> Iterator[None]:
    """In this block of code every tuner layer that this thread calls follows `routing`; with None, none."""
    with entered(routing, None):
        yield


@contextmanager
def entered(routing: Routing | None, model: nn.Module | None) -> Iterator[None]:
    """`routed`, for the forward of this model: other models that it calls are none of its rows' business."""
    before = _current.entered
    hooks = None if torch.compiler.is_compiling() else hooks_around()
    _current.entered = _Entered(routing, model, torch.is_grad_enabled(), hooks)
    try:
        yield
    finally:
        _current.entered = before


@contextmanager
def unattended() -> Iterator[None]:
    """In this block nothing that this thread runs changes an adapter, under the routing in force."""
    before = _current.entered
    _current.entered = before._replace(call=object())
    try:
        yield
    finally:
        _current.entered = before


def unattended_call() -> object | None:
    """Which block of `unattended` this is; None outside of them."""
    return _current.entered.call


def is_routed() -> bool:
    """Whether a routing is in force in this thread."""
    return _current.entered.routing is not None


def is_anothers(model: nn.Module) -> bool:
    """Whether the routing in force is that of another model's forward, inside which this one is called."""
    entry = _current.entered
    return entry.routing is not None and entry.model is not None and entry.model is not model


def routing_for(layer: nn.Module) -> Routing | None:
    """The routing that a layer, about to compute, has to follow.

    Raises:
        RuntimeError: an activation checkpoint that knows nothing of it will run, or runs, this forward once more.
    """
    global _any_unrecorded
    entry = _current.entered
    routing = entry.routing
    if routing is None and not _any_unrecorded:  # as for every token of a model that was never routed
        return None
    if torch.compiler.is_compiling():
        return routing
    if routing is None:
        if layer in _unrecorded:
            if not in_backward():
                _unrecorded.discard(layer)  # it is called without a routing: a recomputation would be one without, too
            elif torch.is_grad_enabled():
                raise RuntimeError(_UNKNOWN_CHECKPOINT)
    elif torch.is_grad_enabled():
        hooks = hooks_around()
        if is_checkpoint(hooks) and (entry.hooks is None or hooks[0] is not entry.hooks[0]):  # type: ignore[index]
            raise RuntimeError(_UNKNOWN_CHECKPOINT)
    elif entry.recorded:
        _unrecorded.add(layer)  # a reentrant checkpoint, or a part of the model that is not trained
        _any_unrecorded = True
    return routing


_UNKNOWN_CHECKPOINT = (
    "adapter_names cannot reach the recomputation of an activation checkpoint that the model makes by itself: pass "
    "adapter_names to a PeftModel whose checkpointing was switched on by its gradient_checkpointing_enable(), or "
    "switch checkpointing off"
)


def carry_through_checkpoints(modules: Iterable[nn.Module]) -> None:
    """Let transformers' own checkpoints, where these modules have one, bring the routing back when they recompute."""
    for module in modules:
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is None or getattr(checkpoint, "func", None) is _checkpoint_routed:
            continue
        module._gradient_checkpointing_func = partial(_checkpoint_routed, checkpoint)  # type: ignore[assignment]


def _checkpoint_routed(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    entry = _current.entered
    if entry.routing is None:
        return checkpoint(function, *args, **kwargs)
    if torch.compiler.is_compiling():  # which traces both times at once
        with entry.routing.closed(args[0] if args else None):
            return checkpoint(function, *args, **kwargs)
    again = partial(_run_routed, entry.routing, entry.routing.fills, entry.model, function)
    return checkpoint(again, *args, **kwargs)


def _run_routed(
    routing: Routing, fills: int, model: nn.Module | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if routing.fills != fills:
        raise RuntimeError("this routing was refilled between a forward and its backward: refill it after the backward")
    with entered(routing, model):
        return function(*args, **kwargs)
