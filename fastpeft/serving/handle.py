"""One request as its caller sees it: wait for it, iterate over its tokens, cancel it; from threads and from asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

from fastpeft.serving.errors import RequestCancelledError, fresh


class RequestHandle:
    """A submitted request.

        handle.result(timeout=30)           # all its tokens
        for token in handle: ...            # as they come
        async for token in handle: ...
        tokens = await handle
        handle.cancel()

    Attributes:
        request_id: its id in the engine.
        adapter: name of its adapter; None for the base model.
        version: number of the version that it runs with, bound when it is admitted to the model; None before, and for
            the base model.
    """

    _cancel: Callable[[], None]  # given by the engine

    def __init__(self, request_id: str, adapter: str | None) -> None:
        self.request_id = request_id
        self.adapter = adapter
        self.version: int | None = None
        self._tokens: list[int] = []
        self._error: BaseException | None = None
        self._done = False
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    def done(self) -> bool:
        """Whether it has ended: all tokens are there, or it failed or was cancelled."""
        return self._done

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return isinstance(self._error, RequestCancelledError)

    def cancel(self) -> bool:
        """End it as soon as possible. False if it had ended before. Its adapter is not kept for it any longer."""
        if self._done:
            return False
        self._cancel()
        return self.cancelled()

    def tokens(self) -> list[int]:
        """The tokens that are there now."""
        with self._changed:
            return list(self._tokens)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What it failed with, None if it did not; waits for its end.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"request {self.request_id} has not ended after {timeout} s; it goes on")
            return self._error

    def result(self, timeout: float | None = None) -> list[int]:
        """All tokens that were generated, the prompt left out; waits for its end.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds.
            ServingError: it failed or was cancelled.
        """
        error = self.exception(timeout)
        if error is not None:
            raise fresh(error)
        return list(self._tokens)

    def __iter__(self) -> Iterator[int]:
        """Tokens as they come. Raises what `result` raises once those that were generated are through."""
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._done or len(self._tokens) > seen)  # noqa: B023
                new, done = self._tokens[seen:], self._done
            yield from new
            seen += len(new)
            if done:
                break
        if self._error is not None:
            raise fresh(self._error)

    async def __aiter__(self) -> AsyncIterator[int]:
        seen = 0
        changed, stop_listening = self._listen()
        try:
            while True:
                changed.clear()
                with self._changed:
                    new, done = self._tokens[seen:], self._done
                for token in new:
                    yield token
                seen += len(new)
                if done:
                    break
                await changed.wait()
        finally:
            stop_listening()
        if self._error is not None:
            raise fresh(self._error)

    def __await__(self) -> Generator[Any, None, list[int]]:
        return self._wait().__await__()

    async def _wait(self) -> list[int]:
        changed, stop_listening = self._listen()
        try:
            while not self._done:
                await changed.wait()
                changed.clear()
        finally:
            stop_listening()
        return self.result(timeout=0)

    def _listen(self) -> tuple[asyncio.Event, Callable[[], None]]:
        """An event of the running loop that is set at every change, and what ends that."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop was closed, and nobody waits any more
                loop.call_soon_threadsafe(event.set)

        with self._changed:
            self._listeners.append(tell)
        return event, lambda: self._listeners.remove(tell)

    # What the engine calls.

    def _update(self, tokens: list[int]) -> None:
        with self._changed:
            if not self._done and len(tokens) > len(self._tokens):
                self._tokens = tokens
                self._tell()

    def _finish(self, error: BaseException | None = None) -> None:
        with self._changed:
            if not self._done:
                self._done, self._error = True, error
                self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in list(self._listeners):
            listener()


def wait_until_done(handles: list[RequestHandle], timeout: float | None = None) -> bool:
    """Whether all of them have ended after at most `timeout` seconds."""
    end = None if timeout is None else time.monotonic() + timeout
    for handle in handles:
        left = None if end is None else max(0.0, end - time.monotonic())
        with handle._changed:
            if not handle._changed.wait_for(lambda: handle._done, left):  # noqa: B023
                return False
    return True
