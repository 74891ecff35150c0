"""What Trainer asks of all modules in every step, without the detours of nn.Module.

An adapted layer is ten small modules and more. nn.Module sets `training` through __setattr__, and finds parameters by
way of names that nobody asked for.
"""

from collections.abc import Callable, Iterable, Iterator

from torch import nn


def set_mode_below(module: nn.Module, mode: bool) -> None:
    """`train(mode)` of all modules below this one. Those that have a say in it are asked."""
    waiting = [module]
    usual: dict[type, bool] = {}
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is None:
                continue
            kind = type(child)
            if kind not in usual:
                usual[kind] = kind.train is nn.Module.train and kind.__setattr__ is nn.Module.__setattr__
            if not usual[kind]:
                child.train(mode)
                continue
            child.__dict__["training"] = mode
            if child._modules:
                waiting.append(child)


def forget_gradients(module: nn.Module) -> None:
    """`zero_grad(set_to_none=True)` of a module and all below it."""
    seen, waiting = {id(module)}, [module]
    while waiting:
        part = waiting.pop()
        _forget_own(part)
        for child in part._modules.values():
            if child is None:
                continue
            if not child._modules:  # most: twice does no harm, where one is at two places
                _forget_own(child)
            elif id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _forget_own(module: nn.Module) -> None:
    for parameter in module._parameters.values():
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
