"""The inside of the engine: its state, and the three threads that work on it."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from typing import Any

from torch import nn

from fastpeft.integrations.continuous_batching import RequestRouter, fatal_error_of
from fastpeft.routing import shortened
from fastpeft.serving.admission import Request, Slot, plan
from fastpeft.serving.errors import (
    AdapterLoadError,
    EngineStoppedError,
    RequestCancelledError,
    RequestFailedError,
    ServingError,
)
from fastpeft.serving.limits import RequestLimits
from fastpeft.serving.registry import AdapterEntry, AdapterRegistry, AdapterVersion, CpuTier
from fastpeft.serving.settling import Settler
from fastpeft.serving.slots import AdapterSlots
from fastpeft.serving.weights import AdapterWeights, base_weights_of, without_base_weights

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds after which a thread that waits for tokens looks whether the generation still lives
_READ_AHEAD = 4  # adapters a slot that are read while they wait

Load = tuple[AdapterEntry, AdapterVersion, Slot, AdapterWeights]


class EngineCore:
    """State and threads of an engine. `_changed` guards all of the state, and is notified of every change.

    The model and its slots belong to the generation thread while it makes a step, and to `_admit` while that pauses it.
    """

    def __init__(self, model: nn.Module, slots: int, cpu_bytes: int | None, autocast_adapter_dtype: bool) -> None:
        if cpu_bytes is not None and cpu_bytes < 0:
            raise ValueError(f"cpu_bytes must be None or a number of bytes, got {cpu_bytes}")
        self._model_slots = AdapterSlots(model, slots, autocast_adapter_dtype)
        self._base_weights = base_weights_of(self._model_slots.base_model)
        self._manager: Any = None
        self._router: RequestRouter | None = None
        self._limits: RequestLimits | None = None
        self._threads: list[threading.Thread] = []

        self._changed = threading.Condition()
        self._is_dirty = False  # something changed that may let a request start
        self._is_stopping = False
        self._is_hurried = False  # somebody wants the engine to stop without an end to its requests
        self._refusal: str | None = "the engine is not started: use it in a with statement, or call start()"
        self._settler = Settler()
        self._registry = AdapterRegistry()
        self._cpu = CpuTier(cpu_bytes)
        self._slots = [Slot(index) for index in range(slots)]
        self._line: dict[AdapterEntry, None] = {}  # adapters that wait to become resident, in order
        self._base_requests: deque[Request] = deque()
        self._prefetches: dict[AdapterVersion, list[Future[None]]] = {}
        self._running: dict[str, Request] = {}
        self._request_numbers = itertools.count()
        self._admissions = itertools.count(1)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run one of the three threads. Should it fail, nobody may wait for it."""
        try:
            work()
        except BaseException as error:
            logger.exception("an engine's thread has failed")
            with self._changed:
                self._refusal = f"the engine has failed: {error!r}; stop() it and start() it again"
            self._fail_everything(EngineStoppedError(f"the engine has failed: {error!r}"))
            raise

    # ---- the thread that admits requests ----

    def _admit(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_dirty or self._is_stopping)
                if self._is_stopping:
                    return
                self._is_dirty = False
                starting, loads = self._next_steps()
            for request in starting:
                self._start(request)
            if loads:
                self._load(loads)

    def _next_steps(self) -> tuple[list[Request], list[Load]]:
        """The requests that may start now, and the adapters to put into slots."""
        starting = list(self._base_requests)
        self._base_requests.clear()
        self._running |= {request.handle.request_id: request for request in starting}
        todo = plan(self._line, self._slots, self._cpu.__contains__)
        for entry, slot in todo.admit:
            starting += self._bind(entry, slot)
        for entry in todo.hopeless:
            error = ServingError(
                f"adapter {shortened(entry.name)} cannot become resident: all slots are pinned; unpin one"
            )
            self._fail_waiting(entry, error)
        loads = []
        for entry, slot in todo.load:
            weights = self._cpu.get(entry.current)
            assert weights is not None, "planned because it is there"
            loads.append((entry, entry.current, slot, weights))
        return starting, loads

    def _bind(self, entry: AdapterEntry, slot: Slot) -> list[Request]:
        """Give all waiting requests of an adapter the version that is in a slot."""
        requests = list(entry.waiting)
        entry.waiting.clear()
        assert slot.version is not None
        for request in requests:
            request.slot = slot
            request.handle.version = slot.version.number
            self._running[request.handle.request_id] = request
        slot.users += len(requests)
        slot.last_used = next(self._admissions)
        self._settler.settle(entry.pins)
        self._leave_line(entry)
        return requests

    def _start(self, request: Request) -> None:
        assert self._router is not None
        name, slot = request.handle.request_id, request.slot
        if slot is None:
            self._router.bind(name, None, "")
        else:
            assert slot.version is not None
            self._router.bind(name, self._model_slots.names[slot.index], slot.version.cache_key)
        error: ServingError | None = None
        try:
            accepted = self._manager.add_request(
                request.input_ids,
                request_id=name,
                max_new_tokens=request.max_new_tokens,
                streaming=request.stream,
                eos_token_id=request.eos_token_id,
            )
            if accepted is None:
                error = EngineStoppedError("the generation takes no more requests")
        except Exception as problem:  # its queue is full, if it was given a size
            error = RequestFailedError(f"the generation did not take the request: {problem!r}")
        with self._changed:
            request.is_started = error is None
            if error is not None:
                request.handle._finish(error)
                self._release(name)
            elif request.handle.done():  # cancelled meanwhile
                self._manager.cancel_request(name)

    def _load(self, loads: list[Load]) -> None:
        """Put adapters into idle slots, between two steps of the generation."""
        problems: list[Exception | None] = []
        try:
            with self._manager.pause():
                for _, _, slot, weights in loads:
                    try:
                        self._model_slots.load(slot.index, weights)
                        problems.append(None)
                    except Exception as error:  # whatever is wrong with it, the other adapters go on
                        problems.append(error)
        except RuntimeError:  # the generation has ended; _hand_out tells everybody
            return
        with self._changed:
            for (entry, version, slot, _), problem in zip(loads, problems, strict=True):
                slot.vacate()
                if problem is not None:
                    self._loading_failed(version, problem)
                elif not version.retired:  # else it was replaced or removed meanwhile
                    slot.entry, slot.version = entry, version
            self._tell()

    # ---- the thread that reads adapters ----

    def _read(self) -> None:
        while True:
            with self._changed:
                version = None
                while not self._is_stopping and (version := self._next_to_read()) is None:
                    self._changed.wait()
                if version is None:
                    return
            outcome: AdapterWeights | Exception
            try:  # without the lock: a disk may take its time
                if version.nbytes is None:
                    version.nbytes = version.size_on_disk()
                    continue  # is there room for so much?
                outcome = without_base_weights(version.read(self._cpu.limit), self._base_weights)
            except Exception as error:  # a file can be wrong in any way; only its own requests fail
                version.nbytes, outcome = None, error
            with self._changed:
                self._take(version, outcome)
                self._tell()

    def _take(self, version: AdapterVersion, outcome: AdapterWeights | Exception) -> None:
        """Keep what was read, or tell those who wait for it what went wrong."""
        if isinstance(outcome, AdapterWeights):
            try:
                self._cpu.check(outcome.nbytes, version.name)  # a packed file may hold more than its own size
            except AdapterLoadError as error:
                outcome = error
        if isinstance(outcome, Exception):
            self._loading_failed(version, outcome)
            return
        if not version.retired:
            self._cpu.make_room(outcome.nbytes)
            self._cpu.put(version, outcome)
        self._settler.settle(self._prefetches.pop(version, []))

    def _next_to_read(self) -> AdapterVersion | None:
        """The first version that is wanted and of unknown size, or for which there is room; the room is made."""
        while True:
            for version, keep in self._wanted():
                if version.nbytes is None:
                    return version
                try:
                    self._cpu.check(version.nbytes, version.name)
                except AdapterLoadError as error:
                    self._loading_failed(version, error)
                    break  # what is wanted has changed
                if self._cpu.make_room(version.nbytes, keep):
                    return version
            else:
                return None

    def _wanted(self) -> Iterator[tuple[AdapterVersion, Collection[AdapterVersion]]]:
        """Versions to read, in order, each with those that must not leave for it: the ones ahead of it."""
        resident = {slot.version for slot in self._slots}
        ahead: set[AdapterVersion] = set()
        for entry in itertools.islice(self._line, _READ_AHEAD * len(self._slots)):
            version = entry.current
            if version not in resident:
                if version not in self._cpu:
                    yield version, ahead
                ahead.add(version)
        for version in self._prefetches:
            if version not in self._cpu and version not in ahead:
                yield version, ahead

    # ---- the thread that hands out tokens ----

    def _hand_out(self) -> None:
        manager = self._manager
        while True:
            output = manager.get_result(timeout=_POLL)
            if output is not None:
                self._deliver(output)
            elif self._is_stopping:
                return
            elif not manager.is_running():
                cause = fatal_error_of(manager)
                with self._changed:
                    self._refusal = f"the generation has ended: {cause!r}; stop() the engine and start() it again"
                self._fail_everything(EngineStoppedError(f"the generation has ended: {cause!r}"))
                return

    def _deliver(self, output: Any) -> None:
        with self._changed:
            request = self._running.get(output.request_id)
        if request is None:  # cancelled, and its last step was under way
            return
        request.handle._update(list(output.generated_tokens))
        if output.is_finished():
            with self._changed:  # of both: who cancels it meanwhile finds it running, or done
                request.handle._finish(_failure(request, output.error))
                self._release(output.request_id)

    # ---- what all threads do; the lock is held ----

    def _tell(self) -> None:
        self._is_dirty = True
        self._changed.notify_all()

    def _release(self, request_id: str) -> None:
        """A request does not run any longer: it needs its slot no more."""
        request = self._running.pop(request_id, None)
        if request is None:
            return
        assert self._router is not None
        self._router.release(request_id)
        if request.slot is not None:
            request.slot.users -= 1
            self._vacate_if_over(request.slot)
        self._tell()

    def _retire(self, version: AdapterVersion) -> None:
        """No request will take this version any more."""
        version.retired = True
        self._cpu.drop(version)
        version.weights = None
        reason = AdapterLoadError(f"{shortened(version.name)} was replaced or removed before it was read")
        self._settler.settle(self._prefetches.pop(version, []), reason)
        for slot in self._slots:
            self._vacate_if_over(slot)

    @staticmethod
    def _vacate_if_over(slot: Slot) -> None:
        if slot.version is not None and slot.version.retired and slot.users == 0:
            slot.vacate()

    def _leave_line(self, entry: AdapterEntry) -> None:
        """Take an adapter out of the line, unless somebody waits for it or it is to stay resident and is not yet."""
        is_resident = any(slot.version is entry.current for slot in self._slots)
        if entry.waiting or (entry.pinned and not is_resident):
            return
        self._line.pop(entry, None)
        if entry.removed and not entry.current.retired:
            self._retire(entry.current)

    def _hold_in_memory(self, version: AdapterVersion) -> None:
        """Keep weights that were given in memory: there is nowhere to read them again."""
        if version.weights is not None:
            self._cpu.make_room(version.weights.nbytes)
            self._cpu.put(version, version.weights)

    def _loading_failed(self, version: AdapterVersion, error: Exception) -> None:
        self._settler.settle(self._prefetches.pop(version, []), _load_error(version, error))
        for entry in [entry for entry in self._line if entry.current is version]:
            self._fail_waiting(entry, _load_error(version, error))

    def _fail_waiting(self, entry: AdapterEntry, error: Exception) -> None:
        """All who wait for an adapter get an error, it is pinned no longer, and it leaves the line."""
        for request in entry.waiting:
            request.handle._finish(error)
        entry.waiting.clear()
        self._unpin(entry, error)

    def _unpin(self, entry: AdapterEntry, reason: Exception) -> None:
        entry.pinned = False
        self._settler.settle(entry.pins, reason)
        self._leave_line(entry)

    # ---- what callers and the generation thread do ----

    def _cancel(self, request: Request) -> None:
        with self._changed:
            handle, entry = request.handle, request.entry
            if handle.done():
                return
            handle._finish(RequestCancelledError(f"request {handle.request_id} was cancelled"))
            if handle.request_id in self._running:
                if request.is_started:
                    self._manager.cancel_request(handle.request_id)
                return  # it needs its slot until the generation has dropped it: _ended_early
            if entry is None:
                self._base_requests.remove(request)
            else:
                entry.waiting.remove(request)
                self._leave_line(entry)
            self._tell()

    def _ended_early(self, request_id: str) -> None:
        """The generation has dropped a cancelled request, so that its adapter may leave."""
        with self._changed:
            self._release(request_id)

    def _all_requests(self) -> list[Request]:
        waiting = (request for entry in self._line for request in entry.waiting)
        return [*self._running.values(), *self._base_requests, *waiting]

    def _fail_everything(self, error: ServingError) -> None:
        with self._changed:
            for request in self._all_requests():
                request.handle._finish(error)
            self._base_requests.clear()
            for entry in list(self._line):
                self._fail_waiting(entry, error)
            for futures in self._prefetches.values():
                self._settler.settle(futures, error)
            self._prefetches.clear()


def _load_error(version: AdapterVersion, error: Exception) -> AdapterLoadError:
    if isinstance(error, AdapterLoadError):
        return error
    wrapped = AdapterLoadError(f"adapter {shortened(version.name)} cannot be served: {error}")
    wrapped.__cause__ = error
    return wrapped


def _failure(request: Request, error: str | None) -> RequestFailedError | None:
    """What transformers said of a request that has ended, with the name of its adapter."""
    if error is None:
        return None
    name = request.handle.adapter
    return RequestFailedError(error if name is None else f"adapter {shortened(name)}: {error}")
