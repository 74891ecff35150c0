"""Operands of LoRA ops, and eager torch's way to compute them: shared by the tests of those ops."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels import backend
from fastpeft_kernels.dropout import draw_mask
from fastpeft_kernels.masks import apply_mask

BACKENDS = ["torch", "triton"]
SHAPES = [(1, 1, 1, 1), (7, 33, 65, 4), (130, 200, 96, 16), (5, 64, 40, 80)]  # M, K, N, r
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "every-second-column": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda t: t.t().contiguous().t(),
}


def eager_add(out: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """PEFT's formula and order of roundings."""
    return (out + F.linear(F.linear(x.to(A.dtype), A), B) * scaling).to(out.dtype)


def eager_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return eager_add(F.linear(x, W, bias), x, A, B, scaling)


def leaves(inputs: tuple[Any, ...], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Fresh leaves of the same values and strides; in `dtype` where given."""

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)

    return tuple(leaf(t) for t in inputs)


def run(op: Callable[..., Tensor], inputs: tuple[Any, ...], dout: Tensor) -> dict[str, Tensor]:
    out = op(*inputs)
    out.backward(dout.to(out.dtype))
    grads = {f"grad {i}": t.grad for i, t in enumerate(inputs) if isinstance(t, Tensor) and t.requires_grad}
    return {"out": out.detach(), **grads}


def known_mask(x: Tensor, p: float, path: str) -> Tensor:
    """What the next op on x keeps, (M, K) of 1.0 or 0.0: drawn by `draw_mask`, and the generator put back."""
    with backend(path):
        torch.manual_seed(5)
        mask = draw_mask(x, p)
        torch.manual_seed(5)
    return apply_mask(torch.ones(x.shape, device=x.device), mask)


def operands(shape: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype], device: str) -> dict[str, Any]:
    (M, K, N, r), (wide, narrow) = shape, dtypes
    make = lambda *size, dtype, factor=1.0: (torch.randn(*size, device=device) * factor).to(dtype)  # noqa: E731
    return {
        "x": make(M, K, dtype=wide).requires_grad_(),
        "W": make(N, K, dtype=wide, factor=K**-0.5),
        "bias": make(N, dtype=wide).requires_grad_(),
        "A": make(r, K, dtype=narrow, factor=K**-0.5).requires_grad_(),
        "B": make(N, r, dtype=narrow).requires_grad_(),
        "out": make(M, N, dtype=wide).requires_grad_(),
        "dout": make(M, N, dtype=wide),
    }
