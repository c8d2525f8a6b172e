"""The UEFI variables of a machine, read from this host's files or through the storage API of a remote one."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import libvirt

from asr_driver_libvirt.host import volumes
from asr_driver_libvirt.host.connection import LibvirtHost

__all__ = ["NvramReader"]

_log = logging.getLogger(__name__)
_MOST = 64 * 1024 * 1024  # bytes; variable stores have 128 KiB to 528 KiB, so more is not one
_TRIES = 3


class NvramReader:
    """Reads variable stores, again only when they have changed: a cycle every 5 s must not send 528 KiB each time."""

    def __init__(self, host: LibvirtHost) -> None:
        self._host = host
        self._cache: dict[str, tuple[str, bytes]] = {}

    def read(self, path: str) -> bytes | None:
        """None when it cannot be read; the reason goes to the log. Raises SiteUnreachable."""
        for _ in range(_TRIES):
            try:
                found = self._read_file(path) if self._host.settings.local else self._read_volume(path)
            except (OSError, libvirt.libvirtError) as problem:
                _log.warning("UEFI variables %s at %s cannot be read: %s", path, self._host.name, problem)
                return None
            if found is not None:
                return found
        _log.warning("UEFI variables %s at %s changed while they were read", path, self._host.name)
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
        conn = self._host.conn()
        with contextlib.ExitStack() as stack:
            volume = volumes.volume(conn, path, stack)
            stamp = volumes.stamp(volume)
            if (known := self._cache.get(path)) is not None and known[0] == stamp:
                return known[1]
            data = volumes.download(conn, volume, _MOST)
            if volumes.stamp(volume) != stamp:
                return None
        self._cache[path] = (stamp, data)
        return data
