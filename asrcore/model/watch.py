"""Progress and cancellation of long work, in one object that is handed down."""

from __future__ import annotations

import threading
from collections.abc import Callable

from asrcore.errors import Cancelled

__all__ = ["Stopped", "Watch"]


class Stopped(BaseException):
    """The engine ends; the work resumes at its next start.

    Like KeyboardInterrupt it is no Exception: code that undoes failed or cancelled work must not see it.
    """


class Watch:
    """Given to everything that may take long: work adds to `done`, and `check` ends it when cancelled.

    Thread-safe. `total` and `done` count bytes unless the work says otherwise.
    """

    def __init__(self, report: Callable[[str, int, int], None] | None = None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._stopped = threading.Event()
        self._ended = threading.Event()
        self.work = ""
        self.total = 0
        self.done = 0

    def start(self, work: str, total: int) -> None:
        """Begin a new piece of work of `total` units."""
        with self._lock:
            self.work, self.total, self.done = work, total, 0
        self._tell()

    def advance(self, units_done: int) -> None:
        """Count work done; raises as `check` does."""
        self.check()
        with self._lock:
            self.done += units_done
        self._tell()

    def check(self) -> None:
        """Raise Cancelled if `cancel` was called, Stopped if the engine ends."""
        if self._stopped.is_set():
            raise Stopped
        if self._cancelled.is_set():
            raise Cancelled(work=self.work or "the work")

    def wait(self, seconds: float) -> None:
        """Let time pass; raises as `check` does, as soon as there is a reason."""
        self._ended.wait(seconds)
        self.check()

    def cancel(self) -> None:
        """Ask the work to end at its next check."""
        self._cancelled.set()
        self._ended.set()

    def stop(self) -> None:
        """The engine ends: leave everything, at the next check, as a kill would leave it."""
        self._stopped.set()
        self._ended.set()

    def _tell(self) -> None:
        if self._report is not None:
            self._report(self.work, self.done, self.total)
