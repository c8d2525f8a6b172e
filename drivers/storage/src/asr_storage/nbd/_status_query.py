"""Asking for block status: libnbd calls back into Python with each context's extents."""

import errno
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from asr_storage.nbd._connection import Connection
from asr_storage.nbd.status import BlockStatus, Coverage

__all__ = ["StatusQuery"]

# context, offset, and length, flags, length, flags...
_Reply = tuple[str, int, list[int]]


class StatusQuery:
    """Asks one connection for the status of ranges, in the contexts that were agreed on."""

    def __init__(self, connection: Connection, contexts: tuple[str, ...]) -> None:
        self._connection = connection
        self._contexts = contexts
        self._replies: list[_Reply] = []
        self._interrupts: list[BaseException] = []
        self._callback = _extent_callback(connection.ffi, self._replies, self._interrupts)

    def ask(self, offset: int, length: int) -> Iterator[BlockStatus]:
        """See `NbdClient.block_status`."""
        if not self._contexts:
            raise self._connection.error("block status", "no context was asked for", errno.EINVAL)
        coverage = Coverage(self._contexts, offset, length)
        while (request := coverage.next_request()) is not None:
            what = f"block status of {request[1]} bytes at {request[0]}"
            replies = self._reply_of(request[0], request[1], what)
            try:
                for context, start, entries in replies:
                    if context in self._contexts:
                        yield from coverage.take(context, start, entries)
            except ValueError as error:
                raise self._connection.error(what, f"bad answer: {error}", errno.EPROTO) from error
            if coverage.next_request() == request:
                raise self._connection.error(what, "the answer makes no progress", errno.EPROTO)

    def _reply_of(self, offset: int, length: int, what: str) -> list[_Reply]:
        link = self._connection
        with link.operation():
            self._replies.clear()
            callback = link.ffi.new("nbd_extent_callback *", {"callback": self._callback})[0]
            cookie = link.lib.nbd_aio_block_status(link.handle, length, offset, callback, link.libnbd.no_completion, 0)
            try:
                link.wait(link.check(cookie, what), what)
            finally:
                if self._interrupts:
                    raise self._interrupts.pop()
            return self._replies.copy()


def _extent_callback(ffi: Any, replies: list[_Reply], interrupts: list[BaseException]) -> Any:
    """A C callback for block status; it holds the lists only, so that no cycle keeps a client alive."""

    def on_extents(_data: Any, context: Any, offset: int, entries: Any, count: int, _error: Any) -> int:
        name: bytes = ffi.string(context)
        replies.append((name.decode(errors="replace"), offset, ffi.unpack(entries, count)))
        return 0

    def on_error(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
        interrupts.append(error)  # Ctrl-C while in Python; nothing can be raised through C

    signature = "int(void *, const char *, uint64_t, uint32_t *, size_t, int *)"
    return ffi.callback(signature, on_extents, error=-1, onerror=on_error)
