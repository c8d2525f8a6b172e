"""Listeners under connections that do nothing: a good client gets in, whoever else holds connections, and how many."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asr_driver_physical.servers.hub import Gateway
from asr_driver_physical.servers.identity import Identity as SiteIdentity
from asr_driver_physical.settings import SiteSettings
from asrcore.config_server.web import WebServer
from asrcore.remote.master_target import MasterTarget
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.wire import frames
from asrcore.wire.carrier import Address
from asrcore.wire.tls import Identity
from drivers.physical.tests.test_parts import enrol
from tests.certificates import Authority

GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@attrs.define
class Listening:
    """A listener, a client of it that is let in, and one with a certificate that leads nowhere."""

    address: Address
    good: ssl.SSLContext
    other: ssl.SSLContext
    asks: Callable[[], bytes]
    opened: list[socket.socket] = attrs.field(factory=list)

    def connect(self, first: bytes = b"") -> socket.socket:
        made = socket.create_connection((self.address.host, self.address.port), 10)
        made.sendall(first)
        self.opened.append(made)
        return made

    def connect_with(self, context: ssl.SSLContext, first: bytes = b"") -> ssl.SSLSocket:
        made = context.wrap_socket(self.connect())
        self.opened.append(made)
        made.sendall(first)
        return made

    def lets_in(self) -> bool:
        """Whether a good client is answered."""
        made = self.connect_with(self.good, self.asks())
        try:
            return made.recv(100).startswith((b"HTTP/1.1 200", b"ASRW"))  # an answer, or a hello
        except (ssl.SSLError, ConnectionError):
            return False
        finally:
            made.close()


def hello() -> bytes:
    return frames.Connection(dialled=True, me={"session": "good", "silence": 30.0}).hello()


def context_of(directory: Path) -> ssl.SSLContext:
    return Identity(directory).context(server=False)


def config_server(folder: Path, stack: ExitStack) -> Listening:
    authority = Authority()
    own = Identity(authority.issue(folder / "own", "config-server"))
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))])
    server = stack.enter_context(WebServer(app, Address("127.0.0.1", 0), own))
    good, other = authority.issue(folder / "good", "operator"), authority.issue(folder / "other", "agent")
    return Listening(server.address, context_of(good), context_of(other), lambda: GET)


def master_target(folder: Path, stack: ExitStack) -> Listening:
    authority = Authority()
    MemoryWorld("away")
    site = stack.enter_context(MemoryDriver().connect("away", {"world": "away"}))
    own = Identity(authority.issue(folder / "own", "master-target"))
    target = stack.enter_context(MasterTarget(site, Address("127.0.0.1", 0), own))
    good, other = authority.issue(folder / "good", "process-server"), authority.issue(folder / "other", "agent")
    return Listening(target.address, context_of(good), context_of(other), hello)


def hub(folder: Path, stack: ExitStack) -> Listening:
    spool = folder / "spool"
    spool.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = SiteSettings("127.0.0.1", port, folder / "identity", spool)
    identity = SiteIdentity(settings.identity)
    stack.callback(Gateway("dc", settings, identity).close)
    good, other = enrol(identity, folder, "box"), enrol(identity, folder, "other")
    return Listening(Address("127.0.0.1", port), good, other, hello)


LISTENERS = {"config-server": config_server, "master-target": master_target, "physical hub": hub}


@pytest.fixture(params=LISTENERS)
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listening]:
    with ExitStack() as stack:
        made = LISTENERS[request.param](tmp_path, stack)
        yield made
        for one in made.opened:
            one.close()


def test_connections_that_have_not_begun_keep_nobody_out(
    listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(300):
        listening.connect(b"\x16")
    assert listening.lets_in()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 3


def test_idle_connections_with_a_certificate_keep_nobody_out(
    listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(220):
        try:
            listening.connect_with(listening.other)
        except (ssl.SSLError, ConnectionError):  # it may be refused at once
            continue
    assert all(listening.lets_in() for _ in range(3))
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 3


def test_idle_connections_with_the_same_certificate_keep_nobody_out(listening: Listening) -> None:
    for _ in range(220):
        listening.connect_with(listening.good)
    assert all(listening.lets_in() for _ in range(3))
