"""The engine: requests come in with the name of an adapter, and tokens go out.

    with Engine(model, slots=16) as engine:
        engine.add_adapter("math", "adapters/math")
        handle = engine.submit(tokenizer("2 + 2 =").input_ids, adapter="math", max_new_tokens=8)
        print(tokenizer.decode(handle.result()))

transformers' continuous batching generates, in a thread of its own; every request takes its own adapter
(fastpeft.integrations.continuous_batching). Three more threads serve it: one admits requests and puts adapters into
slots, between two steps of the generation; one reads adapters from the disk; one hands out tokens.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from fastpeft.config import PeftConfig
from fastpeft.integrations.batching_options import check_options
from fastpeft.integrations.continuous_batching import config_for_adapters, manager_with_adapters
from fastpeft.routing import shortened
from fastpeft.serving.admission import Request, Slot
from fastpeft.serving.core import EngineCore
from fastpeft.serving.errors import AdapterLoadError, EngineStoppedError, ServingError, UnknownAdapterError
from fastpeft.serving.handle import RequestHandle, wait_until_done
from fastpeft.serving.limits import RequestLimits
from fastpeft.serving.registry import source_of
from fastpeft.serving.weights import AdapterWeights, method_of, without_base_weights


@dataclass(frozen=True)
class EngineStatus:
    """What an engine holds and does.

    Attributes:
        resident: adapters in slots, name to version; of two versions of one adapter, the current one.
        on_cpu: names of the adapters whose weights are in CPU memory, the least recently used first.
        running: requests that transformers has.
        waiting: requests whose adapter is not resident yet.
        device_bytes: of the tensors in slots.
        cpu_bytes: of the weights in the CPU tier.
        loads: adapters that were put into slots since the start.
        loads_in_place: of these, those that were copied into tensors that were there.
    """

    resident: dict[str, int]
    on_cpu: list[str]
    running: int
    waiting: int
    device_bytes: int
    cpu_bytes: int
    loads: int
    loads_in_place: int


class Engine(EngineCore):
    """Serves one model with many adapters. While it runs, nothing else may use the model.

    Args:
        model: a causal language model of transformers, or a PeftModel around one, whose own adapters are left alone.
        slots: how many adapters may be resident in the model at once.
        cpu_bytes: how many bytes of further adapters are kept in CPU memory; None for no limit.
        generation_config: for all requests; the model's own unless given.
        continuous_batching_config: transformers' own; CUDA graphs must be off.
        autocast_adapter_dtype: as in load_adapter: 16-bit adapter weights are raised to fp32.

    Raises:
        ImportError: the installed transformers is not known to fastpeft.integrations.continuous_batching.
        ValueError: an argument is out of range, or the generation config has what continuous batching does not honour,
            such as beams or a repetition_penalty.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int = 16,
        cpu_bytes: int | None = None,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__(model, slots, cpu_bytes, autocast_adapter_dtype)
        base = self._model_slots.base_model
        config = base.generation_config if generation_config is None else generation_config
        check_options(base, config)
        if (config.num_return_sequences or 1) > 1:
            raise ValueError(
                f"num_return_sequences={config.num_return_sequences}: an engine gives one answer a request; submit it "
                "several times instead"
            )
        self._generation_config = copy.deepcopy(config)
        self._life = threading.RLock()  # of start and stop
        self._batching_config = config_for_adapters(continuous_batching_config)

    # ---- life ----

    def start(self) -> Engine:
        """Make the cache and start the threads. Returns the engine itself."""
        with self._life:
            self._start_threads()
        return self

    def _start_threads(self) -> None:
        if self._manager is not None:
            raise ServingError("the engine is running already")
        base = self._model_slots.base_model
        attention = base.config._attn_implementation
        manager, router = manager_with_adapters(
            base, copy.deepcopy(self._generation_config), self._batching_config, on_cancelled=self._ended_early
        )
        try:
            manager.warmup()  # makes the cache, so that the limits are known
        except Exception:
            base.set_attn_implementation(attention)
            raise
        assert router.max_request_tokens is not None
        self._limits = RequestLimits(base, self._generation_config, router.max_request_tokens)
        self._manager, self._router = manager, router
        manager.start()
        with self._changed:
            self._refusal, self._is_stopping, self._is_hurried, self._is_dirty = None, False, False, True
            self._line |= {entry: None for entry in map(self._registry.get, self._registry.names()) if entry.pinned}
        for work in (self._admit, self._read, self._hand_out):
            name = f"fastpeft-serving{work.__name__}"
            thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """End the engine. The model is as it was, its parameters frozen and in eval mode; adapters stay registered.

        Args:
            drain: let all requests end first; otherwise they fail with EngineStoppedError. False also hurries a stop
                that another thread waits for.
            timeout: seconds to wait for that, after which they fail all the same.
        """
        if not drain and self._manager is not None:
            with self._changed:
                self._refusal, self._is_hurried = self._refusal or "the engine is stopping", True
            self._fail_everything(_stopped())
        with self._life:
            if self._manager is not None:
                self._stop_threads(drain, timeout)

    def _stop_threads(self, drain: bool, timeout: float | None) -> None:
        with self._changed:
            self._refusal = self._refusal or "the engine is stopping"
            handles = [request.handle for request in self._all_requests()]
        drained = drain and wait_until_done(handles, timeout) and not self._is_hurried
        self._fail_everything(_stopped())
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._manager.stop(block=True, hard_stop=not drained)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._manager.destroy()
        self._manager, self._router = None, None
        self._model_slots.close()
        with self._changed:
            self._slots = [Slot(slot.index) for slot in self._slots]
            self._running.clear()
            self._refusal = "the engine was stopped; start() it again"

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(drain=error is None)

    # ---- adapters ----

    def add_adapter(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        config: PeftConfig | None = None,
    ) -> int:
        """Register an adapter. It is read when the first request needs it, or by `prefetch`.

        Args:
            name: any string of at most 256 characters.
            source: a folder with an adapter's files, or its weights in memory under the keys of a file.
            config: of weights in memory.

        Returns:
            The number of its version.

        Raises:
            ServingError: the name is taken or cannot be used, or weights in memory exceed `cpu_bytes`.
            AdapterLoadError: it is of another method than the adapters that are served already.
            ValueError: the folder holds no adapter, or weights in memory came without a config.
        """
        checked = self._checked(source, config)
        method = method_of(checked)
        with self._changed:
            if isinstance(checked, AdapterWeights):
                self._cpu.check(checked.nbytes, name)
            self._check_method(name, method)
            entry = self._registry.add(name, checked, method)
            self._hold_in_memory(entry.current)
            return entry.current.number

    def replace_adapter(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        config: PeftConfig | None = None,
    ) -> int:
        """Give an adapter new weights. Requests that run end with the old ones; those that wait take the new ones.

        Arguments, result and errors as in `add_adapter`; UnknownAdapterError if there is no such adapter.
        """
        checked = self._checked(source, config)
        method = method_of(checked)
        with self._changed:
            self._registry.get(name)
            if isinstance(checked, AdapterWeights):
                self._cpu.check(checked.nbytes, name)
            self._check_method(name, method)
            entry, before = self._registry.replace(name, checked, method)
            self._hold_in_memory(entry.current)
            self._retire(before)
            if entry.pinned:
                self._line.setdefault(entry)
            self._tell()
            return entry.current.number

    def _check_method(self, name: str, method: str | None) -> None:
        """All adapters of a model have one method: that of the model's own, or of the first that was registered."""
        others = (entry for entry in self._registry.entries() if entry.name != name)
        served = self._model_slots.method or next((e.current.method for e in others if e.current.method), None)
        if method is not None and served is not None and method != served:
            raise AdapterLoadError(
                f"adapter {shortened(name)} is of the method {method}, and this engine serves {served}: all adapters "
                "of a model have one method. Serve it with an engine and a model of its own"
            )

    def _checked(
        self, source: str | os.PathLike[str] | Mapping[str, Tensor], config: PeftConfig | None
    ) -> Path | AdapterWeights:
        checked = source_of(source, config)
        return without_base_weights(checked, self._base_weights) if isinstance(checked, AdapterWeights) else checked

    def remove_adapter(self, name: str) -> None:
        """Take an adapter out. Requests that were submitted before still get their answers, new ones are refused."""
        with self._changed:
            entry = self._registry.remove(name)
            self._unpin(entry, UnknownAdapterError(f"adapter {shortened(name)} was removed before it was resident"))
            self._tell()

    def pin(self, name: str) -> Future[None]:
        """Make an adapter resident as soon as possible, and keep it so until `unpin`.

        Returns:
            A future that is done when it is resident; it has the error if it cannot be loaded, EngineStoppedError if
            the engine is stopped before. While the engine does not run, it waits for `start`. Its callbacks run in a
            thread of their own.

        Raises:
            ServingError: as many adapters are pinned as there are slots.
        """
        with self._changed:
            entry = self._registry.get(name)
            pinned = [other for other in self._registry.names() if self._registry.get(other).pinned]
            if not entry.pinned and len(pinned) >= len(self._slots):
                raise ServingError(
                    f"all {len(self._slots)} slots are pinned, by {', '.join(map(shortened, pinned[:8]))}; unpin one, "
                    "or make the engine with more slots"
                )
            entry.pinned = True
            future: Future[None] = Future()
            entry.pins.append(future)
            self._line.setdefault(entry)
            self._tell()
            return future

    def unpin(self, name: str) -> None:
        """Let a pinned adapter leave again when its slot is needed."""
        with self._changed:
            entry = self._registry.get(name)
            self._unpin(entry, ServingError(f"adapter {shortened(name)} was unpinned before it was resident"))
            self._tell()

    def prefetch(self, name: str) -> Future[None]:
        """Read an adapter into CPU memory, in the background.

        Returns:
            A future that is done when it is there; it has the error if it cannot be read. Else as that of `pin`.
        """
        future: Future[None] = Future()
        with self._changed:
            version = self._registry.get(name).current
            if version in self._cpu:
                self._cpu.get(version)
                future.set_result(None)
            else:
                self._prefetches.setdefault(version, []).append(future)
                self._tell()
        return future

    def adapters(self) -> dict[str, int]:
        """Registered adapters, name to current version."""
        with self._changed:
            return {name: self._registry.get(name).current.number for name in self._registry.names()}

    def status(self) -> EngineStatus:
        """What is held, and what is going on."""
        with self._changed:
            slots = [slot for slot in self._slots if slot.entry is not None and slot.version is not None]
            slots.sort(key=lambda slot: slot.version is slot.entry.current)  # type: ignore[union-attr]
            return EngineStatus(
                resident={slot.version.name: slot.version.number for slot in slots},  # type: ignore[union-attr]
                on_cpu=[version.name for version in self._cpu.versions()],
                running=len(self._running),
                waiting=len(self._base_requests) + sum(len(entry.waiting) for entry in self._line),
                device_bytes=self._model_slots.nbytes,
                cpu_bytes=self._cpu.nbytes,
                loads=self._model_slots.built + self._model_slots.copied,
                loads_in_place=self._model_slots.copied,
            )

    # ---- requests ----

    def submit(
        self,
        input_ids: Sequence[int] | Tensor,
        adapter: str | None = None,
        max_new_tokens: int | None = None,
        eos_token_id: int | list[int] | None = None,
        stream: bool = True,
    ) -> RequestHandle:
        """Ask for a continuation. Does not wait.

        Args:
            input_ids: the prompt's tokens, one row of them.
            adapter: name of a registered adapter; None for the base model alone.
            max_new_tokens: at most so many; the generation config's number unless given.
            eos_token_id: where to stop; the generation config's unless given.
            stream: hand out each token as it comes; False hands out all at the end, which costs less.

        Raises:
            EngineStoppedError: the engine is not running.
            UnknownAdapterError: there is no such adapter.
            ValueError: the prompt is empty, has tokens that the model does not know, or is too long.
        """
        with self._changed:
            if self._refusal is not None:
                raise EngineStoppedError(self._refusal)
            entry = None if adapter is None else self._registry.get(adapter)
            assert self._limits is not None
            tokens, length = self._limits.check(input_ids, max_new_tokens)
            handle = RequestHandle(f"fastpeft-{next(self._request_numbers)}", adapter)
            request = Request(handle, tokens, length, eos_token_id, stream, entry)
            handle._cancel = functools.partial(self._cancel, request)
            if entry is None:
                self._base_requests.append(request)
            else:
                entry.waiting.append(request)
                self._line.setdefault(entry)
            self._tell()
            return handle


def _stopped() -> EngineStoppedError:
    return EngineStoppedError("the engine was stopped before this request had ended")
