"""Futures are settled in a thread of their own: callbacks may wait for the engine, replace adapters, or end it."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from fastpeft.serving.errors import fresh


class Settler:
    """Settles futures, in order, in a thread that lives while there are any. For several threads at once.

    A callback that waits holds up the callbacks of later futures and nothing else.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[tuple[Future[None], Exception | None]] = deque()
        self._is_running = False

    def settle(self, futures: list[Future[None]], error: Exception | None = None) -> None:
        """Tell those who wait for something, and empty the list. Does not wait for it."""
        with self._lock:
            self._queue.extend((future, error) for future in futures)
            futures.clear()
            if self._queue and not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="fastpeft-serving_settle", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._is_running = False
                    return
                future, error = self._queue.popleft()
            if not future.set_running_or_notify_cancel():  # the caller gave up
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(fresh(error))
