"""Channels over Unix sockets, time limits of requests, and what a listener accepts."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from asrcore.errors import AccessDenied, AsrError, CertificateRole, FrameRefused, SiteUnreachable
from asrcore.model.watch import Watch
from asrcore.units import MiB
from asrcore.wire import Address, Answer, Carrier, Channel, Identity, Limits, Listener, Role
from asrcore.wire.carrier import ConnectionLost
from asrcore.wire.channel import _seconds
from asrcore.wire.frames import ZSTD
from asrcore.wire.packing import Packer
from tests.certificates import Authority
from tests.unit.service.waiting import wait_until

LIMITS = Limits(connect=10.0, silence=10.0)


class Served:
    """Answers with what it was asked; `hang` until `go`, or until it is cancelled."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.cancelled = threading.Event()

    def call(self, channel: Channel, call: str, head: Mapping[str, Any], body: Any, watch: Watch) -> Answer:
        if call == "refuse":
            raise AccessDenied(site="there", detail="why")
        if call == "defect":
            raise ZeroDivisionError("oops")
        while call == "hang" and not self.go.wait(0.02):
            try:
                watch.check()
            except BaseException:
                self.cancelled.set()
                raise
        return Answer(head, body)

    def stream(self, channel: Channel, call: str, head: Mapping[str, Any]) -> Any:
        raise AssertionError

    def lost(self, channel: Channel) -> None:
        self.go.set()


@pytest.fixture
def served() -> Served:
    return Served()


@pytest.fixture
def local(served: Served) -> Iterator[Channel]:
    """The asking end of a channel within this process."""
    near, far = socket.socketpair()
    made: list[Channel] = []
    thread = threading.Thread(
        target=lambda: made.append(Channel(Carrier(far, "asking", LIMITS), dialled=False, handler=served))
    )
    thread.start()
    channel = Channel(Carrier(near, "serving", LIMITS), dialled=True)
    thread.join()
    made[0].start()
    channel.start()
    yield channel
    channel.close()
    made[0].close()


def test_processes_of_a_host_talk_over_a_unix_socket(local: Channel) -> None:
    body = os.urandom(2 * MiB)  # more than the socket's buffer: both ends have to wait
    answer = local.ask("echo", {"a": 1}, body)
    assert (answer.head["a"], bytes(answer.body)) == (1, body)
    with pytest.raises(AccessDenied, match="why"):
        local.ask("refuse")
    assert local.fingerprint == ""
    assert not local.packer.enabled, "compression costs more than it saves on one host"


def test_calls_that_fail_do_not_fill_the_log(local: Channel, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        with pytest.raises(AsrError, match="ZeroDivisionError: oops"):
            local.ask("defect")
    assert len(caplog.records) == 1
    assert "Traceback" in caplog.text


def test_packed_data_of_a_request_that_are_damaged_are_refused(
    local: Channel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Packer, "pack", lambda _, data: (b"no zstd", ZSTD, len(data)))
    with pytest.raises(FrameRefused, match="packed"):
        local.ask("echo", {}, b"x" * 1000)
    assert not caplog.records
    monkeypatch.undo()
    assert bytes(local.ask("echo", {}, b"whole").body) == b"whole"


@pytest.mark.parametrize("silence", [10**400, -(10**400), float("nan"), float("inf"), "x", None, True, [1]], ids=str)
def test_an_odd_limit_of_the_other_side_is_no_limit(silence: object) -> None:
    assert 1.0 <= _seconds(silence, 30.0) <= 30.0


def test_without_tls_only_a_unix_socket_will_do() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as plain,
        pytest.raises(ValueError, match="needs TLS"),
    ):
        Carrier(plain, "anyone", LIMITS)


@pytest.mark.parametrize("watch", [None, Watch()], ids=["plain", "watched"])
def test_a_request_may_have_a_time_limit(watch: Watch | None, local: Channel, served: Served) -> None:
    with pytest.raises(TimeoutError, match="within the time limit"):
        local.ask("hang", watch=watch, timeout=0.3)
    assert served.cancelled.wait(5), "the other side is asked to stop"
    assert local.error is None
    assert local.ask("echo", {"b": 2}, timeout=5).head["b"] == 2


def test_an_error_of_the_channel_is_told_from_one_of_the_other_side(local: Channel, served: Served) -> None:
    threading.Timer(0.2, local.close).start()
    with pytest.raises(SiteUnreachable) as lost:
        local.ask("hang", timeout=20)
    assert lost.value is local.error


# -- listeners -----------------------------------------------------------------------------------------------------


class Place:
    """Makes listeners, and dials them as an agent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority = folder, Authority()
        authority = self.authority
        self.own = Identity(authority.issue(folder / "own", "process-server"))
        self.agent = Identity(authority.issue(folder / "agent", "agent", "box"))

    def dial(self, listener: Listener) -> Channel:
        carrier = Carrier.dial(listener.address, self.agent, [Role.PROCESS_SERVER], limits=LIMITS)
        channel = Channel(carrier, dialled=True, about={"name": "box"})
        channel.start()
        return channel

    def listener(self, **options: Any) -> Listener:
        listener = Listener(Address("127.0.0.1", 0), self.own, [Role.AGENT], None, limits=LIMITS, **options)
        listener.start()
        return listener


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def denied(_: object) -> None:
    raise AccessDenied(site="here", detail="not today")


def test_who_is_not_admitted_gets_no_hello(place: Place) -> None:
    listener = place.listener(admit=denied)
    with pytest.raises(AsrError) as problem:
        place.dial(listener)
    assert isinstance(problem.value, SiteUnreachable)
    assert listener.channels == []
    listener.close()


@pytest.mark.parametrize("problem", [denied, lambda channel: 1 // 0], ids=["error", "defect"])
def test_who_is_not_accepted_learns_why(problem: Callable[[Channel], None], place: Place) -> None:
    listener = place.listener(accepted=problem)
    channel = place.dial(listener)
    wait_until(lambda: channel.error is not None, "the refusal")
    assert isinstance(channel.error, AccessDenied if problem is denied else SiteUnreachable)
    assert listener.channels == []
    channel.close()
    listener.close()


def test_a_listener_without_a_handler_only_asks(place: Place) -> None:
    accepted: list[Channel] = []
    listener = place.listener(accepted=accepted.append)
    channel = place.dial(listener)
    with pytest.raises(FrameRefused, match="nothing is served"):
        channel.ask("anything", timeout=5)
    wait_until(lambda: accepted, "the channel")
    certificate = x509.load_pem_x509_certificate((place.agent.directory / "certificate.pem").read_bytes())
    assert accepted[0].fingerprint == hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
    assert accepted[0].component.name == "box"
    assert accepted[0].about["name"] == "box"
    channel.close()
    listener.close()


def test_another_role_gets_no_place_of_a_component(place: Place) -> None:
    listener = place.listener()
    operator = Identity(place.authority.issue(place.folder / "operator", "operator"))
    carrier = Carrier.dial(listener.address, operator, [Role.PROCESS_SERVER], limits=LIMITS)
    wait_until(lambda: len(listener._gate._handshakes) == 1, "it waits for the hello that would bring it the reason")
    assert len(listener._gate._components) == 0
    channel = Channel(carrier, dialled=True)
    channel.start()
    wait_until(lambda: channel.error is not None, "the reason")
    assert isinstance(channel.error, CertificateRole)
    channel.close()
    wait_until(lambda: not listener._gate._all, "its place is free")
    listener.close()


def test_who_sends_no_hello_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asrcore.wire.listener.HELLO_SECONDS", 0.3)
    listener = place.listener()
    carrier = Carrier.dial(listener.address, place.agent, [Role.PROCESS_SERVER], limits=LIMITS)
    with pytest.raises(ConnectionLost):
        carrier.fill(memoryview(bytearray(1 << 16)))
    carrier.close()
    wait_until(lambda: not listener._gate._all, "its place is free")
    listener.close()


def test_who_sends_no_hello_leaves_no_memory_in_use(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asrcore.wire.listener.HELLO_SECONDS", 0.0)
    listener = place.listener()
    context = place.agent.context(server=False)

    def come_and_go() -> None:
        with (
            socket.create_connection((listener.address.host, listener.address.port), 10) as plain,
            context.wrap_socket(plain) as encrypted,
            contextlib.suppress(ssl.SSLError, ConnectionError),
        ):
            while encrypted.recv(65536):
                pass
        wait_until(lambda: not listener._gate._all, "its place is free")

    come_and_go()
    gc.disable()  # the service collects seldom
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            come_and_go()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()
        listener.close()
    assert grown < 20 * 32 * 1024, "the buffer of a channel has 64 KiB"


def test_the_connection_without_a_request_for_longest_is_closed_for_a_new_one(place: Place) -> None:
    accepted: list[Channel] = []
    listener = place.listener(accepted=accepted.append, each=2)
    first, second = place.dial(listener), place.dial(listener)
    wait_until(lambda: len(accepted) == 2, "both are accepted")
    asking = accepted[0] if accepted[0].peer.endswith(str(first._carrier._connection.getsockname()[1])) else accepted[1]
    with pytest.raises(FrameRefused):
        asking.ask("anything")
    third = place.dial(listener)
    wait_until(lambda: second.error is not None, "the idle one is closed")
    assert first.error is None
    assert third.error is None
    for channel in (first, second, third):
        channel.close()
    wait_until(lambda: not listener._gate._all, "their places are free")
    listener.close()


def test_a_listener_ends_at_once(place: Place) -> None:
    listener = place.listener()
    listener.close()
    assert not listener._gate._thread.is_alive()
    listener.close()
