"""A connection pooler before a PostgreSQL server, as far as its clients can tell it from pgbouncer 1.18.

`transaction`: a client has a session for as long as its transaction; else until it disconnects. `strict`: a client that
gives settings for its session is refused, as by default.
"""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path

__all__ = ["Pooler"]


class Pooler:
    """Listens in `folder`; `server` is the directory of the server's socket."""

    def __init__(self, folder: Path, server: Path, database: str, *, transaction: bool, strict: bool) -> None:
        self._server = str(server / ".s.PGSQL.5432")
        self._database = database
        self._transaction, self._strict = transaction, strict
        self._idle: list[socket.socket] = []
        self._all: list[socket.socket] = []
        self._greeting = b""
        self._lock = threading.Lock()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(folder / ".s.PGSQL.5432"))
        self._listening.listen()
        self.url = f"postgresql://postgres@/{database}?host={folder}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for made in [self._listening, *self._all]:
            with suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)
            made.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._all.append(client)
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _session(self) -> socket.socket:
        """The one that was given back last, or a new one."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        made = socket.socket(socket.AF_UNIX)
        self._all.append(made)
        made.connect(self._server)
        body = struct.pack("!I", 196608) + f"user\0postgres\0database\0{self._database}\0\0".encode()
        made.sendall(struct.pack("!I", len(body) + 4) + body)
        greeting = b""
        while True:
            kind, whole = _message(made)
            if kind == b"S":
                greeting += whole
            if kind == b"Z":
                self._greeting = greeting
                return made

    def _serve(self, client: socket.socket) -> None:
        session: socket.socket | None = None
        with suppress(OSError):
            size = struct.unpack("!I", _exactly(client, 4))[0]
            settings = _exactly(client, size - 4)
            if self._strict and b"options\0" in settings:
                said = b"SFATAL\0VFATAL\0C08P01\0Munsupported startup parameter: options\0\0"
                client.sendall(b"E" + struct.pack("!I", len(said) + 4) + said)
                client.close()
                return
            session = self._session()
            key = b"K" + struct.pack("!III", 12, 0x7FFF0000 + len(self._all), 1)  # not the session's
            client.sendall(b"R" + struct.pack("!II", 8, 0) + self._greeting + key + b"Z" + struct.pack("!I", 5) + b"I")
            while True:
                if self._transaction and session is not None:
                    self._idle.append(session)
                    session = None
                kind, whole = _message(client)
                while True:
                    session = session or self._session()
                    if kind == b"X":
                        raise ConnectionAbortedError
                    session.sendall(whole)
                    if kind in b"QS" and _answered(session, client) == b"I":
                        break
                    kind, whole = _message(client)
        if session is not None:  # as DISCARD ALL leaves it: unlike pgbouncer, another one is made instead
            session.close()
        client.close()


def _answered(session: socket.socket, client: socket.socket) -> bytes:
    """Pass the answer on; returns the state of the transaction."""
    while True:
        kind, whole = _message(session)
        client.sendall(whole)
        if kind == b"Z":
            return whole[-1:]


def _message(source: socket.socket) -> tuple[bytes, bytes]:
    head = _exactly(source, 5)
    return head[:1], head + _exactly(source, struct.unpack("!I", head[1:])[0] - 4)


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = source.recv(size - len(data))
        if not more:
            raise ConnectionAbortedError
        data += more
    return data
