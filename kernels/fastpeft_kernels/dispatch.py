"""Which path an op takes: the one place that decides between Triton and plain torch.

The choice is made inside an op, when it runs, so that compiled graphs and backward passes follow it as well.
`FASTPEFT_BACKEND` sets it for a process, `backend` for a block of code:

    auto    Triton for tensors on a GPU that has it, torch for all others (the default); torch also for few rows without
            gradients, as in decoding, where the host is the limit (`inferring_few`)
    triton  Triton, and an error where it cannot run; with TRITON_INTERPRET=1 it runs on CPU tensors too
    torch   plain torch everywhere

On the Triton path, the base product of a LoRA linear (and that of its dx) has two ways of its own; `FASTPEFT_PRODUCT`
and `product` choose:

    auto     what the table in tiles.py says for the GPU and the shape (the default)
    library  the vendor library's product, with the low-rank part as its C operand
    own      the kernel that adds the low-rank part in its epilogue (gpu/linear.py), and an error where it cannot run
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
Product = Literal["auto", "library", "own"]


def _checked(name: str, choices: Any, origin: str) -> Any:
    if name in get_args(choices):
        return name
    raise ValueError(f"{origin} must be one of {', '.join(get_args(choices))}; got {name!r}")


# Plain globals and no context variables: autograd runs backward passes in threads of its own.
_backend: Backend = _checked(os.environ.get("FASTPEFT_BACKEND") or "auto", Backend, "FASTPEFT_BACKEND")
_product: Product = _checked(os.environ.get("FASTPEFT_PRODUCT") or "auto", Product, "FASTPEFT_PRODUCT")


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
    before, _backend = _backend, _checked(name, Backend, "backend")
    try:
        yield
    finally:
        _backend = before


def current_product() -> Product:
    """Who computes base products here: "auto", "library" or "own"."""
    return _product


@contextmanager
def product(name: str) -> Iterator[None]:
    """Compute base products the way `name` in this block of code, in every thread: "auto", "library" or "own".

    With "own", an op whose base product cannot be computed so raises RuntimeError, and says why.

    Raises:
        ValueError: `name` is none of these.
    """
    global _product
    before, _product = _product, _checked(name, Product, "product")
    try:
        yield
    finally:
        _product = before


def check_torch_product() -> None:
    """Called where plain torch computes a base product.

    Raises:
        RuntimeError: our own product was demanded by name.
    """
    if _product == "own":
        raise RuntimeError(
            'product "own" needs the Triton path, which this op does not take here (a CPU tensor, float64, no triton, '
            'or backend "torch"): take product "auto" or "library"'
        )


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


# Of what is few: elements of an op's input and of its output, and rows. Ops of ours are ahead again from some 256 rows
# of 512 on, or 128 of 1024; of narrow rows from some 512, where the host is no longer what counts.
MOST_ELEMENTS, MOST_ROWS = 1 << 17, 512
FEW_ROWS = 16  # of what is inferred: bound by the number of torch's operators, not by what they move


def are_few(x: Tensor, columns: int) -> bool:
    """Whether plain operators, differentiated by torch itself, take less time than an op of ours on the torch path.

    There the host is what counts: the passes that our backward saves are worth less than its Python, and the memory is
    little. The answer must not depend on whether gradients are recorded: a reentrant checkpoint runs a layer without
    them first, then with them, and must draw the same dropout both times.

    Args:
        x: (..., K), what the op reads.
        columns: of its output.
    """
    if torch.compiler.is_compiling() or _product == "own" or use_triton(x):
        return False
    size, K = x.numel(), x.shape[-1] if x.ndim else 1
    return size <= MOST_ELEMENTS and size <= MOST_ROWS * K and size * columns <= MOST_ELEMENTS * K


def inferring_few(x: Tensor, dropout_p: float = 0.0) -> bool:
    """Whether this is decoding, in a few of torch's operators: these cost the host less than ops and kernels of ours.

    On a CPU there is nothing else. On a GPU a token's products take some microseconds, and the Python of an op with its
    two launches more than torch's five operators. Also while a CUDA graph is captured, whose replay costs the host
    nothing: a kernel that the warm-up did not take would be compiled and loaded there, which CUDA forbids.
    """
    if torch.is_grad_enabled() or dropout_p or torch.compiler.is_compiling() or _product == "own":
        return False
    few = x.ndim > 0 and x.numel() <= FEW_ROWS * x.shape[-1]
    return few and (_backend == "auto" or not use_triton(x))


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off on x's device: a backward pass may be called inside a block of autocast, and has cast already."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()
