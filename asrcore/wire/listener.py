"""Listens for components: the TLS handshake of each accepted connection runs in a separate thread, within limits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from typing import Any

import attrs

from asrcore.errors import AsrError, CertificateRole
from asrcore.wire.carrier import Address, Carrier, ConnectionLost, Limits
from asrcore.wire.channel import Channel, Handler
from asrcore.wire.failures import as_error
from asrcore.wire.gate import HELLO_SECONDS, TLS_SECONDS, Full, Gate, Place, Places, listen
from asrcore.wire.tls import Identity, Role

__all__ = ["Listener"]

_log = logging.getLogger(__name__)

MOST_CHANNELS = 64
"""Connections at a time. Each holds a few MiB, so this limits memory."""
EACH = 16
"""Of them, those of one component."""
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
        each: int = EACH,
    ) -> None:
        """Listens at once, and accepts from `start` on. `tidy` is called every second. `admit` is called for each
        component of one of the roles after its TLS handshake; a connection for which it raises AsrError is closed
        without a hello. `accepted` is called for each new channel before it starts; a channel for which it raises gets
        the error and is closed. Without a handler nothing is served: only this side asks. At most `most` connections
        are open, `each` of them of one component: the one that had no request for the longest time is closed for the
        next. Those that have shown no certificate yet are not counted among them (see `gate`).

        Raises CannotListen, IdentityUnusable.
        """
        self._identity = identity
        self._roles = frozenset(roles)
        self._handler = handler
        self._limits = limits or Limits()
        self._shaking = attrs.evolve(self._limits, connect=min(self._limits.connect, TLS_SECONDS))
        self._tidy = tidy
        self._admit = admit
        self._accepted = accepted
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._stopped = threading.Event()
        self._version = identity.version()
        identity.context(server=True)
        listening, self.address = listen(address)
        """Where it listens; with the port that was chosen for port 0."""
        self._gate = Gate(listening, self._arrived, _log, Places(most=most, each=each))
        self.log: logging.Logger = self._gate.log
        """For lines about its connections: equal ones are logged once a minute, with their number."""
        self._looking = threading.Thread(target=self._look_after, name="listener", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._gate.start()
        self._looking.start()

    @property
    def channels(self) -> list[Channel]:
        """The open ones."""
        with self._lock:
            self._channels = {channel for channel in self._channels if channel.error is None}
            return list(self._channels)

    def _look_after(self) -> None:
        while not self._stopped.wait(_LOOK):
            self._look()

    def _look(self) -> None:
        try:
            self._tidy()
            now = self._identity.version()
        except AsrError as problem:
            self.log.error("%s", problem)
            return
        except Exception:
            self.log.exception("periodic clean-up failed")
            return
        if now != self._version:
            # A component that was accepted under the former files has to present its certificate again.
            self._version = now
            for channel in self.channels:
                channel.close("stopped", "the identity or the revocation list has changed: connect again")

    def _arrived(self, place: Place) -> None:
        threading.Thread(target=self._serve, args=(place,), name=f"accepting {place.peer}", daemon=True).start()

    def _serve(self, place: Place) -> None:
        kept = False
        try:
            kept = self._shake(place)
        except Full:
            self.log.warning("connection from %s refused: its component has too many at work", place.peer)
        except (AsrError, ConnectionLost) as problem:
            _forget(problem)
            if not place.refused:
                self.log.warning("connection from %s refused: %s", place.peer, problem)
        except Exception:
            self.log.exception("accepting a connection from %s failed", place.peer)
        finally:
            if not kept:
                place.leave()

    def _shake(self, place: Place) -> bool:
        """Whether there is a channel now, which leaves the place when it ends."""

        def begun(cut: Callable[[], None]) -> None:
            place.cut = cut

        carrier = Carrier.answer(place.socket, place.peer, self._identity, self._shaking, begun=begun)
        place.cut = carrier.abort
        try:
            try:
                component = carrier.check(self._roles)
            except CertificateRole as problem:
                # It learns the reason if its hello comes within what is left of the time for TLS.
                self.log.warning("%s", problem)
                channel = Channel(carrier, dialled=False, about=_about())
                channel.refuse(CertificateRole(**{**problem.attributes, "peer": str(self.address), "whose": "our"}))
                return False
            self._admit(carrier)
            place.identify(component)
        except BaseException:
            carrier.close()
            raise
        place.expect("send its hello", HELLO_SECONDS)
        channel = Channel(carrier, dialled=False, about=_about(), handler=self._handler, ended=place.leave)
        place.relax()
        place.idle_since = channel.idle_since
        with self._lock:
            self._channels = {item for item in self._channels if item.error is None} | {channel}
            stopped = self._stopped.is_set()
        if stopped:
            channel.close("stopped", "the service ends")
            return True
        self.log.info("%s connected from %s", component, place.peer, extra={"kind": str(component)})
        try:
            self._accepted(channel)
        except Exception as problem:
            channel.refuse(as_error(problem, place.peer))
            raise
        channel.start()
        return True

    def close(self) -> None:
        """Stop accepting, and end all connections with a goodbye. May be called twice."""
        self._stopped.set()
        self._gate.close()
        if self._looking.is_alive():
            self._looking.join()
        for channel in self.channels:
            channel.close("stopped", "the service ends")


def _forget(problem: BaseException | None) -> None:
    """Release what the frames of its tracebacks hold, such as buffers: in a circle, they would wait for the garbage
    collector, which runs seldom. 850 connections without a hello kept 66 MiB."""
    while problem is not None:
        problem.__traceback__ = None
        problem = problem.__cause__ or problem.__context__


def _about() -> Mapping[str, Any]:
    return {"version": version("asrcore")}
