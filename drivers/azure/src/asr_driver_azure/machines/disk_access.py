"""The content of a managed disk or snapshot, by a SAS that is renewed as long as it is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs.pageblob import PageBlob
from asrcore.errors import AccessDenied, DriverFailed
from asrcore.model.extent import Extent

__all__ = ["SAS_SECONDS", "Access"]

T = TypeVar("T")
SAS_SECONDS = 6 * 3600
"""A leaked SAS is valid for this long; a copy that takes longer has it renewed."""


class Access:
    """Open until `close`. Thread-safe."""

    def __init__(self, account: AzureAccount, kind: str, name: str, *, write: bool = False) -> None:
        self._account = account
        self._kind, self._name, self._write = kind, name, write
        self._lock = threading.Lock()
        self._renew(0)

    def _renew(self, seen: int) -> None:
        """A new SAS, unless another thread was faster: `seen` is the number of the one that no longer works."""
        with self._lock:
            if seen != getattr(self, "_number", 0):
                return
            self.sas = self._account.arm.grant(self._kind, self._name, write=self._write, seconds=SAS_SECONDS)
            self._page = PageBlob(self._account.clients.disk(self.sas), self._account.calls)
            self._until = time.monotonic() + 0.9 * SAS_SECONDS
            self._number = seen + 1

    def _run(self, call: Callable[[PageBlob], T], *others: Access) -> T:
        """`others`: further snapshots whose SAS the call names."""
        used = (self, *others)
        for access in used:
            if time.monotonic() > access._until:
                access._renew(access._number)
        numbers = [access._number for access in used]
        try:
            return call(self._page)
        except (AccessDenied, DriverFailed) as problem:
            # It was revoked, or the clocks differ. How Azure reports that for another's SAS is not known.
            if not isinstance(problem, AccessDenied) and not others:
                raise
            for access, number in zip(used, numbers, strict=True):
                access._renew(number)
            return call(self._page)

    def put(self, offset: int, data: bytes) -> None:
        """Write at most 4 MiB."""
        self._run(lambda page: page.put(offset, data, "", None))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer."""
        self._run(lambda page: page.read_into(offset, buffer))

    def stored(self, size: int) -> list[Extent]:
        """Ranges that hold data."""
        return self._run(lambda page: page.stored(size))

    def changed(self, base: Access, size: int) -> list[Extent]:
        """Ranges that differ from an earlier snapshot of the same disk; `zero` where cleared."""
        return self._run(lambda page: page.changed_since(base.sas, size), base)

    def close(self) -> None:
        """End the access."""
        self._account.arm.revoke(self._kind, self._name)
