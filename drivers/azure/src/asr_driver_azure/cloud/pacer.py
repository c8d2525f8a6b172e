"""The rate of requests to a storage account: under its published limits, and slower when it reports that it is busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["PARALLEL", "REQUESTS", "Pacer"]

PARALLEL = 8
"""Requests in flight. 128 at once made Azure answer 503 to an uploader (azure-vhd-utils#52); 8 do not."""
REQUESTS = 450.0
"""Requests a second. One page blob takes 500; the rest is left to other clients."""
_STEADY = 50


class Pacer:
    """Shared by all threads that send to one account. `clock` and `sleep` are seconds, for tests."""

    def __init__(
        self,
        requests: float = REQUESTS,
        parallel: int = PARALLEL,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gap = 1.0 / requests
        self._most = parallel
        self._clock = clock
        self._sleep = sleep
        self._condition = threading.Condition()
        self._limit = parallel
        self._running = 0
        self._calm = 0
        self._next = 0.0
        self.delays = 0
        """How often the service reported that it was busy."""

    @property
    def parallel(self) -> int:
        """Requests that may be in flight now."""
        return self._limit

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wait until one more request may go out; in flight until the block is left."""
        with self._condition:
            while self._running >= self._limit:
                self._condition.wait()
            self._running += 1
            now = self._clock()
            at = max(self._next, now)
            self._next = at + self._gap
        try:
            if at > now:
                self._sleep(at - now)
            yield
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify()

    def busy(self, seconds: float) -> None:
        """The service is throttling: no request is sent for `seconds`, and half as many at once from then on."""
        with self._condition:
            self.delays += 1
            self._calm = 0
            self._limit = max(1, self._limit // 2)
            self._next = max(self._next, self._clock() + seconds)

    def well(self) -> None:
        """A request was answered. After enough of them one more may be in flight."""
        with self._condition:
            self._calm += 1
            if self._calm >= _STEADY and self._limit < self._most:
                self._calm = 0
                self._limit += 1
                self._condition.notify()
