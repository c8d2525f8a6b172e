"""How old recovery points are: counted by the monotonic clock, so that no step of the host's clock makes a point older.

Each machine has a count of time of its own. It grows by what the monotonic clock of this process has seen, and where
no engine ran (a restart, another server before) by the clock, but by no more than a restart takes. The rest is a gap
that counts as passed only when the clock has held for an hour, or when a person says that it is right. Until then, and
after each step of the clock, nothing is deleted by age. A doubt about the clock of a running server is ended by that
server or by a person, never by another server whose own clock is right.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import attrs

from asrcore.model.health import CLOCK_TOLERANCE
from asrcore.model.server import ENGINE
from asrcore.units import HOUR, MINUTE, format_duration, format_time
from asrcore.vault import ClockAnchor, ClockDoubt, ClockState, Vault

__all__ = ["BELIEVED", "HELD_FOR", "Aging", "host_run"]

_log = logging.getLogger(__name__)

HELD_FOR = HOUR
"""Seconds that the clock must agree with the monotonic one until it is trusted again."""
BELIEVED = 10 * MINUTE
"""Seconds without an engine that are taken from the clock at once: a restart of the service or of its host."""
SERVER_SKEW = 60.0
"""Seconds by which the clock may differ from the database's when it is to be trusted again."""


def host_run() -> str:
    """Which run of this host it is: its monotonic clock begins with it. Where that is unknown, of this process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return uuid.uuid4().hex


@attrs.frozen
class _Known:
    """The machine's count was `counted` at the monotonic time `elapsed`, with `point` as its newest point."""

    point: str
    counted: float
    elapsed: float

    def at(self, elapsed: float) -> float:
        return self.counted + elapsed - self.elapsed


class Aging:
    """Thread-safe. `clocks`: seconds since the epoch, and those of the monotonic clock, counted from the start of the
    host's `run`."""

    def __init__(self, vault: Vault, clocks: Callable[[], tuple[float, float]], run: str | None = None) -> None:
        self._vault = vault
        self._clocks = clocks
        self._run = run or host_run()
        self._lock = threading.RLock()
        self._ahead: float | None = None
        self._known: dict[str, _Known] = {}
        self._doubt = 0  # number of the doubt in the log that was seen last, and when that was
        self._seen_at = 0.0

    def watch(self) -> bool:
        """Compare the clock with the monotonic one. A step is recorded; a clock that has held is trusted again.

        Returns whether the clock is trusted.
        """
        with self._lock:
            now, elapsed = self._clocks()
            if self._ahead is None:
                self._ahead = now - elapsed
            moved = now - elapsed - self._ahead
            if abs(moved) > CLOCK_TOLERANCE:
                way = "forward" if moved > 0 else "back"
                self._hold(now, elapsed, f"the clock was set {way} by {format_duration(abs(moved))}", moved)
                self._ahead += moved
                return False
            state = self._vault.clock_state()
            if not state.held:
                return True
            if state.number != self._doubt:
                self._doubt, self._seen_at = state.number, elapsed
            own = self._own(state)
            since = self._seen_at if own is None else own.elapsed
            if elapsed - since < HELD_FOR:
                return False
            alive = {server.name for server in self._vault.servers() if server.alive} - {self._vault.server_name}
            ended = [doubt for doubt in state.doubts if doubt.server not in alive]
            if not ended:
                return False
            skew = self._vault.clock_skew(lambda: self._clocks()[0])
            if skew is not None and abs(skew) > SERVER_SKEW:
                return False
            text = f"the clock has held since {format_time(now - (elapsed - since))} and is trusted again"
            if not self._vault.accept_clock(now, text, self._anchors(now, elapsed), ended):
                return False
            _log.info("%s; points are deleted by age again", text)
            return True

    def meet(self, limits: Iterable[tuple[str, float]]) -> None:
        """Take up machines (ids, with their policies' intervals) whose newest point this process has not recorded."""
        with self._lock:
            new = [(machine, interval) for machine, interval in limits if machine not in self._known]
            if not new:
                return
            heads, state = self._vault.counts(), self._vault.clock_state()
            now, elapsed = self._clocks()
            gaps: dict[str, float] = {}
            taken: dict[str, float] = {}  # gaps that another server measured: now this one answers for them
            back = 0.0
            for machine, interval in new:
                if (head := heads.get(machine)) is None:
                    continue
                anchor = state.anchors.get(machine)
                last = anchor if anchor is not None and anchor.point == head.point else head
                passed = now - last.at
                believed = min(max(0.0, passed), max(BELIEVED, 2 * interval))
                self._known[machine] = _Known(head.point, last.counted + believed, elapsed)
                if passed > believed:
                    gaps[machine] = passed - believed
                if state.held and self._own(state) is None:
                    taken |= {gap.machine: gap.seconds for gap in state.gaps if gap.machine == machine}
                back = max(back, -passed)
            if back > CLOCK_TOLERANCE:
                text = f"the newest recovery point is {format_duration(back)} in the future: the clock was set back"
                self._hold(now, elapsed, text, -back, gaps)
            elif gaps or taken:
                text = f"by the clock the last cycle was {format_duration(max((taken | gaps).values()))} ago"
                self._hold(now, elapsed, text, 0.0, gaps)

    def keep_only(self, machines: Collection[str]) -> None:
        """Forget all others: another server works on them."""
        with self._lock:
            self._known = {machine: item for machine, item in self._known.items() if machine in machines}

    def count(self, machine: str, interval: float, elapsed: float | None = None) -> float | None:
        """The machine's count at that monotonic time (None: now); None for a machine without a point."""
        with self._lock:
            head = self._vault.counts(machine).get(machine)
            known = self._known.get(machine)
            if head is None or (known is not None and known.point != head.point):
                self._known.pop(machine, None)  # another server, or another direction, has recorded since
            if head is None:
                return None
            self.meet([(machine, interval)])
            at = self._known[machine].at(self._clocks()[1] if elapsed is None else elapsed)
            return max(at, head.counted)

    def recorded(self, machine: str, point: str, counted: float, elapsed: float) -> None:
        """A point was recorded: it shows `counted` on the machine's count, and the monotonic time `elapsed`."""
        with self._lock:
            self._known[machine] = _Known(point, counted, elapsed)

    def _own(self, state: ClockState) -> ClockDoubt | None:
        """This server's doubt, from this run of the host."""
        mine = (self._vault.server_name, self._run)
        return next((doubt for doubt in state.doubts if (doubt.server, doubt.boot) == mine), None)

    def _anchors(self, now: float, elapsed: float) -> dict[str, ClockAnchor]:
        return {machine: ClockAnchor(item.point, now, item.at(elapsed)) for machine, item in self._known.items()}

    def _hold(self, now: float, elapsed: float, text: str, moved: float, gaps: dict[str, float] | None = None) -> None:
        if self._vault.server_name not in ("", ENGINE):
            text = f"process server {self._vault.server_name}: {text}"
        state = self._vault.doubt_clock(
            now,
            text,
            boot=self._run,
            elapsed=elapsed,
            anchors=self._anchors(now, elapsed),
            gaps=gaps or {},
            went_back=max(0.0, -moved),
        )
        self._doubt, self._seen_at = state.number, elapsed
        _log.warning("%s; no recovery point is deleted until it has held for %s", text, format_duration(HELD_FOR))
