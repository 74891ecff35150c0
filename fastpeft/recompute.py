"""Keep less of an MLP for backward: what an activation function or a product made is computed again when it is needed.

Of the four wide tensors that a gated MLP, down(act(gate(x)) · up(x)), keeps for backward, two are elementwise functions
of the other two. While such a module's forward runs, tensors that autograd wants to keep are replaced by the node that
made them, and made again from what that node keeps itself: by the same operation on the same numbers, hence with the
same bits, and without a matrix product.
"""

import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import activation

from fastpeft.tuners.bases import is_linear
from fastpeft.utils.frames import has_ended
from fastpeft.utils.saved_tensors import Hooks, hooks_around, is_checkpoint

# Name of an autograd node -> its output from what it keeps. Nodes that keep their output (ReLU, tanh) are not here.
_AGAIN: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
}
# torch's activation modules, whose output is an elementwise function of their one input.
_ELEMENTWISE = tuple(
    getattr(activation, name)
    for name in activation.__all__
    if name not in ("MultiheadAttention", "GLU", "Softmin", "Softmax", "Softmax2d", "LogSoftmax")
)


def recompute_mlp(model: nn.Module, enabled: bool = True) -> int:
    """Let the MLPs of a model keep less for backward, at the price of their elementwise operations once more.

    An MLP is a module with an activation module (elementwise, of torch or of transformers) and at least two linear
    layers, adapted or not, as direct children.
    Gradients are the same to the bit. Under torch.compile nothing changes: the compiler decides itself what to compute
    again. May be called before or after adapters are put on the model, and together with gradient checkpointing.

    Args:
        model: changed in place.
        enabled: False takes it back.

    Returns:
        The number of MLPs found.

    Raises:
        ValueError: there is none in the model.
    """
    mlps = [module for module in model.modules() if _is_mlp(module)]
    if not mlps:
        raise ValueError(
            f"{type(model).__name__} has no MLP to recompute: expected modules with an activation module and at least "
            "two linear layers as direct children, as in models of the Llama family"
        )
    for module in mlps:
        for scope in [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]:
            if isinstance(scope, _Scope):
                scope.remove()
        if enabled:
            _Scope(module)
    return len(mlps)


def _is_mlp(module: nn.Module) -> bool:
    children = list(module.children())
    linears = sum(_is_linear(child) for child in children)
    return linears > 1 and any(_is_activation(child) for child in children)


def _is_linear(module: nn.Module) -> bool:
    return is_linear(getattr(module, "base_layer", module))


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, _ELEMENTWISE) or type(module).__module__ == "transformers.activations"


class _Thread(threading.local):
    """Of each running call of an MLP the frame, and the hooks that it pushed or None; innermost last."""

    def __init__(self) -> None:
        self.entered: list[tuple[FrameType, Any]] = []

    def leave(self) -> None:
        _, hooks = self.entered.pop()
        if hooks is not None:
            hooks.__exit__(None, None, None)

    def leave_interrupted(self) -> None:
        """Leave calls that ended without a word: modules call no hook after a KeyboardInterrupt."""
        while self.entered and has_ended(self.entered[-1][0]):
            self.leave()


_thread = _Thread()  # of all MLPs: a model that holds it could not be copied or pickled


class _Scope:
    """Replaces what autograd keeps while one module's forward runs."""

    def __init__(self, module: nn.Module) -> None:
        self.handles = (
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(self.leave, always_call=True),
        )

    def enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        _thread.leave_interrupted()
        hooks = None
        around = hooks_around()  # which autograd calls no longer: ours hand on what is not made again
        # a checkpoint keeps nothing at all, and hands out what it computes again once
        if torch.is_grad_enabled() and not is_checkpoint(around) and _hooks_allowed():
            hooks = torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, around), _unpack)
            hooks.__enter__()
        _thread.entered.append((sys._getframe(1), hooks))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and _thread.entered:
            _thread.leave()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _hooks_allowed() -> bool:
    """Neither inside a functional transform, nor where somebody switched hooks on saved tensors off."""
    disabled = getattr(torch._C._autograd, "_saved_tensors_hooks_get_disabled_error_message", lambda: None)
    return not torch._C._are_functorch_transforms_active() and disabled() is None


class _Kept:
    """A tensor as it was: autograd leaves it to hooks to notice that it was changed since.

    Detached, because a node's own output would keep the node alive, in a circle that no collector sees.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} {tuple(self.tensor.shape)} is at version {self.tensor._version}; expected "
                f"version {self.version} instead"
            )
        return self.tensor


class _Around:
    """What the hooks outside made of a tensor."""

    def __init__(self, hooks: Hooks, tensor: Tensor) -> None:
        pack, self.unpack = hooks
        self.packed = pack(tensor)


class _Recipe:
    """Stands for a tensor of this shape that `node` can make again."""

    def __init__(self, node: Any, shape: torch.Size) -> None:
        self.node, self.shape = node, shape


def _pack(around: Hooks | None, tensor: Tensor) -> _Kept | _Recipe | _Around:
    _thread.leave_interrupted()  # then this one tensor is the last
    recipe = _recipe_for(tensor)
    if recipe is not None:
        return recipe
    return _Kept(tensor) if around is None else _Around(around, tensor)


def _recipe_for(tensor: Tensor) -> _Recipe | None:
    source = tensor if tensor._base is None else tensor._base  # a layer flattens its rows before it keeps them
    node = source.grad_fn
    if node is None or node.name() not in _AGAIN or source._version:
        return None
    if node.name() == "MulBackward0" and any(function is None for function, _ in node.next_functions):
        return None  # with a factor that needs no gradient, the node does not keep the other one
    whole = source.is_contiguous() and tensor.is_contiguous() and source.numel() == tensor.numel()
    return _Recipe(node, tensor.shape) if whole and source.dtype == tensor.dtype else None


def _unpack(kept: _Kept | _Recipe | _Around) -> Tensor:
    if isinstance(kept, _Around):
        return kept.unpack(kept.packed)
    if isinstance(kept, _Recipe):
        with torch.no_grad():
            return _AGAIN[kept.node.name()](kept.node).view(kept.shape)
    return kept.get()
