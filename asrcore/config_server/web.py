"""HTTPS with certificates of both sides: uvicorn, the components' TLS, and the caller's identity per connection."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any, Self

import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from asrcore.closing import Closing
from asrcore.errors import AsrError, CertificateMissing, CertificateRole
from asrcore.wire.carrier import Address
from asrcore.wire.gate import TLS_SECONDS, Full, Gate, Place, Places, listen
from asrcore.wire.tls import Component, Identity, component_of, refusal

__all__ = ["WebServer", "peer_of"]

_log = logging.getLogger(__name__)

_PEER = "asr.peer"
MOST = 256
"""Connections of components at a time."""
EACH = 16
"""Of them, those of one component."""
HEAD_SECONDS = 10.0
"""For the head of a request, from its first byte on; for the first one from the handshake on."""
BODY_SECONDS = 30.0
ANSWER_SECONDS = 60.0
"""For the caller to take the answer."""
_GRACE = 10  # seconds that requests under way have when the server ends
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
_HEAD = 16 * 1024  # bytes of a request's head
_HEARD = 8  # pieces that are still read from a caller who was refused


def peer_of(scope: MutableMapping[str, Any]) -> tuple[Component, str]:
    """Who calls, and the serial number of its certificate (hexadecimal). Raises CertificateMissing, CertificateRole."""
    certificate = scope.get(_PEER)
    if not certificate:
        raise CertificateMissing(peer="a caller", whose="its")
    try:
        return component_of(certificate), f"{int(certificate['serialNumber'], 16):x}"
    except (ValueError, KeyError) as problem:
        raise CertificateRole(peer="a caller", whose="its", found="no component", wanted="a component") from problem


class _Protocol(H11Protocol):
    """Keeps a connection's place, gives each part of a request its time, and passes the caller's certificate to the
    application, which ASGI servers do not do."""

    def __init__(self, place: Place, log: logging.Logger, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.logger = log
        self._place = place
        self._in_head = False
        self._worked_at = 0.0
        self._peer: Mapping[str, Any] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._peer = transport.get_extra_info("ssl_object").getpeercert()
        self._worked_at = time.monotonic()
        self._place.cut = self._cut
        self._place.idle_since = self._idle_since
        served: Any = self.app

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            await self._serve(served, scope, receive, send)

        self.app = serve
        try:
            component = component_of(self._peer)
        except ValueError:
            return  # it is answered with the reason, if it asks within what is left of the time for TLS
        try:
            self._place.identify(component)
        except Full:
            self.logger.warning(
                "connection from %s refused: %s has too many requests at work", self._place.peer, component
            )
            transport.write(_BUSY)
            transport.close()
            return
        self._place.expect("send the head of a request", HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._place.leave()

    def data_received(self, data: bytes) -> None:
        if not self._at_work and not self._in_head:
            self._in_head = True
            self._place.expect("send the head of a request", HEAD_SECONDS)
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._worked_at = time.monotonic()
        self._place.expect("take the answer", ANSWER_SECONDS)
        super().on_response_complete()

    def _cut(self) -> None:
        with suppress(RuntimeError):  # the loop has ended, and so has every connection
            self.loop.call_soon_threadsafe(self.transport.abort)

    @property
    def _at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _idle_since(self) -> float | None:
        return None if self._at_work else self._worked_at

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._in_head = False
        self._place.relax()
        asked = read = False

        async def received() -> Message:
            nonlocal asked, read
            if not asked:
                asked = True
                self._place.expect("send the body of its request", BODY_SECONDS)
            message = await receive()
            if not read and not message.get("more_body"):
                read = True
                self._place.relax()
            return message

        async def sent(message: Message) -> None:
            self._place.expect("take the answer", ANSWER_SECONDS)
            await send(message)

        scope[_PEER] = self._peer
        with suppress(ClientDisconnect):  # its connection was lost or cut while its body was read
            await app(scope, received, sent)


class _Handshake(ssl.SSLObject):
    """Sends the caller the reason why its certificate is refused. After a failed handshake asyncio closes the
    connection before the alert is sent, so the failure is raised later: when the caller hangs up or sends more."""

    _failed: ssl.SSLError | None = None
    _heard = 0

    def do_handshake(self) -> None:
        if self._failed is None:
            try:
                super().do_handshake()
                return
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as problem:
                self._failed = problem
        self._heard += 1
        if self._heard > _HEARD:
            raise self._failed
        raise ssl.SSLWantReadError  # what is to be sent is sent then, the alert


class _Server(uvicorn.Server):
    """Its connections come from a gate, which it opens when it is ready."""

    def __init__(self, config: uvicorn.Config, gate: Gate) -> None:
        super().__init__(config)
        self._gate = gate

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._gate.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gate.close()
        await super().shutdown(sockets)


class WebServer(Closing):
    """Serves an ASGI application from `start` on, in a separate thread. A new certificate or revocation list in the
    identity's directory applies from the next connection on."""

    def __init__(self, app: ASGIApp, address: Address, identity: Identity, places: Places | None = None) -> None:
        """Raises IdentityUnusable."""
        self._app = app
        self._identity = identity
        identity.context(server=True)
        self.address = address
        self._places = places or Places(most=MOST, each=EACH)
        self._gate: Gate | None = None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._taking: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen. Raises CannotListen."""
        listening, self.address = listen(self.address)
        self._gate = Gate(listening, self._arrived, _log, self._places)
        config = uvicorn.Config(
            self._app,
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_GRACE,
            h11_max_incomplete_event_size=_HEAD,
        )
        self._server = _Server(config, self._gate)
        self._thread = threading.Thread(target=self._run, args=[self._server, self._gate], name="web", daemon=True)
        self._thread.start()

    def _run(self, server: _Server, gate: Gate) -> None:
        try:
            asyncio.run(self._serve(server, gate))
        except Exception:  # noqa: BLE001 - logged here, because no other thread waits for this one
            _log.exception("the server ended unexpectedly")
        finally:
            gate.close()

    async def _serve(self, server: _Server, gate: Gate) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(partial(_defect, gate.log))
        await server.serve(sockets=[])

    def _arrived(self, place: Place) -> None:
        self._loop.call_soon_threadsafe(self._begin, place)

    def _begin(self, place: Place) -> None:
        task = self._loop.create_task(self._take(place))
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    async def _take(self, place: Place) -> None:
        """The TLS handshake, and then over to uvicorn's protocol, which leaves the place."""
        assert self._server is not None
        assert self._gate is not None
        if place.refused:  # dropped while it waited for its turn
            place.socket.close()
            place.leave()
            return
        server, log = self._server, self._gate.log
        try:
            context = self._identity.context(server=True)
        except AsrError as problem:
            log.error("%s", problem)
            place.socket.close()
            place.leave()
            return
        context.sslobject_class = _Handshake
        try:
            await self._loop.connect_accepted_socket(
                lambda: _Protocol(place, log, server.config, server.server_state, server.lifespan.state, self._loop),
                place.socket,
                ssl=context,
                ssl_handshake_timeout=TLS_SECONDS + _GRACE,  # the gate ends it before
                ssl_shutdown_timeout=ANSWER_SECONDS,
            )
        except OSError as problem:
            # The traceback would keep the connection's 256 KiB until the garbage collector runs, which is seldom.
            problem.with_traceback(None)
            place.leave()
            if not place.refused:
                why = refusal(problem, place.peer) if isinstance(problem, ssl.SSLError) else "it was closed"
                log.warning("connection from %s refused: %s", place.peer, why)

    def close(self) -> None:
        """End, after the requests under way. May be called twice."""
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self


def _defect(log: logging.Logger, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """What went wrong on a connection where nothing waits for it."""
    problem = context.get("exception")
    if not isinstance(problem, OSError):  # which is how connections end
        log.error("%s", context.get("message"), exc_info=problem)
