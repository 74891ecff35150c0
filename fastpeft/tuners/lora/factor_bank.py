"""Where the factors of a layer's adapters lie: side by side, so that a batch of many adapters reads them as one tensor.

On a CPU a batch of many adapters is bound by the number of operators. Two batched products do for all adapters at once
if their factors lie in one piece of memory at equal distances (fastpeft_kernels.side_by_side). So whoever adds a second
adapter to a layer, or loads or casts one, has the data of the layer's Parameters moved into such memory. The Parameters
stay the same objects, nothing is kept twice, and nobody can tell: what anybody else holds a view of is not moved.

Nothing moves during a forward: another thread's may be reading.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_Kind = tuple[torch.Size, torch.Size, torch.dtype]
_Pair = tuple[Tensor, Tensor]  # lora_A, lora_B

_references = getattr(torch._C, "_storage_Use_Count", None)  # of a storage; a torch without it has no banks


@dataclass
class _Bank:
    """Room for the factors of so many adapters of one kind: A (places, r, K), B (places, N, r)."""

    A: Tensor
    B: Tensor

    @staticmethod
    def for_pair(pair: _Pair, places: int) -> "_Bank":
        return _Bank(*(torch.empty((places, *factor.shape), dtype=factor.dtype) for factor in pair))

    def place_of(self, pair: _Pair) -> int | None:
        """Where this pair lies, if it does."""
        place, rest = divmod(pair[0].data_ptr() - self.A.data_ptr(), pair[0].nbytes)
        if rest or not 0 <= place < len(self.A) or pair[1].data_ptr() != self.B[place].data_ptr():
            return None
        return place

    def put(self, pair: _Pair, place: int) -> None:
        for factor, stack in zip(pair, (self.A, self.B), strict=True):
            factor.data = stack[place].copy_(factor.data)

    def is_ours_alone(self, pairs: int) -> bool:
        """Whether nobody else holds a part of it, `pairs` adapters lying in it. Free places may be written then."""
        return all(_holders(stack) == pairs + 1 for stack in (self.A, self.B))


class FactorBank:
    """The banks of one layer. Copied or pickled it is an empty one: the copies of the Parameters lie elsewhere."""

    def __init__(self) -> None:
        self._banks: dict[_Kind, _Bank] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return FactorBank, ()

    def gather(self, layer: Any) -> None:
        """Bring the factors of all adapters of a LoRA layer together, as far as they are on a CPU and nobody else's."""
        if _references is None or (len(layer.lora_A) < 2 and not self._banks):
            return
        with torch.inference_mode(False), torch.no_grad():
            kinds: dict[_Kind, list[_Pair]] = {}
            for A, B in _movable_pairs(layer):
                kinds.setdefault((A.shape, B.shape, A.dtype), []).append((A, B))
            self._banks = {kind: self._bank_of(kind, alike) for kind, alike in kinds.items() if len(alike) > 1}

    def _bank_of(self, kind: _Kind, pairs: Sequence[_Pair]) -> _Bank:
        bank = self._banks.get(kind)
        if bank is None:
            bank = _Bank.for_pair(pairs[0], len(pairs))
        placed = {place: pair for pair in pairs if (place := bank.place_of(pair)) is not None}
        if not bank.is_ours_alone(len(placed)):
            return bank
        wanted = [pair for pair in pairs if bank.place_of(pair) is None and _is_held_once(pair)]
        together = len(placed) + len(wanted)
        if together > len(bank.A) or 2 * together < len(bank.A):
            bank = _Bank.for_pair(pairs[0], together + together // 4 if together > len(bank.A) else together)
            for place, pair in enumerate(placed.values()):
                bank.put(pair, place)
            placed = dict(enumerate(placed.values()))
        free = (place for place in range(len(bank.A)) if place not in placed)
        for pair, place in zip(wanted, free, strict=False):
            bank.put(pair, place)
        return bank


def _movable_pairs(layer: Any) -> Iterable[_Pair]:
    for name, module in layer.lora_A.items():
        A, B = module.weight, layer.lora_B[name].weight
        if A.dtype == B.dtype and _is_movable(A) and _is_movable(B):
            yield A, B


def _is_movable(factor: Tensor) -> bool:
    if type(factor) is not nn.Parameter or factor.device.type != "cpu" or factor.is_inference():
        return False
    return factor.is_contiguous() and factor.numel() > 0 and not factor.is_shared()  # with other processes


def _is_held_once(pair: _Pair) -> bool:
    """Whether the data of these Parameters is nobody else's: no view, no state dict, no array has a part of it."""
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
