"""Reads, writes and zeroes as requests of NBD: cut to size, several in flight."""

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from asr_storage.nbd._connection import Connection
from asr_storage.nbd._negotiation import Export
from asr_storage.nbd.errors import NbdError
from asrcore.units import MiB

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["IN_FLIGHT", "LARGE_IN_FLIGHT", "REQUEST_SIZE", "ZERO_SIZE", "Requests"]

# Reads and writes are cut into requests of this size: each wakes the server and this process.
REQUEST_SIZE = 1 * MiB
LARGE_IN_FLIGHT = 2
# Requests kept in flight of what is smaller: as many as small extents are read at a time.
IN_FLIGHT = 16
# One request to zero or trim: no data travels, but a server that has to write the zeroes must do it in the time limit.
ZERO_SIZE = 64 * MiB
_UNLIMITED = 32 * MiB  # the NBD protocol's default maximum where the server names none


class Requests:
    """Carries out what is asked of an export, request by request."""

    def __init__(self, connection: Connection, export: Export) -> None:
        self._connection = connection
        self._export = export
        self._size = min(REQUEST_SIZE, export.max_block or _UNLIMITED)

    def each(
        self,
        verb: str,
        pieces: "Sequence[tuple[int, ReadableBuffer]]",
        writable: bool,
        start: Callable[..., int],
        run: Callable[..., int] | None = None,
    ) -> None:
        """START(data, bytes, offset) for what the pieces are cut into; RUN is the same call, synchronous."""
        with self._connection.operation(), ExitStack() as held:
            found = [
                (offset, held.enter_context(self._connection.ffi.from_buffer("unsigned char[]", buffer, writable)))
                for offset, buffer in pieces
            ]
            for offset, data in found:
                self.check_inside(verb, offset, len(data))
            if not found:
                return
            others = f" and {len(found) - 1} others" if len(found) > 1 else ""
            what = f"{verb} of {len(found[0][1])} bytes at {found[0][0]}{others}"
            large = any(len(data) >= self._size for _, data in found)
            requests = [
                (data + (at - offset), size, at)
                for offset, data in found
                for at, size in _cut(offset, len(data), self._size)
            ]
            if run is not None and large and self._waits_in_one_call():
                for request in requests:
                    self._connection.wait_in_one_call(partial(run, *request), what)
            else:
                starts = [partial(start, *request) for request in requests]
                self.run(what, starts, LARGE_IN_FLIGHT if large else IN_FLIGHT)

    def each_range(self, verb: str, offset: int, length: int, start: Callable[[int, int], int]) -> None:
        """START(bytes, offset) for what a range is cut into; no data travels."""
        with self._connection.operation():
            self.check_inside(verb, offset, length)
            starts = [partial(start, size, at) for at, size in _cut(offset, length, ZERO_SIZE)]
            self.run(f"{verb} of {length} bytes at {offset}", starts)

    def run(self, what: str, starts: Sequence[Callable[[], int]], in_flight: int = IN_FLIGHT) -> None:
        """Start one request after another, some in flight at a time.

        When one fails the others are still waited for: libnbd holds pointers into the caller's buffers until then.
        """
        cookies: deque[int] = deque()
        failed: NbdError | None = None
        if len(starts) > 1:
            self._connection.gather()
        for start in starts:
            try:
                if len(cookies) >= in_flight:
                    self._connection.wait(cookies.popleft(), what)
                cookies.append(self._connection.check(start(), what))
            except NbdError as error:
                failed = error
                break
        while cookies and self._connection.broken is None:
            try:
                self._connection.wait(cookies.popleft(), what)
            except NbdError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def check_inside(self, verb: str, offset: int, length: int) -> None:
        """Raises NbdError for what is not within the export."""
        if offset < 0 or length < 0 or offset + length > self._export.size:
            what = f"{verb} of {length} bytes at {offset}"
            raise self._connection.error(what, f"outside of {self._export.size} bytes", errno.EINVAL)

    def _waits_in_one_call(self) -> bool:
        """Not in the main thread: it alone receives Ctrl-C, and only between calls. Not where the server may answer a
        hole for itself: small answers wait there for acknowledgements, which `_tcp` sends between calls (measured,
        data and holes in turn: 44 ms for a MiB, and 1 ms in one piece)."""
        return self._export.whole and threading.current_thread() is not threading.main_thread()


def _cut(offset: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """A range as offsets and lengths of at most SIZE."""
    for at in range(offset, offset + length, size):
        yield at, min(size, offset + length - at)
