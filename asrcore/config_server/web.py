"""HTTPS with certificates of both sides: uvicorn, the components' TLS, and the caller's identity per connection."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable, MutableMapping
from typing import Any, Self

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from asrcore.closing import Closing
from asrcore.errors import AsrError, CannotListen, CertificateMissing, CertificateRole
from asrcore.wire.carrier import Address
from asrcore.wire.tls import Component, Identity, component_of

__all__ = ["WebServer", "peer_of"]

_log = logging.getLogger(__name__)

_PEER = "asr.peer"
_GRACE = 10  # seconds that requests under way have when the server ends
_MOST = 200  # connections and requests at a time
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
    """Passes the caller's certificate to the application, which ASGI servers do not do."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        encrypted = transport.get_extra_info("ssl_object")
        certificate = encrypted.getpeercert() if encrypted is not None else None
        app: Any = self.app

        async def with_peer(scope: Scope, receive: Receive, send: Send) -> None:
            scope[_PEER] = certificate
            await app(scope, receive, send)

        self.app = with_peer


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


class WebServer(Closing):
    """Serves an ASGI application from `start` on, in a separate thread. A new certificate or revocation list in the
    identity's directory applies from the next connection on."""

    def __init__(self, app: ASGIApp, address: Address, identity: Identity) -> None:
        """Raises IdentityUnusable."""
        self._identity = identity
        identity.context(server=True)
        self.address = address
        config = uvicorn.Config(
            app,
            host=address.host,
            port=address.port,
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_GRACE,
            limit_concurrency=_MOST,
            h11_max_incomplete_event_size=_HEAD,
            ssl_context_factory=self._tls,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def _tls(self, config: uvicorn.Config, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        first = self._identity.context(server=True)
        first.sslobject_class = _Handshake
        # Called in each handshake, whether the client names a server or not: re-read files apply at once.
        first.sni_callback = self._renewed
        return first

    def _renewed(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
        try:
            connection.context = self._identity.context(server=True)
        except AsrError as problem:
            _log.error("%s", problem)
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        return None

    def start(self) -> None:
        """Listen. Raises CannotListen."""
        host, port = self.address.host, self.address.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, port), family=family, backlog=_MOST)
        except OSError as problem:
            raise CannotListen(address=str(self.address), detail=problem.strerror or str(problem)) from problem
        self.address = Address(host, listening.getsockname()[1])
        self._thread = threading.Thread(target=self._run, args=[listening], name="web", daemon=True)
        self._thread.start()

    def _run(self, listening: socket.socket) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[listening]))
        except Exception:  # noqa: BLE001 - logged here, because no other thread waits for this one
            _log.exception("the server ended unexpectedly")
        finally:
            listening.close()

    def close(self) -> None:
        """End, after the requests under way. May be called twice."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self
