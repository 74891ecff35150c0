"""Tensors of one shape that lie side by side in memory, seen as one: what batched products read without a copy.

Nothing is remembered and nothing is moved here: whoever keeps the factors of many adapters may lay them so
(fastpeft.tuners.lora.factor_bank), and the CPU path of the routed ops looks whether they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SideBySide(NamedTuple):
    """stack[places[i]] is tensor i. Places between them may belong to none: nobody knows what is there."""

    stack: Tensor  # (span, *shape)
    places: tuple[int, ...]


def side_by_side(tensors: Sequence[Tensor]) -> SideBySide | None:
    """A view of all tensors as one; None where they are not contiguous parts of one storage at equal distances.

    Args:
        tensors: at least one, of one dtype, on one device, of one shape but for their rank.
    """
    first = tensors[0]
    if len(set(map(Tensor.numel, tensors))) > 1 or not all(map(Tensor.is_contiguous, tensors)) or not first.numel():
        return None
    addresses = list(map(Tensor.data_ptr, tensors))
    step = first.nbytes
    if addresses == list(range(addresses[0], addresses[0] + step * len(tensors), step)):
        lowest, places = addresses[0], tuple(range(len(tensors)))
    else:
        lowest = min(addresses)
        numbers = [divmod(address - lowest, step) for address in addresses]
        if any(rest for _, rest in numbers):
            return None
        places = tuple([place for place, _ in numbers])
    storage, span = first.untyped_storage(), max(places) + 1
    before = lowest - storage.data_ptr()
    if before < 0 or before % first.itemsize or before + span * step > storage.nbytes():
        return None  # of several storages: whatever is next to the first one's is not ours to read
    stack = torch.as_strided(first, (span, *first.shape), (first.numel(), *first.stride()), before // first.itemsize)
    return SideBySide(stack, places)
