"""A link that breaks: it passes on bytes between an engine and a serving process until its budget is used."""

from __future__ import annotations

import contextlib
import socket
import threading

__all__ = ["Relay"]


class Relay:
    """Listens on loopback and passes on bytes in both directions. `budget`: bytes towards the serving side until all
    connections break, as with a cut cable; None: unlimited. `sent` counts those bytes."""

    def __init__(self, port: int) -> None:
        self.sent = 0
        self.budget: int | None = None
        self._to = port
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._listening = threading.Thread(target=self._accept, daemon=True)
        self._listening.start()

    @property
    def idle(self) -> bool:
        """Whether no connection is left."""
        with self._lock:
            return not self._pairs

    @property
    def address(self) -> str:
        """The address where it listens."""
        return f"127.0.0.1:{self.port}"

    def _accept(self) -> None:
        with self._server:
            while True:
                try:
                    near, _ = self._server.accept()
                except OSError:
                    return
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._to)) as far:
            with self._lock:
                self._pairs.append((near, far))
            back = threading.Thread(target=self._carry, args=(far, near, False), daemon=True)
            back.start()
            self._carry(near, far, True)
            back.join()
            with self._lock:
                self._pairs = [pair for pair in self._pairs if pair != (near, far)]

    def _carry(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                if counted:
                    with self._lock:
                        if self.budget is not None:
                            data = data[: self.budget]
                            self.budget -= len(data)
                        self.sent += len(data)
                if data:
                    sink.sendall(data)
                if counted and self.budget == 0:
                    self.cut()
                    break
        self._break(source, sink)

    def cut(self) -> None:
        """Break all connections; new ones are possible."""
        with self._lock:
            pairs = list(self._pairs)
            self.budget = None
        for pair in pairs:
            self._break(*pair)

    def _break(self, *ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening, and break all connections."""
        self._break(self._server)
        self.cut()
        self._listening.join()
