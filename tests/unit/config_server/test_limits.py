"""Time limits and places of the configuration server's HTTPS, with an application that does as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asrcore.config_server import web
from asrcore.config_server.web import WebServer
from asrcore.wire.carrier import Address
from asrcore.wire.gate import Places
from asrcore.wire.tls import Identity
from tests.certificates import Authority
from tests.unit.service.waiting import wait_until


class Site:
    """A server on loopback, and its callers."""

    def __init__(self, folder: Path, places: Places) -> None:
        self.folder, self.authority = folder, Authority()
        self.at_work = 0
        self.go = threading.Event()
        routes = [Route("/quick", self.quick, methods=["GET", "POST"]), Route("/slow", self.slow)]
        routes.append(Route("/unread", lambda request: PlainTextResponse("")))
        routes.append(Route("/large", lambda request: PlainTextResponse("x" * (64 << 20))))
        own = Identity(self.authority.issue(folder / "own", "config-server"))
        self.server = WebServer(Starlette(routes=routes), Address("127.0.0.1", 0), own, places)
        self.server.start()
        self.opened: list[socket.socket] = []

    async def quick(self, request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    async def slow(self, request: Request) -> Response:
        self.at_work += 1
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        return PlainTextResponse("at last")

    def connect(self, name: str = "one", role: str = "operator") -> ssl.SSLSocket:
        """A connection after its handshake."""
        directory = self.folder / f"{role}-{name}"
        if not directory.exists():
            self.authority.issue(directory, role, name)
        context = Identity(directory).context(server=False)
        plain = socket.create_connection((self.server.address.host, self.server.address.port), 20)
        self.opened.append(context.wrap_socket(plain))
        made = self.opened[-1]
        assert isinstance(made, ssl.SSLSocket)
        return made

    def get(self, path: str = "/quick", name: str = "good") -> tuple[int, bytes]:
        """One whole call."""
        made = self.connect(name)
        made.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = http.client.HTTPResponse(made)
        answer.begin()
        return answer.status, answer.read()

    @property
    def held(self) -> int:
        """Places that components have."""
        assert self.server._gate is not None
        return len(self.server._gate._components)

    def close(self) -> None:
        self.go.set()
        for one in self.opened:
            one.close()
        self.server.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(**places: int) -> Site:
        made.append(Site(tmp_path, Places(**places)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ended(client: socket.socket) -> bool:
    client.settimeout(20)
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        while client.recv(65536):
            pass
    return True


def lives(client: socket.socket) -> bool:
    client.settimeout(0)
    try:
        return client.recv(1) != b""
    except ssl.SSLWantReadError:
        return True
    except (ssl.SSLError, ConnectionError):
        return False


def test_idle_connections_of_one_certificate_keep_nobody_out(site: Callable[..., Site]) -> None:
    made = site(handshakes_each=64, most=8, each=4)
    idle = [made.connect("idle", "agent") for _ in range(40)]
    assert made.get() == (200, b"0")
    assert made.get(name="idle") == (200, b"0")
    wait_until(lambda: sum(not lives(client) for client in idle) >= 36, "the longest idle were dropped")


def test_connections_at_work_are_never_dropped_but_others_are_told_to_wait(site: Callable[..., Site]) -> None:
    made = site(most=8, each=2)
    busy = [made.connect("busy") for _ in range(2)]
    for client in busy:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_until(lambda: made.at_work == 2, "both are at work")
    assert made.get(name="busy") == (503, b"")
    assert made.get() == (200, b"0")
    made.go.set()
    for client in busy:
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.read() == b"at last"


HEADS = {
    "nothing": (b"", "send the head of a request"),
    "half a head": (b"GET /quick HTTP/1.1\r\nHost:", "send the head of a request"),
    "half a second head": (b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\nGET /qui", "take the answer"),
    "a body that is not read": (
        b"GET /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\nx",
        "take the answer",
    ),
    "half a body": (
        b"POST /quick HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf",
        "send the body of its request",
    ),
    "half a chunk": (
        b"POST /quick HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\nhalf",
        "send the body of its request",
    ),
}


@pytest.mark.parametrize(("sent", "missed"), HEADS.values(), ids=HEADS)
def test_each_part_of_a_request_has_its_time(
    site: Callable[..., Site],
    sent: bytes,
    missed: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "ANSWER_SECONDS"):
        monkeypatch.setattr(web, name, 0.5)
    made = site()
    client = made.connect("slow")
    client.sendall(sent)
    assert ended(client)
    wait_until(lambda: made.held == 0, "its place")
    lines = [record.getMessage().rpartition("ended: ")[2] for record in caplog.records if record.levelname != "INFO"]
    assert lines == [f"it did not {missed} in time"]
    assert made.get() == (200, b"0")


def test_a_head_that_comes_byte_by_byte_has_the_same_time(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "HEAD_SECONDS", 0.5)
    client = site().connect("slow")
    with pytest.raises((ssl.SSLError, OSError)):  # noqa: PT012 - which byte it is, the clock decides
        for _ in range(200):
            client.sendall(b"G")
            threading.Event().wait(0.05)


def test_who_does_not_take_the_answer_is_let_go(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "ANSWER_SECONDS", 0.5)
    made = site()
    client = made.connect("slow")
    client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_until(lambda: made.held == 1, "its place")
    wait_until(lambda: made.held == 0, "its place is free")


def test_what_works_for_long_is_not_cut_off(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "ANSWER_SECONDS"):
        monkeypatch.setattr(web, name, 0.3)
    made = site()
    threading.Timer(1.0, made.go.set).start()
    assert made.get("/slow") == (200, b"at last")


def test_a_log_of_refusals_stays_small(site: Callable[..., Site], caplog: pytest.LogCaptureFixture) -> None:
    made = site(handshakes_each=64, most=8, each=4)
    for _ in range(20):
        client = made.connect("rude")
        client.sendall(b"\x00\x01\r\n\r\n")
        assert ended(client)
    with pytest.raises((ssl.SSLError, OSError)):  # noqa: PT012 - with TLS 1.3 the refusal may arrive later
        for _ in range(20):
            context = ssl.create_default_context(cafile=str(made.folder / "own" / "ca.pem"))
            context.check_hostname = False
            address = (made.server.address.host, made.server.address.port)
            with socket.create_connection(address, 20) as plain, context.wrap_socket(plain) as client:
                client.sendall(b"GET /quick HTTP/1.1\r\n\r\n")
                client.recv(1)
    assert len([record for record in caplog.records if record.levelname != "INFO"]) <= 3
