"""One libnbd handle: one thread at a time, waiting with a time limit, and what follows when the connection is lost."""

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from asr_storage.nbd import _ffi, _tcp, _watchdog
from asr_storage.nbd.errors import NbdError, NbdTimeout
from asrcore.errors import HostIncomplete

__all__ = ["Connection"]

# Slices of waiting, seconds: Python runs signal handlers (Ctrl-C) only between calls of nbd_poll.
_SLICE = 0.5
# Disconnecting cleanly is optional: flush() is what makes writes durable.
_GOODBYE = 1.0


class Connection:
    """A handle of libnbd and its connection. `handle` is None once it is closed; `lock` is held by each operation."""

    def __init__(self, export: str, timeout: float, *, tcp: bool) -> None:
        self.export = export
        self.tcp = tcp
        self.handle: Any = None
        self.lock = threading.Lock()
        self.broken: str | None = None
        self._timeout = timeout
        self._gathering = False
        self._socket: socket.socket | None = None
        try:
            self.libnbd = _ffi.load()
        except OSError as error:
            raise HostIncomplete(what=_ffi.LIBRARY, detail=f"{error}. On Debian: apt-get install libnbd0.") from error
        self.ffi, self.lib = self.libnbd.ffi, self.libnbd.lib
        handle = self.lib.nbd_create()
        if handle == self.ffi.NULL:
            raise self.last_error("create a handle")
        self.handle = handle

    def established(self) -> None:
        """The connection stands: keep a descriptor of it, by which any thread can cut it."""
        self._socket = socket.socket(fileno=os.dup(self.lib.nbd_aio_get_fd(self.handle)))

    # --- operations and waiting ---

    @contextmanager
    def operation(self) -> Iterator[None]:
        """One thread at a time; a closed or broken client raises before the library is touched.

        However an operation ends (Ctrl-C between two calls), nothing may stay in flight: libnbd holds pointers into
        buffers that the caller is then free to reuse, so it must never move data again.
        """
        with self.lock:
            if self.handle is None:
                raise self.error("use", "the client is closed", errno.EBADF)
            if self.broken is not None:
                raise self.error("use", f"unusable since: {self.broken}", errno.ENOTCONN)
            try:
                yield
            except BaseException as error:
                if self.lib.nbd_aio_in_flight(self.handle) != 0:
                    self._break(error)
                raise

    def wait(self, cookie: int, what: str) -> None:
        """Wait for one command. Raises the server's own answer, or what broke the connection."""
        lib, handle = self.lib, self.handle
        while not (done := lib.nbd_aio_command_completed(handle, cookie)):
            self.poll(what)
        if done < 0:
            raise self._failure(what)

    def wait_in_one_call(self, run: Callable[[], int], what: str) -> None:
        """Make a call that returns when the server has answered, or after it was silent for the time limit."""
        self._before_waiting()
        assert self._socket is not None
        with _watchdog.limit(self._socket, self._timeout, tcp=self.tcp) as waiting:
            done = run()
        if waiting.cut:
            raise self._late(what)
        if done < 0:
            raise self._failure(what)

    def poll(self, what: str) -> None:
        """Let libnbd move what can be moved; raise if the server is silent for the time limit."""
        left = self._timeout
        self._before_waiting()
        while True:
            part = min(left, _SLICE)
            moved = self.lib.nbd_poll(self.handle, max(1, int(part * 1000)))
            if moved > 0:
                return
            if moved < 0:
                error = self.last_error(what)
                self._break(error)
                raise error
            left -= part
            if left <= 0:
                raise self._late(what)

    def gather(self) -> None:
        """Send the requests that follow together, up to the next wait."""
        if self.tcp:
            _tcp.gather(self._descriptor(), True)
            self._gathering = True

    def _before_waiting(self) -> None:
        if self._gathering:
            _tcp.gather(self._descriptor(), False)
            self._gathering = False
        if self.tcp:
            _tcp.acknowledge_at_once(self._descriptor())

    def _descriptor(self) -> int:
        """-1: there is none yet."""
        return self._socket.fileno() if self._socket is not None else int(self.lib.nbd_aio_get_fd(self.handle))

    # --- errors ---

    def check(self, result: int, what: str) -> int:
        """The result of a call into libnbd. Raises NbdError if that failed."""
        if result < 0:
            raise self.last_error(what)
        return result

    def error(self, what: str, detail: str, number: int | None) -> NbdError:
        """To be raised for this export."""
        return NbdError(what, detail, export=self.export, errno=number)

    def last_error(self, what: str) -> NbdError:
        """Of this thread's last failed call."""
        number, text = _ffi.last_error(self.libnbd)
        return self.error(what, text, number)

    def _failure(self, what: str) -> NbdError:
        """Of the call that just failed; the client is unusable if that was for the connection."""
        error = self.last_error(what)
        if self.lib.nbd_aio_is_dead(self.handle) or self.lib.nbd_aio_is_closed(self.handle):
            self._break(error)
        return error

    def _late(self, what: str) -> NbdTimeout:
        late = NbdTimeout(what, f"no answer in {self._timeout:g} s", export=self.export, errno=errno.ETIMEDOUT)
        self._break(late)
        return late

    def _break(self, reason: BaseException) -> None:
        if self.broken is None:
            self.broken = str(reason) or type(reason).__name__
            self.abort()  # the server, too, sees that the wait has ended

    # --- ending ---

    def abort(self) -> None:
        """See `NbdClient.abort`."""
        connection = self._socket
        if connection is not None:
            with suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `NbdClient.close`."""
        if not self.lock.acquire(blocking=False):
            self.abort()
            self.lock.acquire()
        try:
            if self.handle is not None and self.broken is None:
                self._say_goodbye()
            self.free()
        finally:
            self.lock.release()

    def _say_goodbye(self) -> None:
        lib, handle = self.lib, self.handle
        if lib.nbd_aio_disconnect(handle, 0) < 0:
            return
        self._timeout = min(self._timeout, _GOODBYE)
        with suppress(NbdError):
            while not (lib.nbd_aio_is_closed(handle) or lib.nbd_aio_is_dead(handle)):
                self.poll("disconnect")

    def free(self) -> None:
        """Free the handle, without a goodbye; a second call does nothing."""
        handle, self.handle = self.handle, None
        if handle is not None:
            self.lib.nbd_close(handle)
        if self._socket is not None:
            self._socket.close()
