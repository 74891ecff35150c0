"""Which adapters there are, in which version, and what is held of them on the CPU."""

from __future__ import annotations

import copy
import itertools
import os
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fastpeft.checkpoint import AdapterFileError
from fastpeft.config import PeftConfig
from fastpeft.routing import shortened
from fastpeft.serving.errors import AdapterTooLargeError, ServingError, UnknownAdapterError
from fastpeft.serving.weights import AdapterWeights, FileIdentity, file_identity, read_adapter

if TYPE_CHECKING:
    from fastpeft.serving.admission import Request

MAX_NAME = 256  # characters of an adapter's name

_SHOWN_NAMES = 8


@dataclass(eq=False)
class AdapterVersion:
    """One state of an adapter's weights. It never changes: other weights are another version.

    Attributes:
        name: of the adapter.
        number: counted over all adapters of the engine, so that no two versions share one, whatever their names.
        folder: where its files are; None if it was given in memory.
        weights: of a version given in memory; those of a folder are in the CPU tier when they are needed.
        method: such as "LORA"; None if its config did not say.
        file: what the weights file was when it was first read.
        nbytes: of its file, once somebody has looked.
        retired: it was replaced or removed; only requests that it runs already still need it.
    """

    name: str
    number: int
    folder: Path | None = None
    weights: AdapterWeights | None = None
    method: str | None = None
    file: FileIdentity | None = None
    nbytes: int | None = None
    retired: bool = False

    @property
    def cache_key(self) -> str:
        """What the prefix cache keeps its blocks under."""
        return f"{self.number} {self.name}"

    def size_on_disk(self) -> int:
        """Bytes of its weights file. Raises AdapterFileError if there is none."""
        assert self.folder is not None
        return file_identity(self.folder)[1]

    def read(self, limit: int | None) -> AdapterWeights:
        """Its weights from its folder.

        Raises:
            ValueError, OSError: as read_adapter; also if the file is not the one that was read before.
        """
        assert self.folder is not None
        weights = read_adapter(self.folder, limit)
        if self.file is not None and weights.file != self.file:
            raise AdapterFileError(
                f"{self.folder} was changed since version {self.number} of {shortened(self.name)} was first read from "
                "it; call replace_adapter to serve what is there now"
            )
        self.file = weights.file
        return weights


@dataclass(eq=False)
class AdapterEntry:
    """A registered adapter.

    Attributes:
        current: the version that new admissions take.
        pinned: its current version stays resident.
        pins: those who want to know when it is resident.
        waiting: its requests that are not admitted yet, in order.
        removed: it is not registered any longer, and only serves requests that were submitted before.
    """

    name: str
    current: AdapterVersion
    pinned: bool = False
    pins: list[Future[None]] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    removed: bool = False


class AdapterRegistry:
    """Names and versions. Not for several threads at once."""

    def __init__(self) -> None:
        self._entries: dict[str, AdapterEntry] = {}
        self._numbers = itertools.count(1)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def entries(self) -> list[AdapterEntry]:
        return list(self._entries.values())

    def get(self, name: str) -> AdapterEntry:
        """The entry of a registered adapter.

        Raises:
            UnknownAdapterError: there is none.
        """
        entry = self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            known = list(itertools.islice(self._entries, _SHOWN_NAMES))
            more = f" and {len(self._entries) - len(known)} more" if len(self._entries) > len(known) else ""
            raise UnknownAdapterError(
                f"no adapter {shortened(name)}; registered are {', '.join(map(shortened, known)) or 'none'}{more}. "
                "Register it with add_adapter"
            )
        return entry

    def add(self, name: str, source: Path | AdapterWeights, method: str | None = None) -> AdapterEntry:
        """Register an adapter under a new name."""
        _check_name(name)
        if name in self._entries:
            raise ServingError(f"there is an adapter {shortened(name)} already; call replace_adapter for new weights")
        entry = self._entries[name] = AdapterEntry(name, self._version(name, source, method))
        return entry

    def replace(
        self, name: str, source: Path | AdapterWeights, method: str | None = None
    ) -> tuple[AdapterEntry, AdapterVersion]:
        """Give an adapter a new version. Returns its entry and the version before."""
        entry = self.get(name)
        before, entry.current = entry.current, self._version(name, source, method)
        before.retired = True
        return entry, before

    def remove(self, name: str) -> AdapterEntry:
        """Take a name out. The entry serves the requests that it has."""
        entry = self.get(name)
        del self._entries[name]
        entry.removed = True
        return entry

    def _version(self, name: str, source: Path | AdapterWeights, method: str | None) -> AdapterVersion:
        if isinstance(source, AdapterWeights):
            return AdapterVersion(name, next(self._numbers), weights=source, method=method)
        return AdapterVersion(name, next(self._numbers), folder=source, method=method)


def source_of(
    source: str | os.PathLike[str] | Mapping[str, Tensor], config: PeftConfig | None
) -> Path | AdapterWeights:
    """What a caller passed for an adapter, checked as far as it can be without reading its weights.

    Args:
        source: a folder with an adapter's files, or weights under the keys of a file, which are copied.
        config: of weights in memory, copied too; a folder has its own.

    Raises:
        ValueError: a folder without an adapter, weights without a config or not finite, or a folder with a config.
    """
    if isinstance(source, Mapping):
        if not isinstance(config, PeftConfig):
            raise ValueError(f"weights in memory need the adapter's config, a PeftConfig; got config={config!r}")
        if bad := [key for key, value in source.items() if not isinstance(value, Tensor)]:
            raise ValueError(f"expected a dict of tensors under the keys of an adapter file, but {bad[:4]} are none")
        if bad := [key for key, value in source.items() if value.is_complex()]:
            raise ValueError(f"{bad[0]} is of {source[bad[0]].dtype}; expected a floating-point dtype")
        if bad := [key for key, value in source.items() if not value.isfinite().all()]:
            raise ValueError(f"{bad[0]} has values that are NaN or infinite; requests of all adapters would suffer")
        own = {key: value.detach().cpu().clone() for key, value in source.items()}
        return AdapterWeights(copy.deepcopy(config), own)
    if config is not None:
        raise ValueError("a folder has a config of its own; leave out config=")
    folder = Path(source).absolute()  # whatever the working directory is when it is read
    file_identity(folder)
    return folder


class CpuTier:
    """Weights of adapters in memory; those that were not used for longest leave first. Not for several threads at once.

    Weights that were given in memory never leave: there is nowhere to read them again.

    Args:
        limit: bytes that it may hold; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.nbytes = 0
        self._held: OrderedDict[AdapterVersion, AdapterWeights] = OrderedDict()

    def __contains__(self, version: AdapterVersion) -> bool:
        return version in self._held

    def versions(self) -> list[AdapterVersion]:
        """What is held, the least recently used first."""
        return list(self._held)

    def get(self, version: AdapterVersion) -> AdapterWeights | None:
        """The weights of a version, if they are here; it counts as used."""
        if version in self._held:
            self._held.move_to_end(version)
        return self._held.get(version)

    def check(self, nbytes: int, name: str) -> None:
        """Raise AdapterTooLargeError for weights that cannot fit, whatever leaves."""
        fixed = sum(weights.nbytes for version, weights in self._held.items() if version.weights is not None)
        if self.limit is not None and nbytes + fixed > self.limit:
            beside = f", of which adapters given in memory occupy {fixed}" if fixed else ""
            raise AdapterTooLargeError(
                f"adapter {shortened(name)} has {nbytes} bytes, and the CPU tier may hold {self.limit}{beside}; give "
                "the engine a larger cpu_bytes"
            )

    def make_room(self, nbytes: int, keep: Collection[AdapterVersion] = ()) -> bool:
        """Let versions go, but for those to keep, until `nbytes` more fit. False, and nothing goes, if they cannot."""
        if self.limit is None:
            return True
        free, leaving = self.limit - self.nbytes, []
        for version, weights in self._held.items():
            if free >= nbytes:
                break
            if version.weights is None and version not in keep:
                leaving.append(version)
                free += weights.nbytes
        if free < nbytes:
            return False
        for version in leaving:
            self.drop(version)
        return True

    def put(self, version: AdapterVersion, weights: AdapterWeights) -> None:
        self.drop(version)
        self._held[version] = weights
        self.nbytes += weights.nbytes

    def drop(self, version: AdapterVersion) -> None:
        weights = self._held.pop(version, None)
        if weights is not None:
            self.nbytes -= weights.nbytes


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name or len(name) > MAX_NAME:
        raise UnknownAdapterError(
            f"an adapter's name is text of 1 to {MAX_NAME} characters, got {shortened(name)}; choose a shorter one"
        )
