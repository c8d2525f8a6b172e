"""One piece of work at a time on a machine, and the line of those that wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from asrcore.errors import MachineBusy
from asrcore.model.protection import Protection
from asrcore.model.watch import Watch

__all__ = ["Lock", "MachineLocks", "Turn"]

_LOOK = 0.2  # seconds until work that waits in a line notices that it was cancelled


class Lock(Enum):
    """What is held of a machine."""

    REPLICATION = "replication"
    """Its source, replica and record: cycles, and all jobs but those of tests."""
    TESTS = "tests"
    """Its tests; replication continues beside them."""


class MachineLocks:
    """One piece of work at a time on a machine. Only one engine works on a vault, so locks of a process suffice.

    First come, first served. Work that preempts goes before all other work and cancels the work that holds the lock,
    but never other work that preempts: a second failover must not cancel the first one.
    """

    def __init__(self) -> None:
        self._freed = threading.Condition()
        self._lines: dict[tuple[str, Lock], list[Turn]] = {}

    def line_up(
        self,
        protection: Protection,
        work: str,
        watch: Watch,
        *,
        lock: Lock = Lock.REPLICATION,
        preempt: bool = False,
    ) -> Turn:
        """Take a place in the line; it must be held or left. Work that takes both locks takes TESTS first."""
        line_of = (protection.id, lock)
        with self._freed:
            line = self._lines.setdefault(line_of, [])
            turn = Turn(protection.name, work, watch, preempt, self._freed, line)
            behind = [place for place, other in enumerate(line) if not (preempt and other.yields)]
            line.insert(behind[-1] + 1 if behind else 0, turn)
        return turn

    @contextmanager
    def hold(
        self,
        protection: Protection,
        work: str,
        watch: Watch,
        *,
        lock: Lock = Lock.REPLICATION,
        wait: float = 0.0,
        preempt: bool = False,
    ) -> Iterator[None]:
        """Hold the machine, waiting up to `wait` seconds for it to be free; `preempt` cancels what holds it.

        Raises MachineBusy, naming the work that holds it, and what `watch` raises.
        """
        with self.line_up(protection, work, watch, lock=lock, preempt=preempt).hold(wait):
            yield

    def busy(self, protection_id: str) -> str | None:
        """What holds a machine's replication or is next to, or None."""
        with self._freed:
            line = self._lines.get((protection_id, Lock.REPLICATION))
            return line[0].work if line else None


class Turn:
    """A place in the line for a lock; the first in the line holds it."""

    def __init__(
        self, machine: str, work: str, watch: Watch, preempt: bool, freed: threading.Condition, line: list[Turn]
    ) -> None:
        self.work = work
        self._machine = machine
        self._watch = watch
        self._preempt = preempt
        self._freed = freed
        self._line = line
        self._held = False

    @property
    def yields(self) -> bool:
        """Whether work that preempts goes before it."""
        return not self._held and not self._preempt

    @contextmanager
    def hold(self, wait: float) -> Iterator[None]:
        """Hold the lock, waiting up to `wait` seconds (may be infinite); see `MachineLocks.hold`."""
        try:
            self._wait(time.monotonic() + wait)
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Give the place up; a second call does nothing."""
        with self._freed:
            if self in self._line:
                self._line.remove(self)
                self._freed.notify_all()

    def _wait(self, ends: float) -> None:
        reported = ""
        while True:
            self._watch.check()
            with self._freed:
                first = self._line[0]
                if first is self:
                    self._held = True
                    return
                if self._preempt and not first._preempt:
                    first._watch.cancel()
                left = ends - time.monotonic()
                if left <= 0:
                    raise MachineBusy(machine=self._machine, work=first.work)
                if first.work == reported:
                    self._freed.wait(min(left, _LOOK))
            if first.work != reported:  # reported outside of the lock, because it may be written to the vault
                reported = first.work
                self._watch.start(f"waiting for {reported}", 0)
