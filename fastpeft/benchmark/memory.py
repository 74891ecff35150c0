"""What a forward pass keeps for its backward, counted in bytes of distinct storage."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SavedBytes:
    """Bytes kept for backward. Parameters are not counted: they are there anyway.

    Attributes:
        own: storage that exists only because it was saved, or was made on the way.
        by_reference: storage of the inputs that was saved without a copy.
        count: distinct storages in `own`.
    """

    own: int
    by_reference: int
    count: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def saved_bytes(
    forward: Callable[[], object], *, inputs: Iterable[Tensor] = (), parameters: Iterable[Tensor] = ()
) -> SavedBytes:
    """Run `forward` once and count what autograd saves for it.

    A storage counts once however many views of it are saved, and in full, since a view keeps all of it. Only what goes
    through torch's saved-tensor mechanism is seen; every op of ours and of reference PEFT does.
    """
    free = {_storage_key(tensor) for tensor in parameters}
    given = {_storage_key(tensor) for tensor in inputs}
    kept: dict[int, torch.UntypedStorage] = {}  # holding each storage also keeps its address from being used again

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage_key(tensor), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    own = [storage.nbytes() for key, storage in kept.items() if key not in free and key not in given]
    by_reference = sum(storage.nbytes() for key, storage in kept.items() if key in given and key not in free)
    del result  # the graph must live until the storages are counted
    return SavedBytes(own=sum(own), by_reference=by_reference, count=len(own))


def cuda_kept_bytes(forward: Callable[[], Sequence[Tensor]]) -> int:
    """What the allocator holds after `forward` beyond what it held before, less the outputs: a check of the above."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = forward()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before - sum(out.untyped_storage().nbytes() for out in outputs)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
