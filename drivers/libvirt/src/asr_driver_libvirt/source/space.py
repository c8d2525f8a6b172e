"""How much space is left where scratch files are."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable

import attrs
import libvirt

from asr_driver_libvirt.host import volumes
from asr_driver_libvirt.host.connection import LibvirtHost
from asrcore.errors import AsrError
from asrcore.units import GiB

__all__ = ["Space", "SpaceMeter"]

_log = logging.getLogger(__name__)
# Unless the site's settings name a reserve: enough for what a disk takes during a look at a remote host and the end of
# the job, but no large share of a small file system.
_RESERVE = GiB
_SHARE = 20


@attrs.frozen
class Space:
    """Bytes at a directory of the host. `reserve`: no view is opened with less; open ones end at half of it."""

    place: str
    free: int
    total: int
    reserve: int

    @property
    def short(self) -> bool:
        """Whether no view may be opened."""
        return self.free < self.reserve


class SpaceMeter:
    """Of one host: this one's file systems by statvfs, a remote one's through libvirt's storage API."""

    def __init__(self, host: LibvirtHost) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Space]] = {}

    def look(self, place: str, max_age: float = 0.0) -> Space | None:
        """None where it cannot be found out. Enough space that was seen at most `max_age` seconds ago is not asked for
        again: a remote host reads the directory each time."""
        with self._lock:
            known = self._known.get(place)
        if known is not None and not known[1].short and time.monotonic() - known[0] <= max_age:
            return known[1]
        try:
            free, total = self._local(place) if self._host.settings.local else self._remote(place)
        except (OSError, libvirt.libvirtError, AsrError) as problem:
            _log.debug("free space at %s of %s is not known: %s", place, self._host.name, problem)
            return None
        reserve = self._host.settings.scratch_reserve
        found = Space(place, free, total, min(_RESERVE, total // _SHARE) if reserve is None else reserve)
        with self._lock:
            self._known[place] = (time.monotonic(), found)
        return found

    def shortest(self, places: Iterable[str], max_age: float) -> Space | None:
        """The one in which no view may be opened; None if there is room in all."""
        found = [space for place in places if (space := self.look(place, max_age)) is not None and space.short]
        return min(found, key=lambda space: space.free, default=None)

    @staticmethod
    def _local(place: str) -> tuple[int, int]:
        state = os.statvfs(place)
        return state.f_bavail * state.f_frsize, state.f_blocks * state.f_frsize

    def _remote(self, place: str) -> tuple[int, int]:
        with contextlib.ExitStack() as stack:
            _, total, _, free = volumes.pool_of(self._host.conn(), place, stack).info()
        return free, total
