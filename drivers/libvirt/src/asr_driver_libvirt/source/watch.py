"""While views are open: the space for their scratch files, and machines that ran out of it, are watched.

One thread for each host, while there is something to watch. It ends a backup job before the space is gone, since QEMU
stops the machine otherwise; the view is lost, the cycle resumes later. It also ends jobs that could not be ended when
their view was closed, as soon as the host answers again.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import libvirt

from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.source import reserve
from asr_driver_libvirt.source.guard import Guard
from asr_driver_libvirt.source.space import Space, SpaceMeter
from asrcore.errors import AsrError, SiteUnreachable
from asrcore.units import format_size

__all__ = ["LOOK_SECONDS", "REMOTE_SECONDS", "ViewWatch", "Watched"]

_log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
"""Between two looks; at a remote host when space is less than four times the reserve."""
REMOTE_SECONDS = 5.0
# From a look until the job has ended and its scratch files are deleted (0.1 to 1 s were seen).
_END_SECONDS = 2.0


class Watched(ABC):
    """A view with a backup job."""

    places: Sequence[str]
    """Directories of its scratch files."""

    @abstractmethod
    def end_early(self, reason: str) -> None:
        """End the job; the view is lost for this reason. What takes longer than a moment is owed."""

    @abstractmethod
    def end_if_stalled(self) -> None:
        """End the job if the machine was paused for lack of space. Raises libvirtError, AsrError."""

    @abstractmethod
    def end_late(self) -> bool:
        """Try again to end the job of a closed view; whether there is nothing left to do. Raises libvirtError,
        AsrError."""


class ViewWatch:
    """See the module."""

    def __init__(self, host: LibvirtHost, meter: SpaceMeter) -> None:
        self._host = host
        self._meter = meter
        self.guard = Guard(host.name, host.settings)
        """It is sent what is opened here, for the time when this process is killed."""
        self._changed = threading.Condition()
        self._open: set[Watched] = set()
        self._owed: set[Watched] = set()
        self._thread: threading.Thread | None = None
        self._before: dict[str, tuple[float, int]] = {}
        self._first: dict[str, int] = {}
        """Free space at a place when the first of the views that are open there was seen."""

    def begin(self, view: Watched) -> None:
        """From now on."""
        with self._changed:
            used = {place for other in self._open for place in other.places}
            for place in set(view.places) - used:
                self._first.pop(place, None)
        self._add(self._open, view)

    def end(self, view: Watched) -> None:
        """It was closed."""
        with self._changed:
            self._open.discard(view)

    def owe(self, view: Watched) -> None:
        """It was closed, but its job was not ended."""
        self._add(self._owed, view)

    def _add(self, views: set[Watched], view: Watched) -> None:
        with self._changed:
            views.add(view)
            self._changed.notify()  # there may be little space at a place that was not looked at before
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"scratch-{self._host.name}", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        pause = LOOK_SECONDS
        while True:
            with self._changed:
                self._changed.wait(pause)
                views, owed = list(self._open), list(self._owed)
                if self._host.closed or not (views or owed):
                    self._thread = None
                    return
            try:
                pause = self._look(views, owed)
            except Exception:  # noqa: BLE001 - a defect must not leave the other views unwatched
                _log.exception("watching the views of %s failed unexpectedly", self._host.name)

    def _look(self, views: Sequence[Watched], owed: Sequence[Watched]) -> float:
        ample = True
        for place in sorted({place for view in views for place in view.places}):
            space = self._meter.look(place)
            if space is None:
                continue
            ample = ample and space.free > 4 * space.usual
            if (reason := self._running_out(space)) is not None:
                for view in views:
                    if place in view.places:
                        view.end_early(reason)
        for view in views:
            try:
                view.end_if_stalled()
            except (libvirt.libvirtError, AsrError) as problem:
                _log.debug("the state of a machine at %s is not known: %s", self._host.name, problem)
        for view in owed:
            try:
                done = view.end_late()
            except SiteUnreachable:
                break
            except (libvirt.libvirtError, AsrError) as problem:
                _log.debug("a job at %s is not ended yet: %s", self._host.name, problem)
                continue
            if done:
                with self._changed:
                    self._owed.discard(view)
        return LOOK_SECONDS if self._host.settings.local or (views and not ample) else REMOTE_SECONDS

    def _running_out(self, space: Space) -> str | None:
        """Why the jobs at this place are to be ended now, if they are."""
        now = time.monotonic()
        at, free = self._before.get(space.place, (now, space.free))
        self._before[space.place] = now, space.free
        rate = 0.0 if now - at > 2 * REMOTE_SECONDS or now <= at else max(0.0, (free - space.free) / (now - at))
        local = self._host.settings.local or space.free <= 4 * space.usual
        first = self._first.setdefault(space.place, space.free)
        needed = reserve.limit(space.usual, space.reserve, first) + rate * (
            (LOOK_SECONDS if local else REMOTE_SECONDS) + _END_SECONDS
        )
        if space.free >= needed:
            return None
        return (
            f"space for scratch files ran short: {format_size(space.free)} were free at {space.place}, "
            f"{format_size(needed)} are needed to end the backup in time"
        )
