"""A frozen output head must not cost more than a trainable one.

After a prompt, `generate` takes the last position's hidden states of each row: a strided (rows, 1, K) tensor. torch
multiplies it as one matrix where the weight wants a gradient, and row by row where it is frozen, as adapters leave it
(`should_fold` in ATen's LinearAlgebra.cpp): it then reads the whole weight for every row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def rows_of_head_together(model: nn.Module) -> Iterator[None]:
    """Within the block, an ordinary frozen head of the model gets its input contiguous."""
    head = _head_of(model)
    if type(head) is not nn.Linear or head.weight.requires_grad:
        yield
        return
    handle = head.register_forward_pre_hook(_contiguous)
    try:
        yield
    finally:
        handle.remove()


def _head_of(model: nn.Module) -> Any:
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    is_strided = len(inputs) == 1 and isinstance(inputs[0], Tensor) and not inputs[0].is_contiguous()
    return (inputs[0].contiguous(),) if is_strided else None
