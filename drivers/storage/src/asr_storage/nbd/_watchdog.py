"""A time limit for calls into libnbd that have none: a connection on which nothing comes for too long is cut.

One thread of the process watches the calls that wait. It starts with the first of them and ends after a while without
any, so calls that follow each other cost two entries in a dictionary and no switch of threads.
"""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import attrs

__all__ = ["Waiting", "limit"]

# Milliseconds since data last came, in Linux' `struct tcp_info` (linux/tcp.h: eight bytes, then the twelfth of its
# 32-bit numbers, tcpi_last_data_recv).
_LAST_DATA = struct.Struct("=I")
_LAST_DATA_AT = 52
# The interval between checks, as a part of the shortest limit, and its bounds (seconds).
_PART, _SHORTEST, _LONGEST = 8, 0.05, 0.5
_LEISURE = 3.0


@attrs.define(eq=False)
class Waiting:
    """A call that waits for an answer. `cut`: it was silent for too long, and its connection is gone."""

    link: socket.socket
    seconds: float
    tcp: bool
    since: float = attrs.field(factory=time.monotonic, init=False)
    silent: float = attrs.field(default=0.0, init=False)
    cut: bool = attrs.field(default=False, init=False)

    def look(self, now: float, passed: float) -> None:
        """Cut the connection if nothing came for the limit. `passed`: seconds since the last look."""
        self.silent += min(passed, now - self.since)
        if self.silent >= self.seconds and self.tcp:
            with suppress(OSError):
                self.silent = min(self.silent, self._since_data())
        if self.silent >= self.seconds:
            self.cut = True
            with suppress(OSError):  # closed already
                self.link.shutdown(socket.SHUT_RDWR)

    def _since_data(self) -> float:
        facts = self.link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_AT + _LAST_DATA.size)
        (milliseconds,) = _LAST_DATA.unpack_from(facts, _LAST_DATA_AT)
        return float(milliseconds) / 1000


class _Watcher:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[int, Waiting] = {}
        self._runs = False

    @contextmanager
    def watch(self, call: Waiting) -> Iterator[Waiting]:
        with self._lock:
            if not self._runs:
                threading.Thread(target=self._run, name="nbd-silence", daemon=True).start()
                self._runs = True
            self._calls[id(call)] = call
        try:
            yield call
        finally:
            with self._lock:
                del self._calls[id(call)]

    def _run(self) -> None:
        busy = time.monotonic()
        passed = 0.0
        while True:
            now = time.monotonic()
            with self._lock:
                # Under the lock, so that a call that has ended is not cut: its connection may be in use again.
                for call in self._calls.values():
                    call.look(now, passed)
                waiting = [call.seconds for call in self._calls.values() if not call.cut]
                if waiting:
                    busy = now
                elif now - busy >= _LEISURE:
                    self._runs = False
                    return
            nap = min(_LONGEST, max(_SHORTEST, min(waiting, default=0.0) / _PART))
            time.sleep(nap)
            # A much longer sleep means that this process was stopped (SIGSTOP, a paused virtual machine), not that the
            # server was silent.
            passed = min(time.monotonic() - now, 2 * nap)


_watcher = _Watcher()


@contextmanager
def limit(link: socket.socket, seconds: float, *, tcp: bool) -> Iterator[Waiting]:
    """Within it the connection is cut (`cut` is then set) when nothing came over it for `seconds`.

    Where LINK is not a TCP connection it is unknown whether something came: the limit covers all of the time within.
    """
    with _watcher.watch(Waiting(link, seconds, tcp)) as waiting:
        yield waiting
