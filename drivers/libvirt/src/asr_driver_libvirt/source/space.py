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
from asr_driver_libvirt.source import reserve
from asrcore.errors import AsrError

__all__ = ["Space", "SpaceMeter"]

_log = logging.getLogger(__name__)


@attrs.frozen
class Space:
    """Bytes at a directory of the host.

    `reserve`: no view is opened with less. `usual`: what is kept free where there is so much. Open views end at half of
    the latter, or of what was free before them if that was less: see `source.reserve.limit`.
    """

    place: str
    free: int
    total: int
    reserve: int
    usual: int = attrs.field(default=attrs.Factory(lambda self: self.reserve, takes_self=True))

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
        configured = self._host.settings.scratch_reserve
        found = Space(place, free, total, reserve.least(configured, total), reserve.usual(configured, total))
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
