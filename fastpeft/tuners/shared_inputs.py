"""Which adapted layers are called on one tensor, one after the other: q, k and v, or gate and up.

Found in the source of the module that calls them (shared_calls.py). An `InputGroup` acts on what it says only while the
parent's forward runs and both layers are really handed the same tensor, unchanged. Where torch counts changes, a wrong
hint costs time and nothing else. Where it does not, in inference mode and while compiling, only layers are computed
together of which the source is sure. A layer that the parent itself changes between the calls (its weights, say) has
been computed by then: that counts from the parent's next forward on.
"""

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.tuners.bases import Conv1D, is_linear
from fastpeft.tuners.shared_calls import calls_on_one_variable
from fastpeft.utils.frames import has_ended
from fastpeft.utils.saved_tensors import hooks_around, is_checkpoint


def _switch(value: str | None) -> bool:
    if value not in (None, "", "0", "1"):
        raise ValueError(f"FASTPEFT_SHARE_INPUTS must be 0 or 1; got {value!r}")
    return value != "0"


_enabled = _switch(os.environ.get("FASTPEFT_SHARE_INPUTS"))


@contextmanager
def share_inputs(enabled: bool) -> Iterator[None]:
    """Let layers that are called on one tensor be computed together, or not, in this block of code and every thread.

    On by default; FASTPEFT_SHARE_INPUTS=0 in the environment switches it off for a process. The results are the same up
    to rounding, and dropout draws the same masks in another order.
    """
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def sharing_is_on() -> bool:
    """Whether layers may be computed together: what `share_inputs` and the environment say."""
    return _enabled


@dataclass(frozen=True)
class _Together:
    """Outputs that one op computed for several layers, each kept until its layer is called."""

    x: Tensor
    version: int | None
    mode: tuple[Any, ...]
    outs: dict[str, Tensor]


def _version(x: Tensor) -> int | None:
    """How often x was changed in place; None where nobody counts, or where the compiler cannot read it."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What must be the same when an output is computed and when it is picked up, beside x."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled(), autocast
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None  # another one would have to wait
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, threading.get_ident(), stream


def _recording() -> tuple[bool, bool]:
    """Whether gradients are recorded, and whether a checkpoint will run this code once more for them.

    A parent that checkpoints a part of itself runs that part again when its forward is over: the part cannot share.
    """
    if not torch.is_grad_enabled():  # of many tokens, each of which pays for the look
        return False, False
    return True, not torch.compiler.is_compiling() and is_checkpoint(hooks_around())


def _without_checks(function: Callable[..., None], *args: Any) -> None:
    """Call a function that changes objects from outside an activation checkpoint, while the compiler traces one.

    The compiler refuses, because the recomputation does not repeat such changes. Those of a group are undone within the
    checkpoint, at the end of the parent's forward. Dynamo knows this function by identity; it only calls its argument.
    """
    torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(function, *args)


def _handled(layer: nn.Module) -> bool:
    """Whether the layer may be handed another tensor than its parent passes."""
    hooked = layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooked) or "forward" in layer.__dict__


class InputGroup:
    """Layers of one parent that its forward calls on one tensor.

    What the first of them that is called computes for the others is kept until they are called, and at most until the
    parent's forward ends.

    Attributes:
        parent: the module that calls them.
        names: their names in it.
        sure: those of them that the parent calls on an unchanged tensor for sure, one right after the other.
        columns: of the widest output.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...], sure: frozenset[str]) -> None:
        self.parent, self.names, self.sure = parent, names, sure
        layers: list[Any] = [parent._modules[name] for name in names]
        self.columns: int = max(layer.out_features for layer in layers)
        self._is_open = False
        self._recording = (False, False)
        self._together: _Together | None = None
        self._call: FrameType | None = None  # of the parent's forward that is running
        self._handles: tuple[Any, ...] = (
            parent.register_forward_pre_hook(self._open),
            parent.register_forward_hook(self._close, always_call=True),
        )
        for layer in layers:
            layer.input_group = self

    def is_on(self) -> bool:
        """Whether the parent's forward is running, and no part of it by itself; and sharing is not switched off."""
        if not (self._is_open and _enabled):
            return False
        if not torch.compiler.is_compiling() and self._call is not None and has_ended(self._call):
            self._close(self.parent, (), None)  # nobody told: a KeyboardInterrupt
            return False
        return _recording() == self._recording

    def name_of(self, layer: nn.Module) -> str | None:
        """The layer's name in the parent; None for one that has left its place there, for a copy, and for one whose
        input or output somebody else has a hand on."""
        if _handled(layer):
            return None
        for name in self.names:
            if self.parent._modules.get(name) is layer:
                return name
        return None

    def siblings(self, name: str, x: Tensor) -> list[tuple[str, Any]]:
        """The other layers that are called on x next; none of those that somebody else has a hand on."""
        together, names = self._together, self.names
        if _version(x) is None:
            names = tuple([other for other in names if other in self.sure])
            members: Any = [self.parent._modules.get(other) for other in names]
            if name not in names or any(member is None or member._forward_hooks for member in members):
                return []
        elif together is not None and together.x is x and together.outs:
            return []  # they were computed, and this one is called a second time
        found = []
        for other in names:
            layer: Any = self.parent._modules.get(other)
            if other == name or getattr(layer, "input_group", None) is not self:
                continue
            if not _handled(layer):
                found.append((other, layer))
        return found

    def keep(self, name: str, x: Tensor, outs: dict[str, Tensor], adapters: Any = None) -> Tensor:
        """Keep what was computed on x for the others; returns the output of the layer `name`.

        Args:
            adapters: who they were computed for: None for the active ones, else what `take` compares.
        """
        out = outs.pop(name)
        self._remember(True, _Together(x, _version(x), (*_mode(x), adapters), outs))
        return out

    def take(self, name: str, x: Tensor, adapters: Any = None) -> Tensor | None:
        """What was computed for the layer `name`, once, if it is called on the same x under the same circumstances."""
        together = self._together
        if together is None or x is not together.x or _version(x) != together.version:
            return None
        if (*_mode(x), adapters) != together.mode:
            return None
        return together.outs.pop(name, None)

    def dissolve(self) -> None:
        """Take the hooks off the parent; its layers are each for themselves again."""
        for handle in self._handles:
            handle.remove()
        for name in self.names:
            layer: Any = self.parent._modules.get(name)
            if getattr(layer, "input_group", None) is self:
                layer.input_group = None

    def _open(self, parent: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._call = sys._getframe(1)
        self._remember(parent is self.parent, None)

    def _close(self, parent: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._call = None
        self._remember(False, None)

    def _remember(self, is_open: bool, together: _Together | None) -> None:
        if torch.compiler.is_compiling():
            _without_checks(self._set, is_open, together)
        else:
            self._set(is_open, together)

    def _set(self, is_open: bool, together: _Together | None) -> None:
        if is_open and together is None:
            self._recording = _recording()
        self._is_open, self._together = is_open, together

    def __getstate__(self) -> dict[str, Any]:
        """Closed, whatever runs: a frame cannot be pickled."""
        return {**self.__dict__, "_is_open": False, "_together": None, "_call": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "InputGroup | None":
        """The copied parent's own group; None where a layer is copied without its parent."""
        parent = memo.get(id(self.parent))
        if parent is None:
            return None
        group = memo[id(self)] = InputGroup.__new__(InputGroup)
        group.parent, group.names, group.sure = parent, self.names, self.sure
        group._is_open, group._together = False, None
        group.columns, group._recording, group._call = self.columns, (False, False), None
        group._handles = copy.deepcopy(self._handles, memo)
        return group


def regroup(model: nn.Module, layer_cls: type[nn.Module]) -> None:
    """Find the groups of all layers of a class anew: after layers came or went."""
    dissolve_groups(model)
    for parent in list(model.modules()):
        kind: Any = type(parent)
        adapted = {name for name, child in parent._modules.items() if isinstance(child, layer_cls)}
        if len(adapted) < 2:
            continue
        runs = calls_on_one_variable(kind)
        sure = [adapted.intersection(run.names) for run in runs if run.is_sure and _are_linear(parent, run.names)]
        for run in runs:
            for present in () if run.is_sure else _runs(parent, run.names, adapted):
                adapted.difference_update(present)  # a layer is in one group only
                best = max((part & set(present) for part in sure), key=len, default=set())
                InputGroup(parent, present, frozenset(best))


def _are_linear(parent: nn.Module, names: Iterable[str]) -> bool:
    """Whether all of them are linear layers, adapted or not: what others return may be the memory of their input."""
    layers = [parent._modules.get(name) for name in names]
    return all(type(getattr(layer, "base_layer", layer)) in (nn.Linear, Conv1D) for layer in layers)


def _runs(parent: nn.Module, names: tuple[str, ...], adapted: set[str]) -> Iterator[tuple[str, ...]]:
    """The adapted ones of these names, parted where a module is called in between that might change its input."""
    run: list[str] = []
    for name in (*names, ""):
        if name in adapted:
            run.append(name)
        elif (between := parent._modules.get(name)) is None or not is_linear(between):
            if len(run) > 1:
                yield tuple(run)
            run = []


def dissolve_groups(model: nn.Module) -> None:
    """Take all groups of a model apart."""
    for module in model.modules():
        group: Any = getattr(module, "input_group", None)
        if isinstance(group, InputGroup):
            group.dissolve()
