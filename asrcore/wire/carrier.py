"""A connection with time limits: TLS to a component whose certificate was checked, or a Unix socket of this host."""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import attrs

from asrcore.errors import AsrError, InvalidValue, SiteUnreachable, TimedOut
from asrcore.wire import tls
from asrcore.wire.frames import Bytes

__all__ = ["Address", "Carrier", "ConnectionLost", "Limits"]


class ConnectionLost(Exception):
    """The connection was closed or lost; the message says how."""


@attrs.frozen
class Limits:
    """Seconds. `silence`: time without a single byte; the other side sends a keep-alive every third of that."""

    connect: float = 10.0
    silence: float = 30.0


@attrs.frozen
class Address:
    """Where a component listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, what: str = "address") -> Address:
        """`HOST:PORT` or `[IPV6]:PORT`. Raises InvalidValue."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise InvalidValue(what=what, value=text, wanted="HOST:PORT, such as 10.0.0.2:9444")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# A TLS record has at most 16 KiB; OpenSSL takes larger pieces and splits them without releasing the GIL in between.
_PIECE = 256 * 1024


class Carrier:
    """A connection after its handshake. One thread may receive while others, one at a time, send."""

    def __init__(self, connection: socket.socket, peer: str, limits: Limits) -> None:
        """`connection` is handed over: TLS after its handshake (see `dial` and `answer`), or a connected Unix socket,
        which only processes of this host can reach. Raises ValueError for any other."""
        self.peer = peer
        self.limits = limits
        self.local = connection.family == socket.AF_UNIX
        """Whether the other side is a process of this host."""
        self.fingerprint = ""
        """SHA-256 of the other side's certificate, in hex; empty where there is none."""
        self._connection = connection
        self._certificate: Mapping[str, Any] | None = None
        connection.setblocking(False)
        if isinstance(connection, ssl.SSLSocket):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.silence * 1000))
            self._certificate = connection.getpeercert()
            self.fingerprint = hashlib.sha256(connection.getpeercert(binary_form=True) or b"").hexdigest()
        elif not self.local:
            raise ValueError("a connection between hosts needs TLS")
        self._fileno = connection.fileno()
        self._lock = threading.Lock()  # OpenSSL's object is not to be used by two threads at once
        self._broken = False
        self._told = False

    @classmethod
    def dial(
        cls,
        address: Address,
        identity: tls.Identity,
        roles: Collection[tls.Role],
        *,
        name: str = "",
        limits: Limits,
    ) -> Carrier:
        """Connect to a component of one of these roles. Without its `name` its certificate must be for the address.

        Raises SiteUnreachable, TimedOut, IdentityUnusable, and what `tls.refusal` and `tls.check_role` give.
        """
        peer = str(address)
        context = identity.context(server=False, check_host=not name)
        try:
            plain = socket.create_connection((address.host, address.port), limits.connect)
        except TimeoutError as problem:
            raise TimedOut(operation=f"connecting to {peer}", seconds=limits.connect, detail="") from problem
        except OSError as problem:
            raise SiteUnreachable(site=peer, detail=problem.strerror or str(problem)) from problem
        with _closed_on_error(plain):
            connection = _shaken(context, plain, peer, limits, server=False, host=address.host)
        with _closed_on_error(connection):
            made = cls(connection, peer, limits)
            made.check(roles, name)
            return made

    @classmethod
    def answer(
        cls,
        plain: socket.socket,
        peer: str,
        identity: tls.Identity,
        limits: Limits,
        *,
        begun: Callable[[Callable[[], None]], None] = lambda cut: None,
    ) -> Carrier:
        """Take an accepted connection, which is closed if it is refused. The caller has to `check` its role. `begun` is
        called with what ends the handshake, from any thread.

        Raises TimedOut, ConnectionLost, IdentityUnusable, and what `tls.refusal` gives.
        """
        with _closed_on_error(plain):
            plain.settimeout(limits.connect)
            context = identity.context(server=True)
            connection = _shaken(context, plain, peer, limits, server=True, begun=begun)
        with _closed_on_error(connection):
            return cls(connection, peer, limits)

    def check(self, roles: Collection[tls.Role], name: str = "") -> tls.Component:
        """Who the other side is. Raises CertificateRole unless it is of one of the roles, and of that name."""
        return tls.check_role(self._certificate, self.peer, roles, name)

    def send(self, *pieces: Bytes) -> None:
        """Send all. Raises ConnectionLost, TimedOut when nothing moves for `silence` seconds."""
        for piece in pieces:
            view = memoryview(piece)
            at = 0
            while at < len(view):
                # The same bytes are given again after a wait: OpenSSL may have encrypted them already.
                at += self._attempt(partial(self._connection.send, view[at : at + _PIECE]), select.POLLOUT)

    def fill(self, buffer: memoryview) -> None:
        """Receive as many bytes as the buffer takes. Raises as `send`."""
        at = 0
        while at < len(buffer):
            count = self._attempt(partial(self._connection.recv_into, buffer[at:]), select.POLLIN)
            if not count:
                raise ConnectionLost("the other side closed the connection")
            at += count

    @property
    def can_send(self) -> bool:
        """Whether a little can be sent without waiting."""
        poll = select.poll()
        poll.register(self._fileno, select.POLLOUT)
        return not self._broken and bool(poll.poll(0))

    @property
    def hung_up(self) -> bool:
        """Whether the other side has closed or reset the connection; what it sent before may still be unread."""
        poll = select.poll()
        poll.register(self._fileno, select.POLLRDHUP)
        return self._broken or bool(poll.poll(0))

    def _attempt(self, call: Callable[[], int], direction: int) -> int:
        while True:
            try:
                with self._lock:
                    if self._broken:
                        raise ConnectionLost("the connection was closed")
                    return call()
            except ssl.SSLWantReadError:
                direction = select.POLLIN
            except ssl.SSLWantWriteError:
                direction = select.POLLOUT
            except BlockingIOError:
                pass  # a Unix socket that has to wait
            except ssl.SSLError as problem:
                raise _lost_or_refused(problem, self.peer) from problem
            except OSError as problem:
                raise ConnectionLost(problem.strerror or str(problem)) from problem
            self._wait(direction)

    def _wait(self, direction: int) -> None:
        poll = select.poll()
        poll.register(self._fileno, direction)
        if not poll.poll(self.limits.silence * 1000) and not self._broken:
            raise TimedOut(
                operation=f"waiting for {self.peer}", seconds=self.limits.silence, detail="Nothing came from it."
            )

    def abort(self) -> None:
        """End all waits at once; `close` is still to be called, when no thread uses the connection any more."""
        self._broken = True
        _shut(self._connection)

    def hang_up(self) -> None:
        """Send and receive nothing more; `close` then waits briefly until the other side has read what was sent, which
        a reset would discard."""
        self._broken = self._told = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._connection, socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket. May be called twice."""
        if self._told:
            self._told = False
            with self._lock:
                _linger(self._connection)
        self.abort()
        with self._lock:
            self._connection.close()


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # SSLSocket's own would continue unencrypted


@contextlib.contextmanager
def _closed_on_error(connection: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _shaken(
    context: ssl.SSLContext,
    plain: socket.socket,
    peer: str,
    limits: Limits,
    *,
    server: bool,
    host: str = "",
    begun: Callable[[Callable[[], None]], None] = lambda cut: None,
) -> ssl.SSLSocket:
    connection = context.wrap_socket(
        plain, server_side=server, server_hostname=host or None, do_handshake_on_connect=False
    )
    begun(partial(_shut, connection))
    try:
        connection.settimeout(limits.connect)
        connection.do_handshake()
    except TimeoutError as problem:
        connection.close()
        raise TimedOut(operation=f"TLS with {peer}", seconds=limits.connect, detail="") from problem
    except ssl.SSLError as problem:
        _linger(connection)
        found = _lost_or_refused(problem, peer)
        if isinstance(found, ConnectionLost) and not server:
            found = SiteUnreachable(site=peer, detail=str(found))
        raise found from problem
    except OSError as problem:
        connection.close()
        raise (ConnectionLost(str(problem)) if server else SiteUnreachable(site=peer, detail=str(problem))) from problem
    return connection


def _lost_or_refused(problem: ssl.SSLError, peer: str) -> AsrError | ConnectionLost:
    if isinstance(problem, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return ConnectionLost("the other side closed the connection")
    return tls.refusal(problem, peer)


def _linger(connection: socket.socket, seconds: float = 2.0) -> None:
    """Close so that the reason arrives: a connection that is closed with unread data would be reset."""
    ends = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_WR)
        connection.settimeout(seconds)
        while time.monotonic() < ends and socket.socket.recv(connection, 65536):
            pass
    connection.close()
