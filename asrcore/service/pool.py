"""Threads for cycles: a few long cycles do not block short ones, and a site that hangs leaves room for the others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import attrs

from asrcore.model.watch import Watch

__all__ = ["Lanes"]

_log = logging.getLogger(__name__)


@attrs.frozen
class _Running:
    site: str
    since: float
    watch: Watch


class Lanes:
    """Runs at most one piece of work per key: `quick` at a time, and beside them up to `slow` that have taken longer
    than `slow_after` seconds already. One site takes at most three quarters of either.

    So a few long ones (large changes, a machine that hangs) do not hold up the short ones, and a site that does not
    answer at all leaves room for the others. `ended` is called in the thread of the work whenever some has ended.
    """

    def __init__(
        self,
        name: str,
        *,
        quick: int,
        slow: int = 0,
        slow_after: float = 10.0,
        ended: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quick, self._slow, self._slow_after = quick, slow, slow_after
        self._ended = ended
        self._clock = clock
        self._executor = ThreadPoolExecutor(quick + slow, thread_name_prefix=name)
        self._running: dict[str, _Running] = {}
        self._closed = False
        self._lock = threading.Lock()

    def start(self, key: str, site: str, work: Callable[[Watch], None]) -> bool:
        """Run the work if there is room for it now and none of this key runs; otherwise False."""
        with self._lock:
            if self._closed or key in self._running or not self._room(site):
                return False
            running = self._running[key] = _Running(site, self._clock(), Watch())

        def run() -> None:
            try:
                work(running.watch)
            except Exception:  # noqa: BLE001 - a defect in one machine's work must not stop the service
                _log.exception("work %s failed unexpectedly", key)
            finally:
                with self._lock:
                    del self._running[key]
                self._ended()

        self._executor.submit(run)
        return True

    def has_room(self, site: str) -> bool:
        """Whether work of that site would be started now."""
        with self._lock:
            return not self._closed and self._room(site)

    def _room(self, site: str) -> bool:
        since = self._clock() - self._slow_after
        running = [item.site for item in self._running.values()]
        quick = [item.site for item in self._running.values() if item.since > since]
        return (
            len(quick) < self._quick
            and len(running) < self._quick + self._slow
            and quick.count(site) < _share(self._quick)
            and running.count(site) < _share(self._quick + self._slow)
        )

    def close(self) -> None:
        """Stop what runs (it is resumed at the next start) and wait for it."""
        with self._lock:
            self._closed = True
            for item in self._running.values():
                item.watch.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _share(places: int) -> int:
    return max(1, places * 3 // 4)
