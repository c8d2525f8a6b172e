"""A client for one NBD export, over libnbd, in which no call can block for ever.

Requests go through libnbd's asynchronous calls and `nbd_poll` with a time limit. Each return from `nbd_poll` costs the
interpreter that all threads share, eight times for a MiB that comes over TCP; so a thread that reads much does it in
synchronous calls, which have no time limit: `_watchdog` cuts them short (measured, a copy of 2 GiB with requests of
1 MiB: 1.9 instead of 2.4 s of processor time in this process, 1.9 instead of 2.7 s in QEMU).
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

from asr_storage.nbd._connection import Connection
from asr_storage.nbd._negotiation import Connect, TlsFiles, negotiate
from asr_storage.nbd._requests import Requests
from asr_storage.nbd._status_query import StatusQuery
from asr_storage.nbd.errors import NbdContextMissing, NbdError, NbdExportMissing, NbdTimeout
from asr_storage.nbd.status import BlockStatus
from asrcore.driver import Closing

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["NbdClient", "NbdContextMissing", "NbdError", "NbdExportMissing", "NbdTimeout", "TlsFiles"]

_FLAG_NO_HOLE = 2
_FLAG_WHOLE = 4  # DF: the answer in one piece, holes as zeroes


class NbdClient(Closing):
    """One connection to one export. A thread at a time; others wait. `abort` is for any thread.

    `timeout` (seconds) is how long the server may be silent while an answer is due, so a slow link is no error and
    a dead one is. After a time limit or a lost connection each call raises; close it and reconnect.
    An error that the server returns (EIO of one read) leaves the connection usable.
    """

    def __init__(
        self,
        export: str,
        where: str,
        connect: Connect,
        *,
        contexts: Sequence[str],
        timeout: float,
        tcp: bool = False,
        tls: TlsFiles | None = None,
    ) -> None:
        """Not for use: see `connect_unix` and `connect_tcp`."""
        self._connection = Connection(export, timeout, tcp=tcp)
        try:
            self._export = negotiate(self._connection, contexts, tls, connect, f"connect to {where}")
        except BaseException:
            self._connection.free()
            raise
        self._requests = Requests(self._connection, self._export)
        self._status = StatusQuery(self._connection, self._export.contexts)

    @classmethod
    def connect_unix(
        cls, path: str | os.PathLike[str], export: str, *, contexts: Sequence[str] = (), timeout: float = 30.0
    ) -> Self:
        """Connect to EXPORT of the server that listens on the socket PATH.

        Raises NbdExportMissing, NbdContextMissing if one of CONTEXTS is not offered, NbdError otherwise;
        HostIncomplete where libnbd is not installed.
        There is no TLS here: libnbd 1.14 does not verify certificates over a unix socket (seen: any CA is taken).
        """
        name = os.fsencode(path)
        return cls(
            export,
            os.fsdecode(path),
            lambda lib, handle: lib.nbd_aio_connect_unix(handle, name),
            contexts=contexts,
            timeout=timeout,
        )

    @classmethod
    def connect_tcp(
        cls,
        host: str,
        port: int,
        export: str,
        *,
        contexts: Sequence[str] = (),
        timeout: float = 30.0,
        tls: TlsFiles | None = None,
    ) -> Self:
        """Connect to EXPORT of the server at HOST and PORT; with TLS, never in the clear. Raises as `connect_unix`.

        Looking up HOST is the resolver's and follows its limits, not TIMEOUT.
        """
        name, service = host.encode(), str(port).encode()
        return cls(
            export,
            f"{host}:{port}",
            lambda lib, handle: lib.nbd_aio_connect_tcp(handle, name, service),
            contexts=contexts,
            timeout=timeout,
            tcp=True,
            tls=tls,
        )

    # --- properties of the export ---

    @property
    def export(self) -> str:
        return self._connection.export

    @property
    def contexts(self) -> tuple[str, ...]:
        """The block status contexts agreed on: all that were asked for."""
        return self._export.contexts

    @property
    def size(self) -> int:
        """Size of the export, bytes."""
        return self._export.size

    @property
    def read_only(self) -> bool:
        return self._export.read_only

    @property
    def can_multi_conn(self) -> bool:
        """Whether several connections see each other's writes after a flush."""
        return self._export.multi_conn

    @property
    def can_flush(self) -> bool:
        return self._export.flush

    @property
    def can_zero(self) -> bool:
        return self._export.zero

    @property
    def can_trim(self) -> bool:
        return self._export.trim

    @property
    def min_block_size(self) -> int:
        """Offsets and lengths must be multiples of this, bytes."""
        return self._export.min_block

    @property
    def preferred_block_size(self) -> int:
        return self._export.preferred_block

    @property
    def max_block_size(self) -> int | None:
        """The most the server takes in one request, bytes; None if it did not say. Larger calls are split."""
        return self._export.max_block or None

    # --- operations ---

    def read_into(self, buffer: "WriteableBuffer", offset: int) -> None:
        """Fill all of BUFFER (any writable contiguous buffer, of any size) from OFFSET (bytes) on.

        Raises NbdError (NbdTimeout); what BUFFER then holds is undefined.
        """
        self.read_each([(offset, buffer)])

    def read_each(self, reads: "Sequence[tuple[int, WriteableBuffer]]") -> None:
        """Fill each buffer from its offset on, several requests in flight. Raises as `read_into`."""
        link, done, chunk = self._connection, self._connection.libnbd.no_completion, self._connection.libnbd.any_chunk
        lib = link.lib
        self._requests.each(
            "read",
            reads,
            True,
            lambda data, size, offset: lib.nbd_aio_pread(link.handle, data, size, offset, done, 0),
            lambda data, size, offset: lib.nbd_pread_structured(link.handle, data, size, offset, chunk, _FLAG_WHOLE),
        )

    def read_at_once(self, buffer: "WriteableBuffer", offset: int) -> None:
        """As `read_into`, in one request. Raises NbdError also if the server takes none of that size."""
        link, done = self._connection, self._connection.libnbd.no_completion
        with link.operation(), link.ffi.from_buffer("unsigned char[]", buffer, True) as data:
            self._requests.check_inside("read", offset, len(data))
            what = f"read of {len(data)} bytes at {offset}"
            self._requests.run(what, [lambda: link.lib.nbd_aio_pread(link.handle, data, len(data), offset, done, 0)])

    def write(self, buffer: "ReadableBuffer", offset: int) -> None:
        """Write all of BUFFER at OFFSET (bytes). Durable only after `flush`. Raises NbdError (NbdTimeout)."""
        self.write_each([(offset, buffer)])

    def write_each(self, writes: "Sequence[tuple[int, ReadableBuffer]]") -> None:
        """Write each buffer at its offset, several requests in flight; what overlaps comes in no certain order."""
        link, done = self._connection, self._connection.libnbd.no_completion
        write = link.lib.nbd_aio_pwrite
        self._requests.each(
            "write", writes, False, lambda data, size, offset: write(link.handle, data, size, offset, done, 0)
        )

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """Make LENGTH bytes from OFFSET on read as zeroes, as a hole where possible unless ALLOCATE."""
        link, done, flags = self._connection, self._connection.libnbd.no_completion, _FLAG_NO_HOLE if allocate else 0
        zero = link.lib.nbd_aio_zero
        self._requests.each_range("zero", offset, length, lambda size, at: zero(link.handle, size, at, done, flags))

    def trim(self, offset: int, length: int) -> None:
        """Discard LENGTH bytes from OFFSET on. What they read as afterwards is the server's choice."""
        link, done = self._connection, self._connection.libnbd.no_completion
        trim = link.lib.nbd_aio_trim
        self._requests.each_range("trim", offset, length, lambda size, at: trim(link.handle, size, at, done, 0))

    def flush(self) -> None:
        """Return when all that was written is durable. Raises NbdError also if the server cannot promise that."""
        link = self._connection
        with link.operation():
            cookie = link.lib.nbd_aio_flush(link.handle, link.libnbd.no_completion, 0)
            link.wait(link.check(cookie, "flush"), "flush")

    def block_status(self, offset: int, length: int) -> Iterator[BlockStatus]:
        """Status of every byte of [OFFSET, OFFSET + LENGTH) in each context, asking as often as the server needs.

        Each context's extents come in order, without gap or overlap; the contexts are mixed: see `merge_status`.
        """
        return self._status.ask(offset, length)

    # --- ending ---

    def abort(self) -> None:
        """Cut the connection, from any thread: a call in progress raises at once. `close` is still to be called."""
        self._connection.abort()

    def close(self) -> None:
        """Close the connection; may be called twice. Cuts short what another thread has in progress. Raises nothing."""
        self._connection.close()

    def __del__(self) -> None:
        connection: Connection | None = getattr(self, "_connection", None)
        if connection is not None and connection.handle is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            connection.free()

    def __repr__(self) -> str:
        state = "closed" if self._connection.handle is None else self._connection.broken or "open"
        return f"<NbdClient {self.export!r} {state}>"
