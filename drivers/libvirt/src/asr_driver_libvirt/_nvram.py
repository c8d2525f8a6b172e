"""The UEFI variables of a machine, read from this host's files or through the storage API of a remote one."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import libvirt

from asr_driver_libvirt import _volumes

if TYPE_CHECKING:
    from asr_driver_libvirt._site import LibvirtSite

__all__ = ["NvramReader"]

_log = logging.getLogger(__name__)
_MOST = 64 * 1024 * 1024  # bytes; variable stores have 128 KiB to 528 KiB, so more is not one
_TRIES = 3


class NvramReader:
    """Reads variable stores, again only when they changed: a cycle every 5 s must not send 528 KiB each time."""

    def __init__(self, site: LibvirtSite) -> None:
        self._site = site
        self._cache: dict[str, tuple[str, bytes]] = {}

    def read(self, path: str) -> bytes | None:
        """None when it cannot be read; the reason goes to the log. Raises SiteUnreachable."""
        for _ in range(_TRIES):
            try:
                found = self._read_file(path) if self._site.settings.local else self._read_volume(path)
            except (OSError, libvirt.libvirtError) as problem:
                _log.warning("UEFI variables %s at %s cannot be read: %s", path, self._site.name, problem)
                return None
            if found is not None:
                return found
        _log.warning("UEFI variables %s at %s changed while they were read", path, self._site.name)
        return None

    def _read_file(self, path: str) -> bytes | None:
        file = Path(path)
        before = file.stat()
        stamp = f"{before.st_mtime_ns}.{before.st_size}.{before.st_ino}"
        if (known := self._cache.get(path)) is not None and known[0] == stamp:
            return known[1]
        data = file.read_bytes()
        after = file.stat()
        if f"{after.st_mtime_ns}.{after.st_size}.{after.st_ino}" != stamp:
            return None
        self._cache[path] = (stamp, data)
        return data

    def _read_volume(self, path: str) -> bytes | None:
        conn = self._site.conn()
        with contextlib.ExitStack() as stack:
            volume = _volumes.volume(conn, path, stack)
            stamp = _volumes.stamp(volume)
            if (known := self._cache.get(path)) is not None and known[0] == stamp:
                return known[1]
            data = _volumes.download(conn, volume, _MOST)
            if _volumes.stamp(volume) != stamp:
                return None
        self._cache[path] = (stamp, data)
        return data
