"""Listens for components: the TLS handshake of each accepted connection runs in a separate thread, within limits."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from asrcore.errors import AsrError, CannotListen, CertificateRole
from asrcore.wire.carrier import Address, Carrier, ConnectionLost, Limits
from asrcore.wire.channel import Channel, Handler
from asrcore.wire.failures import as_error
from asrcore.wire.tls import Identity, Role

__all__ = ["Listener"]

_log = logging.getLogger(__name__)

MOST_CHANNELS = 64
"""Connections at a time. Each holds a few MiB, so this limits memory."""
_LOOK = 1.0  # seconds between two checks of the identity and of what is left over


class Listener:
    """Accepts components of some roles and gives each connection to a handler."""

    def __init__(
        self,
        address: Address,
        identity: Identity,
        roles: Collection[Role],
        handler: Handler | None,
        *,
        limits: Limits | None = None,
        tidy: Callable[[], None] = lambda: None,
        admit: Callable[[Carrier], None] = lambda carrier: None,
        accepted: Callable[[Channel], None] = lambda channel: None,
        most: int = MOST_CHANNELS,
        handshakes: int | None = None,
    ) -> None:
        """Listens at once, and accepts from `start` on. `tidy` is called every second. `admit` is called after each TLS
        handshake; a connection for which it raises AsrError is closed without a hello. `accepted` is called for each
        new channel before it starts; a channel for which it raises gets the error and is closed. Without a handler
        nothing is served: only this side asks. At most `most` connections are open, and at most `handshakes` of them
        (all, by default) are not accepted yet.

        Raises CannotListen, IdentityUnusable.
        """
        self._identity = identity
        self._roles = frozenset(roles)
        self._handler = handler
        self._limits = limits or Limits()
        self._tidy = tidy
        self._admit = admit
        self._accepted = accepted
        self._most = most
        self._handshakes = most if handshakes is None else handshakes
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._shaking = 0
        self._stopped = threading.Event()
        self._version = identity.version()
        identity.context(server=True)
        try:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            self._socket = socket.create_server((address.host, address.port), family=family, backlog=64)
        except OSError as problem:
            raise CannotListen(address=str(address), detail=problem.strerror or str(problem)) from problem
        self._socket.settimeout(_LOOK)
        self.address = Address(address.host, self._socket.getsockname()[1])
        """Where it listens; with the port that was chosen for port 0."""
        self._thread = threading.Thread(target=self._accept, name="listener", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    @property
    def channels(self) -> list[Channel]:
        """The open ones."""
        with self._lock:
            self._channels = {channel for channel in self._channels if channel.error is None}
            return list(self._channels)

    def _accept(self) -> None:
        looked = time.monotonic()
        while not self._stopped.is_set():
            if time.monotonic() - looked >= _LOOK:
                looked = time.monotonic()
                self._look()
            try:
                plain, peer = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as problem:
                if not self._stopped.is_set():
                    _log.error("cannot accept: %s", problem)
                    self._stopped.wait(_LOOK)
                continue
            with self._lock:
                count = self._shaking + sum(channel.error is None for channel in self._channels)
                busy = count >= self._most or self._shaking >= self._handshakes
                self._shaking += not busy
            if busy:
                _log.warning("connection from %s refused: %d connections are open", peer[0], count)
                plain.close()
                continue
            name = str(Address(peer[0], peer[1]))
            threading.Thread(target=self._shake, args=(plain, name), name=f"accepting {name}", daemon=True).start()

    def _look(self) -> None:
        try:
            self._tidy()
            now = self._identity.version()
        except AsrError as problem:
            _log.error("%s", problem)
            return
        except Exception:  # noqa: BLE001 - the listener must live
            _log.exception("periodic clean-up failed")
            return
        if now != self._version:
            # A component that was accepted under the former files has to present its certificate again.
            self._version = now
            for channel in self.channels:
                channel.close("stopped", "the identity or the revocation list has changed: connect again")

    def _shake(self, plain: socket.socket, peer: str) -> None:
        try:
            carrier = Carrier.answer(plain, peer, self._identity, self._limits)
            try:
                self._admit(carrier)
            except BaseException:
                carrier.close()
                raise
            channel = Channel(carrier, dialled=False, about=_about(), handler=self._handler)
            try:
                component = carrier.check(self._roles)
            except CertificateRole as problem:
                _log.warning("%s", problem)
                channel.refuse(CertificateRole(**{**problem.attributes, "peer": str(self.address), "whose": "our"}))
                return
            with self._lock:
                self._channels = {item for item in self._channels if item.error is None} | {channel}
                stopped = self._stopped.is_set()
            if stopped:
                channel.close("stopped", "the service ends")
                return
            _log.info("%s connected from %s", component, peer)
            try:
                self._accepted(channel)
            except Exception as problem:
                channel.refuse(as_error(problem, peer))
                raise
            channel.start()
        except (AsrError, ConnectionLost) as problem:
            _log.warning("connection from %s refused: %s", peer, problem)
        except Exception:  # noqa: BLE001 - one connection is not the listener
            _log.exception("accepting a connection from %s failed", peer)
        finally:
            with self._lock:
                self._shaking -= 1

    def close(self) -> None:
        """Stop accepting, and end all connections with a goodbye. May be called twice."""
        self._stopped.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends a wait for a connection at once
        self._socket.close()
        if self._thread.is_alive():
            self._thread.join()
        for channel in self.channels:
            channel.close("stopped", "the service ends")


def _about() -> Mapping[str, Any]:
    return {"version": version("asrcore")}
