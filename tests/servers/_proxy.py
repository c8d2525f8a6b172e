"""A proxy between a process server and PostgreSQL, which can go silent: bytes are swallowed, nothing is closed."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

__all__ = ["Proxy"]


class Proxy:
    """Listens on `port` of the loopback interface and carries what it gets to the port `to`."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._silent = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Swallow all bytes of both sides, as a network does that drops packets."""
        self._silent.set()

    def heal(self) -> None:
        """Carry bytes again; connections that lost some are reset."""
        with self._lock:
            hurt, self._open = self._open, set()
        self._silent.clear()
        for one in hurt:
            _end(one)

    def close(self) -> None:
        """End."""
        _end(self._listener)
        self.heal()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(near)
            if self._silent.is_set():
                continue  # it was accepted, and hears nothing
            try:
                far = socket.create_connection(("127.0.0.1", self._to), timeout=5)
            except OSError:  # the server is stopped
                self._forget(near)
                continue
            far.settimeout(None)
            with self._lock:
                self._open.add(far)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not self._silent.is_set():
                    sink.sendall(data)
        if not self._silent.is_set():
            self._forget(source)
            self._forget(sink)

    def _forget(self, one: socket.socket) -> None:
        with self._lock:
            self._open.discard(one)
        _end(one)


def _end(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
