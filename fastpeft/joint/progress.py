"""What each adapter of a joint run did since the last log."""

import time
from collections.abc import Collection, Mapping

from torch import Tensor


class SinceLog:
    """Sums over the updates since the last log, by adapter. Tensors stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._updates: dict[str, int] = {}
        self._labels: dict[str, Tensor] = {}
        self._norms: Mapping[str, Tensor] = {}
        self._rates: Mapping[str, float] = {}
        self._start = time.perf_counter()

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """The losses of one batch, each the adapter's part of its mean over the update."""
        for name, loss in losses.items():
            self._losses[name] = self._losses.get(name, 0) + loss.detach()

    def add_update(
        self,
        adapters: Collection[str],
        labels: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
        rates: Mapping[str, float],
    ) -> None:
        """An update of these adapters: how many labels they had, their gradients' norms and learning rates."""
        for name in adapters:
            self._updates[name] = self._updates.get(name, 0) + 1
            self._labels[name] = self._labels.get(name, 0) + labels[name]
        self._norms = {name: norms[name] for name in adapters}
        self._rates = {name: rates[name] for name in adapters}

    def take(self) -> dict[str, float]:
        """The log's entries; sums begin anew. Losses are means over updates, the rest is of the last update."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        entries = {f"loss/{name}": float(self._losses[name]) / updates for name, updates in self._updates.items()}
        entries |= {f"learning_rate/{name}": rate for name, rate in self._rates.items()}
        entries |= {f"grad_norm/{name}": float(norm) for name, norm in self._norms.items()}
        entries |= {f"tokens_per_second/{name}": float(count) / seconds for name, count in self._labels.items()}
        self._clear()
        return entries
