"""The endpoint of servers' connections: a listener, one session per enrolled server, and sharing with other processes.

One process at a time listens; it holds a lock in the spool. Other processes of this host (an `asr` command beside the
replication service) use it through a unix socket in the spool.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import attrs

from asr_driver_physical.servers.identity import Identity, ServerRecord
from asr_driver_physical.servers.readiness import RENEW_SECONDS
from asr_driver_physical.settings import SiteSettings
from asr_mobility.channel import Answer, Bytes, CallFailed, Channel, ChannelClosed
from asrcore.errors import AccessDenied, HostIncomplete, SecretKeyUnusable, SiteUnreachable, TimedOut, catalogue

__all__ = ["CALL_SECONDS", "Gateway"]

_log = logging.getLogger(__name__)

CALL_SECONDS = 60.0
HANDSHAKE_SECONDS = 15.0
DIAL_IN_SECONDS = 20.0
"""How long a call waits for a server that is not connected: longer than a server's wait between attempts to connect."""
_TAKE_OVER_SECONDS = 10.0
WATCH_SECONDS = 2.0
_RENEW_AGAIN_SECONDS = 24 * 3600.0
_MOST_HANDSHAKES = 32


class _Hub:
    """The listener; it belongs to the process that holds the lock."""

    def __init__(self, settings: SiteSettings, identity: Identity) -> None:
        self._identity = identity
        self._changed = threading.Condition()
        self._sessions: dict[str, Channel] = {}
        self._closed = threading.Event()
        self._handshakes = threading.BoundedSemaphore(_MOST_HANDSHAKES)
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        self._listener = socket.create_server((settings.host, settings.port), family=family, backlog=64)
        # A directory's descriptor, since a unix socket's path may have no more than 107 bytes.
        self._local = socket.socket(socket.AF_UNIX)
        path = settings.spool / "hub.sock"
        path.unlink(missing_ok=True)
        with _by_descriptor(path) as short:
            self._local.bind(short)
        path.chmod(0o600)
        self._local.listen(16)
        self._renew_at: dict[str, float] = {}
        for work in (self._accept_servers, self._accept_local, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        for listener in (self._listener, self._local):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._changed:
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for session in sessions:
            session.close()

    # -- servers

    def _accept_servers(self) -> None:
        while not self._closed.is_set():
            try:
                plain, address = self._listener.accept()
            except OSError:
                return
            if not self._handshakes.acquire(blocking=False):
                plain.close()  # over the limit of connections; the server retries
                continue
            threading.Thread(target=self._greet, args=(plain, address), daemon=True).start()

    def _greet(self, plain: socket.socket, address: tuple[str, int]) -> None:
        try:
            plain.settimeout(HANDSHAKE_SECONDS)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            carrier = self._identity.context().wrap_socket(plain, server_side=True)
        except (OSError, ValueError) as problem:
            _log.warning("%s: refused: %s", address[0], problem)
            plain.close()
            return
        finally:
            self._handshakes.release()
        try:
            record = self._admitted(carrier)
            session = Channel(carrier, dialled=False, me={"name": "process-server"})
            if session.peer.get("identity") != record.identity:
                session.end("its hardware differs from the enrolled hardware")
                raise PermissionError(session.reason)
        except (OSError, ChannelClosed, PermissionError) as problem:
            _log.warning("%s: refused: %s", address[0], problem)
            carrier.close()
            return
        with self._changed:
            former = self._sessions.get(record.name)
            self._sessions[record.name] = session
            self._changed.notify_all()
        if former is not None:
            former.end("the server has connected again")
        _log.info("server %s connected from %s", record.name, address[0])
        if record.fence is not None:
            _log.warning("server %s is quarantined (%s): shutting it down", record.name, record.fence.get("reason"))
            with contextlib.suppress(CallFailed, ChannelClosed, TimeoutError):
                session.call("power-off", {"graceful": True}, timeout=CALL_SECONDS)

    def _admitted(self, carrier: ssl.SSLSocket) -> ServerRecord:
        certificate = carrier.getpeercert() or {}
        names = [str(value) for kind, value in cast("Any", certificate.get("subjectAltName", ())) if kind == "URI"]
        name = next((item.removeprefix("asr://agent/") for item in names if item.startswith("asr://agent/")), "")
        record = self._identity.server(name) if name else None
        if record is None:
            raise PermissionError(f"not an enrolled server: {', '.join(names) or 'a certificate without a name'}")
        shown = hashlib.sha256(carrier.getpeercert(binary_form=True) or b"").hexdigest()
        if shown in record.renewals:  # received: the former one is refused from now on
            ends = record.renewals[shown]
            taken = self._identity.change(
                name, lambda record: attrs.evolve(record, fingerprint=shown, ends=ends, renewals={})
            )
            record = taken or record
        if shown != record.fingerprint:
            raise PermissionError(f"the certificate of {name} is not the enrolled one")
        return record

    # -- servers that are connected

    def _watch(self) -> None:
        """Disconnect removed servers, renew certificates that end soon."""
        while not self._closed.wait(WATCH_SECONDS):
            with self._changed:
                sessions = [(name, session) for name, session in self._sessions.items() if not session.ended]
            for name, session in sessions:
                try:
                    record = self._identity.server(name)
                    if record is None:
                        self._drop(name)
                    elif record.ends and record.ends - time.time() < RENEW_SECONDS:
                        self._renew(record, session)
                except (HostIncomplete, SecretKeyUnusable) as problem:
                    _log.warning("server %s: its certificate cannot be renewed: %s", name, problem)
                except (OSError, ValueError, TypeError) as problem:
                    _log.warning("server %s: its record cannot be read: %s", name, problem)

    def _renew(self, record: ServerRecord, session: Channel) -> None:
        if time.monotonic() < self._renew_at.get(record.name, 0.0):
            return
        self._renew_at[record.name] = time.monotonic() + _RENEW_AGAIN_SECONDS
        issued = self._identity.issue(record.name)

        def given(record: ServerRecord) -> ServerRecord:
            return attrs.evolve(record, renewals={**record.renewals, issued.fingerprint: issued.ends})

        self._identity.change(record.name, given)  # first: it may have the new one even if its answer is lost
        try:
            session.call("renew", {"pem": issued.pem.decode()}, timeout=CALL_SECONDS)
        except (CallFailed, ChannelClosed, TimeoutError) as problem:
            _log.warning("server %s: its certificate could not be renewed: %s", record.name, problem)
        else:
            _log.info("server %s received a new certificate", record.name)

    def connected(self) -> dict[str, dict[str, Any]]:
        with self._changed:
            return {name: dict(session.peer) for name, session in self._sessions.items() if not session.ended}

    def call(
        self, server: str, call: str, arguments: Mapping[str, Any], timeout: float
    ) -> tuple[Mapping[str, Any], Bytes]:
        end = time.monotonic() + min(timeout, DIAL_IN_SECONDS)
        with self._changed:
            while (session := self._sessions.get(server)) is None or session.ended:
                left = end - time.monotonic()
                if left <= 0 or self._closed.is_set():
                    raise CallFailed("site-unreachable", {"site": "", "detail": f"server {server} is not connected"})
                self._changed.wait(min(left, 0.5))
        try:
            return session.call(call, arguments, timeout=timeout)
        except ChannelClosed as problem:
            raise CallFailed("site-unreachable", {"site": "", "detail": f"server {server}: {problem}"}) from problem
        except TimeoutError as problem:
            session.end("it does not answer")
            attributes = {"operation": f"{call} on server {server}", "seconds": timeout, "detail": ""}
            raise CallFailed("timed-out", attributes) from problem

    def _drop(self, server: str) -> None:
        with self._changed:
            session = self._sessions.pop(server, None)
        if session is not None:
            session.end("it is no longer enrolled")

    # -- other processes of this host

    def _accept_local(self) -> None:
        while not self._closed.is_set():
            try:
                carrier, _ = self._local.accept()
            except OSError:
                return
            with contextlib.suppress(ChannelClosed, OSError):
                Channel(carrier, dialled=False, me={}, serve=self._relay, workers=4)

    def _relay(self, call: str, arguments: Mapping[str, Any]) -> Answer:
        if call == "connected":
            return {"servers": self.connected()}, b""
        return self.call(arguments["server"], call, arguments["arguments"], float(arguments["timeout"]))


class Gateway:
    """The servers of a site, whichever process listens for them. Safe to use from several threads."""

    def __init__(self, name: str, settings: SiteSettings, identity: Identity) -> None:
        self._name, self._settings, self._identity = name, settings, identity
        self._lock = threading.Lock()
        self._lock_file: int | None = None
        self._hub: _Hub | None = None
        self._relay: Channel | None = None
        self._ensure()

    def close(self) -> None:
        """Stop listening, if this process does; may be called twice."""
        with self._lock:
            if self._hub is not None:
                self._hub.close()
                self._hub = None
            if self._relay is not None:
                self._relay.close()
                self._relay = None
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None

    @property
    def listens(self) -> bool:
        """Whether this process listens for the servers."""
        return self._hub is not None

    def _ensure(self) -> _Hub | Channel:
        with self._lock:
            if self._hub is not None:
                return self._hub
            if self._relay is not None and not self._relay.ended:
                return self._relay
            end = time.monotonic() + _TAKE_OVER_SECONDS
            while True:
                if self._take_lock():
                    self._hub = self._listen()
                    return self._hub
                try:
                    self._relay = self._join()
                except (OSError, ChannelClosed) as problem:
                    if time.monotonic() > end:
                        detail = f"another process listens for the servers but does not answer: {problem}"
                        raise SiteUnreachable(site=self._name, detail=detail) from problem
                    time.sleep(0.1)
                else:
                    return self._relay

    def _take_lock(self) -> bool:
        descriptor = os.open(self._settings.spool / "hub.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._lock_file = descriptor
        return True

    def _listen(self) -> _Hub:
        try:
            return _Hub(self._settings, self._identity)
        except OSError as problem:
            assert self._lock_file is not None
            os.close(self._lock_file)
            self._lock_file = None
            detail = f"cannot listen on {self._settings.host}:{self._settings.port}: {problem.strerror or problem}"
            raise SiteUnreachable(site=self._name, detail=detail) from problem

    def _join(self) -> Channel:
        carrier = socket.socket(socket.AF_UNIX)
        try:
            carrier.settimeout(5)
            with _by_descriptor(self._settings.spool / "hub.sock") as short:
                carrier.connect(short)
            return Channel(carrier, dialled=True, me={})
        except BaseException:
            carrier.close()
            raise

    def call(
        self, server: str, call: str, arguments: Mapping[str, Any], *, timeout: float = CALL_SECONDS
    ) -> tuple[Mapping[str, Any], Bytes]:
        """Call a server's agent. Raises the error that it returns, SiteUnreachable, TimedOut."""
        try:
            way = self._ensure()
            if isinstance(way, _Hub):
                return way.call(server, call, arguments, timeout)
            request = {"server": server, "arguments": dict(arguments), "timeout": timeout}
            return way.call(call, request, timeout=timeout + DIAL_IN_SECONDS)
        except CallFailed as refused:
            raise self._translated(refused, server) from refused
        except ChannelClosed as problem:
            raise SiteUnreachable(site=self._name, detail=str(problem)) from problem
        except TimeoutError as problem:
            raise TimedOut(operation=f"{call} on server {server}", seconds=timeout, detail=str(problem)) from problem

    def connected(self) -> dict[str, dict[str, Any]]:
        """The connected servers, by name, with what each reported about itself. Raises SiteUnreachable."""
        try:
            way = self._ensure()
            if isinstance(way, _Hub):
                return way.connected()
            head, _ = way.call("connected", {}, timeout=CALL_SECONDS)
            return dict(head["servers"])
        except (ChannelClosed, TimeoutError) as problem:
            raise SiteUnreachable(site=self._name, detail=str(problem)) from problem

    def _translated(self, refused: CallFailed, server: str) -> Exception:
        kind = catalogue().get(refused.code)
        attributes = dict(refused.attributes)
        for name, value in (("site", self._name), ("machine", server)):
            if name in attributes:
                attributes[name] = value
        try:
            if kind is not None:
                return kind(**attributes)
        except TypeError:
            pass
        return AccessDenied(site=self._name, detail=f"server {server} returned the unknown error {refused.code!r}")


@contextlib.contextmanager
def _by_descriptor(path: Path):  # type: ignore[no-untyped-def]
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
