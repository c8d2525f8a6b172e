"""A client for one NBD export, over libnbd, in which no call can block for ever.

Requests go through libnbd's asynchronous calls and `nbd_poll` with a time limit. Each return from `nbd_poll` costs the
interpreter that all threads share, eight times for a MiB that comes over TCP; so a thread that reads much does it in
synchronous calls, which have no time limit: `_nbd_silence` cuts them short (measured, a copy of 2 GiB with requests of
1 MiB: 1.9 instead of 2.4 s of processor time in this process, 1.9 instead of 2.7 s in QEMU).
"""

import errno
import os
import socket
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import attrs

from asr_storage.nbd import _ffi, _tcp, _watchdog
from asr_storage.nbd.errors import NbdContextMissing, NbdError, NbdExportMissing, NbdTimeout
from asr_storage.nbd.status import BlockStatus, Coverage
from asrcore.driver import Closing
from asrcore.errors import HostIncomplete
from asrcore.units import KiB, MiB

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["NbdClient", "NbdContextMissing", "NbdError", "NbdExportMissing", "NbdTimeout", "TlsFiles"]

# Reads and writes are cut into requests of this size: each wakes the server and this process.
REQUEST_SIZE = 1 * MiB
LARGE_IN_FLIGHT = 2
# Requests kept in flight of what is smaller: as many as small extents are read at a time.
IN_FLIGHT = 16
# One request to zero or trim: no data travels, but a server that has to write the zeroes must do it in the time limit.
ZERO_SIZE = 64 * MiB
# Slices of waiting, seconds: Python runs signal handlers (Ctrl-C) only between calls of nbd_poll.
_SLICE = 0.5
# Disconnecting cleanly is optional: flush() is what makes writes durable.
_GOODBYE = 1.0

_TLS_REQUIRE = 2
_SIZE_MINIMUM, _SIZE_PREFERRED, _SIZE_MAXIMUM = 0, 1, 2
_FLAG_NO_HOLE = 2
_FLAG_WHOLE = 4  # DF: the answer in one piece, holes as zeroes
_UNLIMITED = 32 * MiB  # the NBD protocol's default maximum where the server names none


# context, offset, and length, flags, length, flags...
_Reply = tuple[str, int, list[int]]


@attrs.frozen
class TlsFiles:
    """Directory with ca-cert.pem, client-cert.pem and client-key.pem. The server's certificate must be signed by
    that CA and carry the host name (or IP address) connected to."""

    directory: Path


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
        connect: Callable[[Any, Any], int],
        *,
        contexts: Sequence[str],
        timeout: float,
        tcp: bool = False,
        tls: TlsFiles | None = None,
    ) -> None:
        """Not for use: see `connect_unix` and `connect_tcp`."""
        self._handle: Any = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._broken: str | None = None
        self._timeout = timeout
        self._tcp = tcp
        self._gathering = False
        self._export = export
        try:
            self._libnbd = _ffi.load()
        except OSError as error:
            raise HostIncomplete(what=_ffi.LIBRARY, detail=f"{error}. On Debian: apt-get install libnbd0.") from error
        self._ffi, self._lib = self._libnbd.ffi, self._libnbd.lib
        self._replies: list[_Reply] = []
        self._interrupts: list[BaseException] = []
        self._extent_callback = self._make_extent_callback(self._replies, self._interrupts)
        self._handle = self._lib.nbd_create()
        if self._handle == self._ffi.NULL:
            self._handle = None
            raise self._last_error("create a handle")
        try:
            self._negotiate(contexts, tls, connect, f"connect to {where}")
        except BaseException:
            self._free()
            raise

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

    def _negotiate(
        self, contexts: Sequence[str], tls: TlsFiles | None, connect: Callable[[Any, Any], int], what: str
    ) -> None:
        lib, handle = self._lib, self._handle
        self._check(lib.nbd_set_export_name(handle, self._export.encode()), "set the export name")
        if self._libnbd.has("nbd_set_pread_initialize"):
            # Zeroing each buffer before a read costs time and helps only who uses the buffer of a failed read.
            self._check(lib.nbd_set_pread_initialize(handle, False), "set up reads")
        if tls is not None:
            self._check(lib.nbd_set_tls(handle, _TLS_REQUIRE), "require TLS")
            self._check(lib.nbd_set_tls_certificates(handle, os.fsencode(tls.directory)), "set TLS certificates")
            self._check(lib.nbd_set_tls_verify_peer(handle, True), "verify the TLS peer")
        for context in contexts:
            self._check(lib.nbd_add_meta_context(handle, context.encode()), f"ask for {context}")
        self._check(connect(lib, handle), what)
        try:
            while lib.nbd_aio_is_connecting(handle):
                self._poll(what)
        except NbdError as error:
            # an unreachable server or a missing socket has failed above, or with another number
            if error.errno == errno.ENOENT:
                raise NbdExportMissing(what, error.detail, export=self._export, errno=errno.ENOENT) from error
            raise
        if not lib.nbd_aio_is_ready(handle):
            raise self._last_error(what)
        self._socket = socket.socket(fileno=os.dup(lib.nbd_aio_get_fd(handle)))
        missing = [c for c in contexts if not self._check(lib.nbd_can_meta_context(handle, c.encode()), c)]
        if missing:
            raise NbdContextMissing(missing, export=self._export)
        self._contexts = tuple(contexts)
        self._size = self._check(lib.nbd_get_size(handle), "get the size")
        self._read_only = self._ask(lib.nbd_is_read_only)
        self._multi_conn = self._ask(lib.nbd_can_multi_conn)
        self._flush = self._ask(lib.nbd_can_flush)
        self._zero = self._ask(lib.nbd_can_zero)
        self._trim = self._ask(lib.nbd_can_trim)
        self._whole = self._ask(lib.nbd_can_df)
        sizes = [
            self._check(lib.nbd_get_block_size(handle, kind), "get the block size")
            for kind in (_SIZE_MINIMUM, _SIZE_PREFERRED, _SIZE_MAXIMUM)
        ]
        # 0 means that the server named none
        self._min_block, self._preferred_block, self._max_block = sizes[0] or 1, sizes[1] or 4 * KiB, sizes[2]
        self._request = min(REQUEST_SIZE, self._max_block or _UNLIMITED)

    def _ask(self, question: Callable[[Any], int]) -> bool:
        return bool(self._check(question(self._handle), "get the export's flags"))

    def _make_extent_callback(self, replies: list[_Reply], interrupts: list[BaseException]) -> Any:
        """A C callback for block status; it holds the lists, not the client, so that no cycle keeps a client alive."""
        ffi = self._ffi

        def on_extents(_data: Any, context: Any, offset: int, entries: Any, count: int, _error: Any) -> int:
            name: bytes = ffi.string(context)
            replies.append((name.decode(errors="replace"), offset, ffi.unpack(entries, count)))
            return 0

        def on_error(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
            interrupts.append(error)  # Ctrl-C while in Python; nothing can be raised through C

        signature = "int(void *, const char *, uint64_t, uint32_t *, size_t, int *)"
        return ffi.callback(signature, on_extents, error=-1, onerror=on_error)

    # --- properties of the export ---

    @property
    def export(self) -> str:
        return self._export

    @property
    def contexts(self) -> tuple[str, ...]:
        """The block status contexts agreed on: all that were asked for."""
        return self._contexts

    @property
    def size(self) -> int:
        """Size of the export, bytes."""
        return self._size

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def can_multi_conn(self) -> bool:
        """Whether several connections see each other's writes after a flush."""
        return self._multi_conn

    @property
    def can_flush(self) -> bool:
        return self._flush

    @property
    def can_zero(self) -> bool:
        return self._zero

    @property
    def can_trim(self) -> bool:
        return self._trim

    @property
    def min_block_size(self) -> int:
        """Offsets and lengths must be multiples of this, bytes."""
        return self._min_block

    @property
    def preferred_block_size(self) -> int:
        return self._preferred_block

    @property
    def max_block_size(self) -> int | None:
        """The most the server takes in one request, bytes; None if it did not say. Larger calls are split."""
        return self._max_block or None

    # --- operations ---

    def read_into(self, buffer: "WriteableBuffer", offset: int) -> None:
        """Fill all of BUFFER (any writable contiguous buffer, of any size) from OFFSET (bytes) on.

        Raises NbdError (NbdTimeout); what BUFFER then holds is undefined.
        """
        self.read_each([(offset, buffer)])

    def read_each(self, reads: "Sequence[tuple[int, WriteableBuffer]]") -> None:
        """Fill each buffer from its offset on, several requests in flight. Raises as `read_into`."""
        lib, done, chunk = self._lib, self._libnbd.no_completion, self._libnbd.any_chunk
        self._each(
            "read",
            reads,
            True,
            lambda data, size, offset: lib.nbd_aio_pread(self._handle, data, size, offset, done, 0),
            lambda data, size, offset: lib.nbd_pread_structured(self._handle, data, size, offset, chunk, _FLAG_WHOLE),
        )

    def read_at_once(self, buffer: "WriteableBuffer", offset: int) -> None:
        """As `read_into`, in one request. Raises NbdError also if the server takes none of that size."""
        with self._operation(), self._ffi.from_buffer("unsigned char[]", buffer, True) as data:
            self._check_inside("read", offset, len(data))
            what, nothing = f"read of {len(data)} bytes at {offset}", self._libnbd.no_completion
            self._run(what, [lambda: self._lib.nbd_aio_pread(self._handle, data, len(data), offset, nothing, 0)])

    def write(self, buffer: "ReadableBuffer", offset: int) -> None:
        """Write all of BUFFER at OFFSET (bytes). Durable only after `flush`. Raises NbdError (NbdTimeout)."""
        self.write_each([(offset, buffer)])

    def write_each(self, writes: "Sequence[tuple[int, ReadableBuffer]]") -> None:
        """Write each buffer at its offset, several requests in flight; what overlaps comes in no certain order."""
        write, done = self._lib.nbd_aio_pwrite, self._libnbd.no_completion
        self._each("write", writes, False, lambda data, size, offset: write(self._handle, data, size, offset, done, 0))

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """Make LENGTH bytes from OFFSET on read as zeroes, as a hole where possible unless ALLOCATE."""
        lib, nothing, flags = self._lib, self._libnbd.no_completion, _FLAG_NO_HOLE if allocate else 0
        with self._operation():
            self._check_inside("zero", offset, length)
            self._run(
                f"zero of {length} bytes at {offset}",
                [
                    partial(lib.nbd_aio_zero, self._handle, size, at, nothing, flags)
                    for at, size in _cut(offset, length, ZERO_SIZE)
                ],
            )

    def trim(self, offset: int, length: int) -> None:
        """Discard LENGTH bytes from OFFSET on. What they read as afterwards is the server's choice."""
        lib, nothing = self._lib, self._libnbd.no_completion
        with self._operation():
            self._check_inside("trim", offset, length)
            self._run(
                f"trim of {length} bytes at {offset}",
                [
                    partial(lib.nbd_aio_trim, self._handle, size, at, nothing, 0)
                    for at, size in _cut(offset, length, ZERO_SIZE)
                ],
            )

    def flush(self) -> None:
        """Return when all that was written is durable. Raises NbdError also if the server cannot promise that."""
        with self._operation():
            cookie = self._lib.nbd_aio_flush(self._handle, self._libnbd.no_completion, 0)
            self._wait(self._check(cookie, "flush"), "flush")

    def block_status(self, offset: int, length: int) -> Iterator[BlockStatus]:
        """Status of every byte of [OFFSET, OFFSET + LENGTH) in each context, asking as often as the server needs.

        Each context's extents come in order, without gap or overlap; the contexts are mixed: see `merge_status`.
        """
        if not self._contexts:
            raise NbdError("block status", "no context was asked for", export=self._export, errno=errno.EINVAL)
        coverage = Coverage(self._contexts, offset, length)
        while (request := coverage.next_request()) is not None:
            what = f"block status of {request[1]} bytes at {request[0]}"
            replies = self._status_replies(request[0], request[1], what)
            try:
                for context, start, entries in replies:
                    if context in self._contexts:
                        yield from coverage.take(context, start, entries)
            except ValueError as error:
                raise NbdError(what, f"bad answer: {error}", export=self._export, errno=errno.EPROTO) from error
            if coverage.next_request() == request:
                raise NbdError(what, "the answer makes no progress", export=self._export, errno=errno.EPROTO)

    def _status_replies(self, offset: int, length: int, what: str) -> list[_Reply]:
        with self._operation():
            self._replies.clear()
            callback = self._ffi.new("nbd_extent_callback *", {"callback": self._extent_callback})[0]
            cookie = self._lib.nbd_aio_block_status(
                self._handle, length, offset, callback, self._libnbd.no_completion, 0
            )
            try:
                self._wait(self._check(cookie, what), what)
            finally:
                if self._interrupts:
                    raise self._interrupts.pop()
            return self._replies.copy()

    # --- ending ---

    def abort(self) -> None:
        """Cut the connection, from any thread: a call in progress raises at once. `close` is still to be called."""
        connection = self._socket
        if connection is not None:
            with suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; may be called twice. Cuts short what another thread has in progress. Raises nothing."""
        if not self._lock.acquire(blocking=False):
            self.abort()
            self._lock.acquire()
        try:
            if self._handle is not None and self._broken is None:
                self._say_goodbye()
            self._free()
        finally:
            self._lock.release()

    def _say_goodbye(self) -> None:
        lib, handle = self._lib, self._handle
        if lib.nbd_aio_disconnect(handle, 0) < 0:
            return
        self._timeout = min(self._timeout, _GOODBYE)
        with suppress(NbdError):
            while not (lib.nbd_aio_is_closed(handle) or lib.nbd_aio_is_dead(handle)):
                self._poll("disconnect")

    def _free(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._lib.nbd_close(handle)
        if self._socket is not None:
            self._socket.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self._free()

    def __repr__(self) -> str:
        state = "closed" if self._handle is None else self._broken or "open"
        return f"<NbdClient {self._export!r} {state}>"

    # --- requests and waiting ---

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """One thread at a time; a closed or broken client raises before the library is touched.

        However an operation ends (Ctrl-C between two calls), nothing may stay in flight: libnbd holds pointers into
        buffers that the caller is then free to reuse, so it must never move data again.
        """
        with self._lock:
            if self._handle is None:
                raise NbdError("use", "the client is closed", export=self._export, errno=errno.EBADF)
            if self._broken is not None:
                raise NbdError("use", f"unusable since: {self._broken}", export=self._export, errno=errno.ENOTCONN)
            try:
                yield
            except BaseException as error:
                if self._lib.nbd_aio_in_flight(self._handle) != 0:
                    self._break(error)
                raise

    def _each(
        self,
        verb: str,
        pieces: "Sequence[tuple[int, ReadableBuffer]]",
        writable: bool,
        start: Callable[..., int],
        run: Callable[..., int] | None = None,
    ) -> None:
        """START(data, bytes, offset) for what the pieces are cut into; RUN is the same call, synchronous."""
        with self._operation(), ExitStack() as held:
            found = [
                (offset, held.enter_context(self._ffi.from_buffer("unsigned char[]", buffer, writable)))
                for offset, buffer in pieces
            ]
            for offset, data in found:
                self._check_inside(verb, offset, len(data))
            if not found:
                return
            others = f" and {len(found) - 1} others" if len(found) > 1 else ""
            what = f"{verb} of {len(found[0][1])} bytes at {found[0][0]}{others}"
            large = any(len(data) >= self._request for _, data in found)
            requests = [
                (data + (at - offset), size, at)
                for offset, data in found
                for at, size in _cut(offset, len(data), self._request)
            ]
            if run is not None and large and self._waits_in_one_call():
                for request in requests:
                    self._wait_in_one_call(partial(run, *request), what)
            else:
                starts = [partial(start, *request) for request in requests]
                self._run(what, starts, LARGE_IN_FLIGHT if large else IN_FLIGHT)

    def _waits_in_one_call(self) -> bool:
        """Not in the main thread: it alone receives Ctrl-C, and only between calls. Not where the server may answer a
        hole for itself: small answers wait there for acknowledgements, which `_nbd_tcp` sends between calls (measured,
        data and holes in turn: 44 ms for a MiB, and 1 ms in one piece)."""
        return self._whole and threading.current_thread() is not threading.main_thread()

    def _check_inside(self, verb: str, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            what = f"{verb} of {length} bytes at {offset}"
            raise NbdError(what, f"outside of {self._size} bytes", export=self._export, errno=errno.EINVAL)

    def _run(self, what: str, starts: Sequence[Callable[[], int]], in_flight: int = IN_FLIGHT) -> None:
        """Start one request after another, some in flight at a time.

        When one fails the others are still waited for: libnbd holds pointers into the caller's buffers until then.
        """
        cookies: deque[int] = deque()
        failed: NbdError | None = None
        if len(starts) > 1 and self._tcp:
            _tcp.gather(self._descriptor(), True)
            self._gathering = True
        for start in starts:
            try:
                if len(cookies) >= in_flight:
                    self._wait(cookies.popleft(), what)
                cookies.append(self._check(start(), what))
            except NbdError as error:
                failed = error
                break
        while cookies and self._broken is None:
            try:
                self._wait(cookies.popleft(), what)
            except NbdError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _wait(self, cookie: int, what: str) -> None:
        """Wait for one command. Raises the server's own answer, or what broke the connection."""
        lib, handle = self._lib, self._handle
        while not (done := lib.nbd_aio_command_completed(handle, cookie)):
            self._poll(what)
        if done < 0:
            raise self._failure(what)

    def _wait_in_one_call(self, run: Callable[[], int], what: str) -> None:
        """Make a call that returns when the server has answered, or after it was silent for the time limit."""
        self._before_waiting()
        assert self._socket is not None
        with _watchdog.limit(self._socket, self._timeout, tcp=self._tcp) as waiting:
            done = run()
        if waiting.cut:
            raise self._late(what)
        if done < 0:
            raise self._failure(what)

    def _failure(self, what: str) -> NbdError:
        """Of the call that just failed; the client is unusable if that was for the connection."""
        error = self._last_error(what)
        if self._lib.nbd_aio_is_dead(self._handle) or self._lib.nbd_aio_is_closed(self._handle):
            self._break(error)
        return error

    def _late(self, what: str) -> NbdTimeout:
        late = NbdTimeout(what, f"no answer in {self._timeout:g} s", export=self._export, errno=errno.ETIMEDOUT)
        self._break(late)
        return late

    def _before_waiting(self) -> None:
        if self._gathering:
            _tcp.gather(self._descriptor(), False)
            self._gathering = False
        if self._tcp:
            _tcp.acknowledge_at_once(self._descriptor())

    def _descriptor(self) -> int:
        """-1: there is none yet."""
        return self._socket.fileno() if self._socket is not None else int(self._lib.nbd_aio_get_fd(self._handle))

    def _poll(self, what: str) -> None:
        """Let libnbd move what can be moved; raise if the server is silent for the time limit."""
        left = self._timeout
        self._before_waiting()
        while True:
            part = min(left, _SLICE)
            moved = self._lib.nbd_poll(self._handle, max(1, int(part * 1000)))
            if moved > 0:
                return
            if moved < 0:
                error = self._last_error(what)
                self._break(error)
                raise error
            left -= part
            if left <= 0:
                raise self._late(what)

    def _break(self, reason: BaseException) -> None:
        if self._broken is None:
            self._broken = str(reason) or type(reason).__name__
            self.abort()  # the server, too, sees that the wait has ended

    def _check(self, result: int, what: str) -> int:
        if result < 0:
            raise self._last_error(what)
        return result

    def _last_error(self, what: str) -> NbdError:
        number, text = _ffi.last_error(self._libnbd)
        return NbdError(what, text, export=self._export, errno=number)


def _cut(offset: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """A range as offsets and lengths of at most SIZE."""
    for at in range(offset, offset + length, size):
        yield at, min(size, offset + length - at)
