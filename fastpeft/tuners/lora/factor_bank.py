"""Where the factors of a layer's adapters lie: side by side, so that a batch of many adapters reads them as one tensor.

On a CPU a batch of many adapters is bound by the number of operators. Two batched products do for all adapters at once
if their factors lie on one shelf of memory (fastpeft_kernels.side_by_side). So when adapters are added, loaded, cast or
deleted, the data of the layer's Parameters moves onto such shelves. The Parameters stay the same objects, each with a
storage of its own, and nothing is kept twice. What anybody else holds a view of is not moved, nor memory that is not
torch's own, as of arrays; it is tried again when adapters come or go the next time.

Nothing moves during a forward: another thread's may be reading.
"""

import functools
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.side_by_side import Shelf

ALIGNMENT = 64  # bytes: factors of other sizes would begin where a product takes another path, and other bits

_Pair = tuple[Tensor, Tensor]  # lora_A, lora_B
_Kind = tuple[torch.Size, torch.Size, torch.dtype]

_references = getattr(torch._C, "_storage_Use_Count", None)  # of a storage; a torch without it has no banks
_lock = threading.Lock()


class _Bank:
    """Two shelves for the factors of so many adapters of one kind."""

    def __init__(self, kind: _Kind, places: int) -> None:
        A, B, dtype = kind
        self.shelves = Shelf(places, A, dtype), Shelf(places, B, dtype)
        self.places = places

    def place_of(self, pair: _Pair) -> int | None:
        """Where this pair lies, if it does."""
        places = {shelf.place_of(factor) for shelf, factor in zip(self.shelves, pair, strict=True)}
        return places.pop() if len(places) == 1 else None

    def put(self, pair: _Pair, place: int) -> None:
        for factor, shelf in zip(pair, self.shelves, strict=True):
            factor.data = shelf.tensor(place).copy_(factor.data)

    def has_only(self, pairs: int) -> bool:
        """Whether no other factors than these are on it: a deleted adapter's may be somebody's still."""
        return all(shelf.storages() == pairs for shelf in self.shelves)


class FactorBank:
    """The banks of one layer. Copied or pickled it is an empty one: the copies of the Parameters lie elsewhere."""

    def __init__(self) -> None:
        self._banks: dict[_Kind, _Bank] = {}
        self._settled: dict[str, tuple[int, int]] = {}  # adapter name -> where its factors lie, if all is done

    def __reduce__(self) -> tuple[Any, ...]:
        return FactorBank, ()

    def gather(self, layer: Any) -> None:
        """Bring the factors of all adapters of a LoRA layer together, as far as they are on a CPU and nobody else's."""
        if _references is None or (len(layer.lora_A) < 2 and not self._banks):
            return
        with _lock, torch.inference_mode(False), torch.no_grad():
            if _addresses(layer) == self._settled:
                return
            kinds: dict[_Kind, list[_Pair]] = {}
            for name, module in layer.lora_A.items():
                A, B = module.weight, layer.lora_B[name].weight
                if A.dtype == B.dtype and _may_lie_here(A) and _may_lie_here(B):
                    kinds.setdefault((A.shape, B.shape, A.dtype), []).append((A, B))
            banks = {kind: self._bank_of(kind, alike) for kind, alike in kinds.items()}
            self._banks = {kind: bank for kind, bank in banks.items() if bank is not None}
            is_done = all(self._has_all(kind, alike) for kind, alike in kinds.items() if len(alike) > 1)
            self._settled = _addresses(layer) if is_done else {}

    def _has_all(self, kind: _Kind, pairs: list[_Pair]) -> bool:
        bank = self._banks.get(kind)
        return bank is not None and all(bank.place_of(pair) is not None for pair in pairs)

    def _bank_of(self, kind: _Kind, pairs: list[_Pair]) -> _Bank | None:
        bank = self._banks.get(kind)
        places = [None if bank is None else bank.place_of(pair) for pair in pairs]
        placed = {place: pair for place, pair in zip(places, pairs, strict=True) if place is not None}
        wanted = [pair for place, pair in zip(places, pairs, strict=True) if place is None and _is_movable(pair)]
        together, room = len(placed) + len(wanted), 0 if bank is None else bank.places
        if together > room or 2 * together < room:
            if not all(map(_is_held_once, placed.values())):
                return bank
            if together < 2:  # alone with itself
                for factor in (factor for pair in placed.values() for factor in pair):
                    factor.data = factor.data.clone()
                return None
            old, bank = list(placed.values()), _Bank(kind, together + together // 4 if room else together)
            placed = dict(enumerate(old))
            for place, pair in placed.items():
                bank.put(pair, place)
        if bank is not None and bank.has_only(len(placed)):
            free = (place for place in range(bank.places) if place not in placed)
            for pair, place in zip(wanted, free, strict=False):
                bank.put(pair, place)
        return bank


def _addresses(layer: Any) -> dict[str, tuple[int, int]]:
    factors = ((name, module.weight, layer.lora_B[name].weight) for name, module in layer.lora_A.items())
    return {name: (A.data_ptr(), B.data_ptr()) for name, A, B in factors}


def _may_lie_here(factor: Tensor) -> bool:
    if type(factor) is not nn.Parameter or factor.device.type != "cpu" or factor.is_inference():
        return False
    return factor.is_contiguous() and factor.nbytes > 0 and factor.nbytes % ALIGNMENT == 0


def _is_movable(pair: _Pair) -> bool:
    """Whether the data of these Parameters is torch's own and nobody else's.

    No view, no state dict and no array has a part of it, and no other process; nor is it an array's to begin with.
    """
    own = all(factor.untyped_storage().resizable() and not factor.is_shared() for factor in pair)
    return own and _is_held_once(pair)


def _is_held_once(pair: _Pair) -> bool:
    return all(_holders(factor) == 1 for factor in pair)


def _holders(t: Tensor) -> int:
    """The number of tensors, arrays and the like over t's storage, and of Python's references to the storage itself."""
    return _references_to_storage(t) - _own_references() + 1


def _references_to_storage(t: Tensor) -> int:
    storage = t.untyped_storage()
    assert _references is not None
    return _references(storage._cdata) + sys.getrefcount(storage)  # type: ignore[no-any-return]


@functools.cache
def _own_references() -> int:
    """What that is for a tensor that has its storage alone: versions of Python and torch differ."""
    return _references_to_storage(torch.empty(1))
