"""Tensors of one shape that lie side by side in memory, seen as one: what batched products read without a copy.

A `Shelf` is such memory. Each tensor on it has a storage of its own, so that whoever saves, shares or counts tensors by
their storage sees nothing but single tensors. Who puts the factors of many adapters on shelves is
fastpeft.tuners.lora.factor_bank; the CPU path of the routed ops looks by address whether what it gets lies on one.
"""

import bisect
import ctypes
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_shelves: dict[int, "weakref.ref[Shelf]"] = {}  # by the address at which they begin
_starts: tuple[int, ...] = ()  # these addresses in order
_changing = threading.RLock()  # a shelf may be collected while another one is entered


class Shelf:
    """Memory on the CPU for some tensors of one shape.

    Attributes:
        stack: (places, *shape); on places without a tensor there is anything.
    """

    def __init__(self, places: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.stack = torch.empty((places, *shape), dtype=dtype, device="cpu")
        self._memory = (ctypes.c_ubyte * self.stack.nbytes).from_address(self.stack.data_ptr())
        self._memory.owner = self.stack  # type: ignore[attr-defined]  # storages of the tensors hold this buffer
        self._alone = sys.getrefcount(self._memory)
        self.start, self.step = self.stack.data_ptr(), self.stack[0].nbytes
        self.places, self.shape, self.dtype = places, self.stack.shape[1:], dtype  # asked for by every product
        _enter(self.start, weakref.ref(self))
        weakref.finalize(self, _forget, self.start)

    def tensor(self, place: int) -> Tensor:
        """A tensor over this place, with a storage of its own."""
        count = self.shape.numel()
        flat = torch.frombuffer(self._memory, dtype=self.dtype, count=count, offset=place * self.step)
        return flat.view(self.shape)

    def place_of(self, t: Tensor) -> int | None:
        """The place over which a tensor of the shelf's shape lies."""
        place, rest = divmod(t.data_ptr() - self.start, self.step)
        return place if not rest and 0 <= place < self.places else None

    def storages(self) -> int:
        """How many storages of tensors that were made here are still held by anybody."""
        return sys.getrefcount(self._memory) - self._alone


def _enter(start: int, shelf: "weakref.ref[Shelf]") -> None:
    global _starts
    with _changing:
        _shelves[start] = shelf
        _starts = tuple(sorted(_shelves))


def _forget(start: int) -> None:
    global _starts
    with _changing:
        del _shelves[start]
        _starts = tuple(sorted(_shelves))


class SideBySide(NamedTuple):
    """stack[places[i]] is tensor i. Places between them may belong to none: nobody knows what is there."""

    stack: Tensor  # (span, *shape)
    places: tuple[int, ...]


def side_by_side(tensors: Sequence[Tensor]) -> SideBySide | None:
    """A view of all tensors as one; None where they are not different tensors of one shelf.

    Args:
        tensors: at least one, of one dtype, on one device, of one shape but for their rank.
    """
    addresses = list(map(Tensor.data_ptr, tensors))
    first, lowest = tensors[0], min(addresses)
    shelf = _shelf_at(lowest)
    if shelf is None or shelf.shape != first.shape or shelf.dtype != first.dtype:
        return None
    if len(set(map(Tensor.numel, tensors))) > 1 or not all(map(Tensor.is_contiguous, tensors)):
        return None
    begin, rest = divmod(lowest - shelf.start, shelf.step)
    if addresses == list(range(lowest, lowest + shelf.step * len(tensors), shelf.step)):
        places = tuple(range(len(tensors)))
    else:
        numbers = [divmod(address - lowest, shelf.step) for address in addresses]
        places = tuple([place for place, _ in numbers])
        if any(rest for _, rest in numbers) or len(set(places)) < len(places):
            return None
    end = begin + max(places) + 1
    if rest or end > shelf.places:
        return None
    return SideBySide(shelf.stack if end - begin == shelf.places else shelf.stack[begin:end], places)


def _shelf_at(address: int) -> Shelf | None:
    """The last shelf that begins at this address or before: no other one can reach it."""
    starts = _starts
    number = bisect.bisect_right(starts, address)
    found = _shelves.get(starts[number - 1]) if number else None
    return None if found is None else found()
