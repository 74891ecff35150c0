"""Memory that a thread keeps for its tiles: fresh memory is zeroed by the system every time, page by page."""

import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}


_kept = _Kept()


def scratch(name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, like: Tensor) -> Tensor:
    """An uninitialised tensor beside `like`, valid until the thread asks for the next one of this name.

    Kept between calls on a CPU only, a few megabytes a name; elsewhere, and for fake tensors, which must not outlive
    their mode, it is a fresh one.
    """
    if type(like) is not Tensor or like.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=like.device)
    size = dtype.itemsize
    for length in shape:
        size *= length
    memory = _kept.memory.get(name)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = _kept.memory[name] = torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever the default is
    return memory[:size].view(dtype).view(shape)
