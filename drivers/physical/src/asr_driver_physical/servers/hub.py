"""The endpoint of servers' connections: a listener, one session per enrolled server, and sharing with other processes.

One process at a time listens; it holds a lock in the spool. Other processes of this host (an `asr` command beside the
replication service) use it through a unix socket in the spool.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import attrs

from asr_driver_physical.servers.identity import Identity, ServerRecord
from asr_driver_physical.servers.readiness import renewal_due
from asr_driver_physical.settings import DRIVER, SiteSettings
from asrcore.errors import (
    AccessDenied,
    AsrError,
    CannotListen,
    HostIncomplete,
    InvalidSetting,
    PeerError,
    SecretKeyUnusable,
    SiteUnreachable,
    TimedOut,
    UnsupportedOperation,
)
from asrcore.wire import Address, Answer, Carrier, Channel, Limits, Listener, Role

__all__ = ["CALL_SECONDS", "Gateway"]

_log = logging.getLogger(__name__)

CALL_SECONDS = 60.0
# An agent sends something every 10 seconds, its keep-alives included.
_SERVERS = Limits(connect=15.0, silence=35.0)
_LOCAL = Limits(connect=5.0)
DIAL_IN_SECONDS = 20.0
"""How long a call waits for a server that is not connected: longer than a server's wait between attempts to connect."""
_TAKE_OVER_SECONDS = 10.0
WATCH_SECONDS = 2.0
_ACCEPT_AGAIN_SECONDS = 1.0
_RENEW_AGAIN_SECONDS = 24 * 3600.0
_MOST_SERVERS = 10_000  # in practice no limit: an enrolled server has one connection
_EACH = 4  # of a server: a new connection may arrive before the former one is seen to be lost


class _Hub:
    """The listener; it belongs to the process that holds the lock."""

    def __init__(self, name: str, settings: SiteSettings, identity: Identity) -> None:
        """Raises SiteUnreachable, IdentityUnusable, OSError."""
        self._name = name
        self._identity = identity
        self._changed = threading.Condition()
        self._sessions: dict[str, Channel] = {}
        self._relays: set[Channel] = set()
        self._closed = threading.Event()
        self._renew_at: dict[str, float] = {}
        address = Address(settings.host, settings.port)
        try:
            self._listener = Listener(
                address,
                identity.tls,
                [Role.AGENT],
                None,
                limits=_SERVERS,
                admit=self._admit,
                accepted=self._accepted,
                most=_MOST_SERVERS,
                each=_EACH,
            )
        except CannotListen as problem:
            detail = f"cannot listen on {address}: {problem.attributes['detail']}"
            raise SiteUnreachable(site=name, detail=detail) from problem
        self._local = socket.socket(socket.AF_UNIX)
        try:
            path = settings.spool / "hub.sock"
            path.unlink(missing_ok=True)
            with _by_descriptor(path) as short:
                self._local.bind(short)
            path.chmod(0o600)
            self._local.listen(16)
        except BaseException:
            self._local.close()
            self._listener.close()
            raise
        self._listener.start()
        for work in (self._accept_local, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._local.shutdown(socket.SHUT_RDWR)
        self._local.close()
        self._listener.close()
        with self._changed:
            channels = [*self._sessions.values(), *self._relays]
            self._sessions.clear()
        for channel in channels:
            channel.close("stopped", "the process server ends")

    # -- servers

    def _admit(self, carrier: Carrier) -> None:
        """Before the hello, so that an agent that is refused waits longer and longer before it connects again. Raises
        CertificateRole, AccessDenied."""
        name, shown = carrier.check([Role.AGENT]).name, carrier.fingerprint
        record = self._enrolled(name)
        if shown in record.renewals:  # received: the former one is refused from now on
            ends = record.renewals[shown]
            taken = self._identity.change(
                name, lambda record: attrs.evolve(record, fingerprint=shown, ends=ends, renewals={})
            )
            record = taken or record
        if shown != record.fingerprint:
            raise self._denied(f"the certificate of {name} is not the enrolled one")

    def _accepted(self, session: Channel) -> None:
        """A server has connected. Raises AccessDenied."""
        record = self._enrolled(session.component.name)
        if session.about.get("identity") != record.identity:
            raise self._denied(f"the hardware of {record.name} differs from the enrolled hardware")
        with self._changed:
            former = self._sessions.get(record.name)
            self._sessions[record.name] = session
            self._changed.notify_all()
        if former is not None:
            former.close("stopped", "the server has connected again")
        if record.fence is not None:
            reason, kind = record.fence.reason, {"kind": record.name}
            self._listener.log.warning(
                "server %s is quarantined (%s): shutting it down", record.name, reason, extra=kind
            )
            threading.Thread(target=self._shut_down, args=(session,), daemon=True).start()

    @staticmethod
    def _shut_down(session: Channel) -> None:
        with contextlib.suppress(AsrError, TimeoutError):
            session.ask("power-off", {"graceful": True}, timeout=CALL_SECONDS)

    def _enrolled(self, name: str) -> ServerRecord:
        record = self._identity.server(name)
        if record is None:
            raise self._denied(f"{name} is not an enrolled server")
        return record

    def _denied(self, detail: str) -> AccessDenied:
        return AccessDenied(site=self._name, detail=detail)

    # -- servers that are connected

    def _watch(self) -> None:
        """Disconnect removed servers, renew certificates that end soon."""
        while not self._closed.wait(WATCH_SECONDS):
            with self._changed:
                sessions = [(name, session) for name, session in self._sessions.items() if session.error is None]
            for name, session in sessions:
                try:
                    record = self._identity.server(name)
                    if record is None:
                        self._drop(name)
                    elif renewal_due(record.ends):
                        self._renew(record, session)
                except (HostIncomplete, InvalidSetting, SecretKeyUnusable) as problem:
                    _log.warning("server %s: its certificate cannot be renewed: %s", name, problem)
                except (AsrError, OSError, ValueError, TypeError) as problem:
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
            session.ask("renew", {"pem": issued.pem.decode()}, timeout=CALL_SECONDS)
        except (AsrError, TimeoutError) as problem:
            _log.warning("server %s: its certificate could not be renewed: %s", record.name, problem)
        else:
            _log.info("server %s received a new certificate", record.name)

    def connected(self) -> dict[str, dict[str, Any]]:
        with self._changed:
            return {name: dict(session.about) for name, session in self._sessions.items() if session.error is None}

    def ask(self, server: str, call: str, arguments: Mapping[str, Any], timeout: float) -> Answer:
        """Call a server's agent. Raises the error that it returns, SiteUnreachable, TimedOut."""
        end = time.monotonic() + min(timeout, DIAL_IN_SECONDS)
        with self._changed:
            while (session := self._sessions.get(server)) is None or session.error is not None:
                left = end - time.monotonic()
                if left <= 0 or self._closed.is_set():
                    raise SiteUnreachable(site=self._name, detail=f"server {server} is not connected")
                self._changed.wait(min(left, 0.5))
        try:
            return session.ask(call, arguments, timeout=timeout)
        except TimeoutError as problem:
            session.close("stopped", "it does not answer")
            raise TimedOut(operation=f"{call} on server {server}", seconds=timeout, detail="") from problem
        except AsrError as problem:
            if problem is session.error:
                raise SiteUnreachable(site=self._name, detail=f"server {server}: {_why(problem)}") from problem
            raise

    def _drop(self, server: str) -> None:
        with self._changed:
            session = self._sessions.pop(server, None)
        if session is not None:
            session.close("stopped", "it is no longer enrolled")

    # -- other processes of this host

    def _accept_local(self) -> None:
        while not self._closed.is_set():
            try:
                plain, _ = self._local.accept()
            except OSError as problem:
                if not self._closed.is_set():  # such as no descriptor: the next attempt may succeed
                    self._listener.log.error("cannot accept a process of this host: %s", problem)
                    self._closed.wait(_ACCEPT_AGAIN_SECONDS)
                continue
            threading.Thread(target=self._serve_local, args=(plain,), daemon=True).start()

    def _serve_local(self, plain: socket.socket) -> None:
        try:
            relay = Channel(Carrier(plain, "a process of this host", _LOCAL), dialled=False, handler=self)
        except AsrError as problem:
            _log.info("%s", problem)
            return
        with self._changed:
            self._relays.add(relay)
        relay.start()
        if self._closed.is_set():
            relay.close("stopped", "the process server ends")

    def call(self, channel: Channel, call: str, head: Mapping[str, Any], body: object, watch: object) -> Answer:
        """A call of another process. See Handler."""
        if call == "connected":
            return Answer({"servers": self.connected()})
        return self.ask(head["server"], call, head["arguments"], float(head["timeout"]))

    def stream(self, channel: Channel, call: str, head: Mapping[str, Any]) -> NoReturn:
        """Agents take no data. See Handler."""
        raise UnsupportedOperation(driver=DRIVER, operation=call)

    def lost(self, channel: Channel) -> None:
        """See Handler."""
        with self._changed:
            self._relays.discard(channel)


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
            if self._relay is not None and self._relay.error is None:
                return self._relay
            end = time.monotonic() + _TAKE_OVER_SECONDS
            while True:
                if self._take_lock():
                    self._hub = self._listen()
                    return self._hub
                try:
                    self._relay = self._join()
                except (OSError, AsrError) as problem:
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
            return _Hub(self._name, self._settings, self._identity)
        except BaseException as problem:
            assert self._lock_file is not None
            os.close(self._lock_file)
            self._lock_file = None
            if isinstance(problem, OSError):
                detail = f"cannot use {self._settings.spool / 'hub.sock'}: {problem.strerror or problem}"
                raise SiteUnreachable(site=self._name, detail=detail) from problem
            raise

    def _join(self) -> Channel:
        plain = socket.socket(socket.AF_UNIX)
        try:
            plain.settimeout(_LOCAL.connect)
            with _by_descriptor(self._settings.spool / "hub.sock") as short:
                plain.connect(short)
            relay = Channel(Carrier(plain, "the process that listens for the servers", _LOCAL), dialled=True)
        except BaseException:
            plain.close()
            raise
        relay.start()
        return relay

    def call(
        self, server: str, call: str, arguments: Mapping[str, Any], *, timeout: float = CALL_SECONDS
    ) -> tuple[Mapping[str, Any], bytes | bytearray | memoryview]:
        """Call a server's agent. Raises the error that it returns, SiteUnreachable, TimedOut."""
        way = self._ensure()
        try:
            if isinstance(way, _Hub):
                answer = way.ask(server, call, arguments, timeout)
            else:
                request = {"server": server, "arguments": dict(arguments), "timeout": timeout}
                answer = way.ask(call, request, timeout=timeout + DIAL_IN_SECONDS)
        except TimeoutError as problem:
            raise TimedOut(operation=f"{call} on server {server}", seconds=timeout, detail="") from problem
        except AsrError as problem:
            raise self._translated(problem, way, server) from problem
        return answer.head, answer.body

    def connected(self) -> dict[str, dict[str, Any]]:
        """The connected servers, by name, with what each reported about itself. Raises SiteUnreachable."""
        way = self._ensure()
        if isinstance(way, _Hub):
            return way.connected()
        try:
            return dict(way.ask("connected", timeout=CALL_SECONDS).head["servers"])
        except TimeoutError as problem:
            raise SiteUnreachable(site=self._name, detail=str(problem)) from problem
        except AsrError as problem:
            raise self._translated(problem, way, "") from problem

    def _translated(self, problem: AsrError, way: _Hub | Channel, server: str) -> AsrError:
        """As this site's: an agent knows neither the site's name nor its own; another process has its own name for the
        site."""
        if isinstance(way, Channel) and problem is way.error:
            return SiteUnreachable(site=self._name, detail=_why(problem))
        if isinstance(problem, PeerError):
            detail = f"server {server} returned the unknown error {problem.attributes['code']!r}"
            return AccessDenied(site=self._name, detail=detail)
        known = {"site": self._name, "machine": server}
        attributes = {name: known.get(name, value) for name, value in problem.attributes.items()}
        return type(problem)(**attributes)


def _why(problem: AsrError) -> str:
    return str(problem.attributes.get("detail") or problem)


@contextlib.contextmanager
def _by_descriptor(path: Path) -> Iterator[str]:
    """A short path, through a descriptor of the directory: the path of a Unix socket has at most 107 bytes."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
