"""What Trainer asks of all modules in every step, without the detours of nn.Module.

An adapted layer is ten small modules and more. nn.Module sets `training` through __setattr__, and finds parameters by
way of names that nobody asked for.
"""

from collections.abc import Callable, Iterable, Iterator

from torch import nn


def set_mode_below(module: nn.Module, mode: bool) -> None:
    """`train(mode)` of all modules below this one. Those that have a say in it are asked."""
    waiting = list(module.children())
    while waiting:
        child = waiting.pop()
        kind = type(child)
        if kind.train is nn.Module.train and kind.__setattr__ is nn.Module.__setattr__:
            child.__dict__["training"] = mode
            waiting += [grandchild for grandchild in child._modules.values() if grandchild is not None]
        else:
            child.train(mode)


def forget_gradients(module: nn.Module) -> None:
    """`zero_grad(set_to_none=True)` of a module and all below it."""
    for part in all_modules(module):
        for parameter in part._parameters.values():
            if parameter is not None and parameter.grad is not None:
                parameter.grad = None


def _children(part: nn.Module) -> Iterable[nn.Module | None]:
    return part._modules.values()


def all_modules(
    module: nn.Module, children: Callable[[nn.Module], Iterable[nn.Module | None]] = _children
) -> Iterator[nn.Module]:
    """A module and all below it, each once, in no promised order; below a module are its `children`."""
    seen, waiting = {id(module)}, [module]
    while waiting:
        part = waiting.pop()
        yield part
        for child in children(part):
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
