"""What autograd is doing around us. Torch has no public way to tell: it is asked here and nowhere else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def hooks_around() -> Hooks | None:
    """The innermost (pack, unpack) in force here, the only ones that autograd calls; None if there are none."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    found: Hooks | None = None if top is None else top(False)
    return found


def is_checkpoint(hooks: Hooks | None) -> bool:
    """Whether these are gradient checkpointing's own, not reentrant: what runs now may run once more in backward."""
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def in_backward() -> bool:
    """Whether this runs inside a backward pass, as the recomputation of a checkpoint does."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_dispatch_watched() -> bool:
    """Whether a TorchDispatchMode sees every operator here, and may keep what they return."""
    return not torch.compiler.is_compiling() and bool(torch._C._len_torch_dispatch_stack())
