"""Which path an op takes: the one place that decides between Triton and plain torch.

The choice is made inside an op, when it runs, so that compiled graphs and backward passes follow it as well.
`FASTPEFT_BACKEND` sets it for a process, `backend` for a block of code:

    auto    Triton for tensors on a GPU that has it, torch for all others (the default)
    triton  Triton, and an error where it cannot run; with TRITON_INTERPRET=1 it runs on CPU tensors too
    torch   plain torch everywhere
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]


def _checked(name: str, origin: str) -> Backend:
    for choice in get_args(Backend):
        if name == choice:
            return choice  # type: ignore[no-any-return]
    raise ValueError(f"{origin} must be one of {', '.join(get_args(Backend))}; got {name!r}")


# A plain global and no context variable: autograd runs backward passes in threads of its own.
_backend: Backend = _checked(os.environ.get("FASTPEFT_BACKEND") or "auto", "FASTPEFT_BACKEND")


def current_backend() -> Backend:
    """The backend in force here: "auto", "triton" or "torch"."""
    return _backend


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Take the path `name` in this block of code, in every thread: "auto", "triton" or "torch".

    Raises:
        ValueError: `name` is none of these.
    """
    global _backend
    before, _backend = _backend, _checked(name, "backend")
    try:
        yield
    finally:
        _backend = before


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True when Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: Tensor, other: Tensor | None = None) -> bool:
    """Whether the op that reads `x` runs its Triton kernel.

    Args:
        x: where the op runs.
        other: a second input of a dtype of its own.

    Raises:
        RuntimeError: Triton was demanded by name and cannot run here.
    """
    if _backend == "torch":
        return False
    has_float64 = x.dtype == torch.float64 or (other is not None and other.dtype == torch.float64)
    if _backend == "auto":
        return x.is_cuda and not has_float64 and triton_installed()
    if not triton_installed():
        raise RuntimeError('backend "triton" needs the package triton: install it, or take backend "auto"')
    if not (x.is_cuda or (interpreting() and x.device.type == "cpu")):
        raise RuntimeError(
            f'backend "triton" needs tensors on a GPU, got one on {x.device}: move the model there, take backend '
            '"auto", or set TRITON_INTERPRET=1 before Triton is imported to try the kernels on a CPU'
        )
    if has_float64:
        raise RuntimeError('backend "triton" has no kernels for float64: take backend "auto" or "torch"')
    return True


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off on x's device: a backward pass may be called inside a block of autocast, and has cast already."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()
