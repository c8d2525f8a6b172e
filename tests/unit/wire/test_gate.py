"""The gate of the listeners: who gets a place, for how long, and what happens when no descriptor is left."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asrcore.errors import CannotListen
from asrcore.wire import gate
from asrcore.wire.carrier import Address
from asrcore.wire.gate import Full, Gate, Place, Places, listen
from tests.unit.service.waiting import wait_until

RECORD = b"\x16\x03\x01\x00\x02hi"
"""Has the shape of a first record of TLS."""


class Door:
    """A gate on loopback that keeps the places it hands over."""

    def __init__(self, places: Places, take: Callable[[Place], None] | None = None) -> None:
        self.taken: list[Place] = []
        listening, self.address = listen(Address("127.0.0.1", 0))
        self.gate = Gate(listening, take or self.taken.append, logging.getLogger("door"), places)
        self.gate.start()
        self.clients: list[socket.socket] = []

    def connect(self, sent: bytes) -> socket.socket:
        client = socket.create_connection((self.address.host, self.address.port), 10)
        client.sendall(sent)
        self.clients.append(client)
        return client

    def close(self) -> None:
        self.gate.close()
        for held in (*self.clients, *(place.socket for place in self.taken)):
            held.close()


@pytest.fixture
def door() -> Iterator[Callable[..., Door]]:
    made: list[Door] = []

    def make(take: Callable[[Place], None] | None = None, **places: int) -> Door:
        made.append(Door(Places(**places), take))
        return made[-1]

    yield make
    for one in made:
        one.close()
        one.close()


def ended(client: socket.socket) -> bool:
    client.settimeout(10)
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def lives(client: socket.socket) -> bool:
    client.settimeout(0)
    try:
        client.recv(1)
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False


def test_who_has_not_begun_is_dropped_oldest_first(door: Callable[..., Door]) -> None:
    made = door(arrivals=10, arrivals_each=2)
    slow = []
    for count in (1, 2):
        slow.append(made.connect(RECORD[:1]))
        wait_until(lambda: len(made.gate._arrivals) == count, "it has arrived")  # noqa: B023 - waited for at once
    slow.append(made.connect(RECORD[:1]))
    assert ended(slow[0])
    assert lives(slow[1])
    assert lives(slow[2])


def test_who_has_not_begun_keeps_nobody_out(door: Callable[..., Door], caplog: pytest.LogCaptureFixture) -> None:
    made = door(arrivals=10, arrivals_each=4)
    slow = [made.connect(RECORD[:1]) for _ in range(100)]
    wait_until(lambda: sum(not lives(client) for client in slow) == 96, "the others were dropped")
    made.connect(RECORD)
    wait_until(lambda: made.taken, "the one that has begun")
    assert sum(lives(client) for client in slow) == 4
    assert len(caplog.messages) == 1


def test_a_record_may_come_byte_by_byte(door: Callable[..., Door]) -> None:
    made = door()
    client = made.connect(b"")
    for at in range(len(RECORD)):
        assert made.taken == []
        client.sendall(RECORD[at : at + 1])
        time.sleep(0.01)
    wait_until(lambda: made.taken, "its handshake")
    assert made.taken[0].socket.recv(100) == RECORD


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x00", b"\x15\x03\x01\x00\x02\x02\x28"])
def test_what_is_not_tls_is_ended_at_once(door: Callable[..., Door], sent: bytes) -> None:
    made = door()
    assert ended(made.connect(sent))
    assert made.taken == []


def test_a_handshake_has_a_little_time_before_it_is_dropped(
    door: Callable[..., Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "SHAKING_SECONDS", 0.5)
    made = door(handshakes=10, handshakes_each=2)
    clients = [made.connect(RECORD) for _ in range(3)]
    wait_until(lambda: len(made.gate._ready) == 1, "the third waits")
    assert len(made.taken) == 2
    assert ended(clients[0])
    wait_until(lambda: len(made.taken) == 3, "all of them")
    assert [place.refused for place in made.taken] == [True, False, False]
    assert all(lives(client) for client in clients[1:])


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is dropped or ended for its age."""
    monkeypatch.setattr(gate, "SHAKING_SECONDS", 600.0)
    monkeypatch.setattr(gate, "TLS_SECONDS", 600.0)


@pytest.mark.usefixtures("patient")
def test_who_waits_for_a_handshake_gets_the_next_free_place(door: Callable[..., Door]) -> None:
    made = door(handshakes=1, handshakes_each=1)
    clients = [made.connect(RECORD) for _ in range(2)]
    wait_until(lambda: len(made.gate._ready) == 1, "the second waits")
    made.taken[0].identify("a")
    wait_until(lambda: len(made.taken) == 2, "its handshake")
    assert all(lives(client) for client in clients)
    assert not made.taken[0].refused


@pytest.mark.usefixtures("patient")
def test_who_waits_for_a_handshake_is_dropped_after_those_that_have_not_begun(door: Callable[..., Door]) -> None:
    made = door(handshakes=1, handshakes_each=1, arrivals=2, arrivals_each=2)
    made.connect(RECORD)
    waits = made.connect(RECORD)
    wait_until(lambda: len(made.gate._ready) == 1, "it waits")
    slow = made.connect(RECORD[:1])
    wait_until(lambda: len(made.gate._arrivals) == 2, "one that has not begun")
    made.connect(RECORD[:1])
    assert ended(slow)
    assert lives(waits)


def test_components_have_places_of_their_own(door: Callable[..., Door]) -> None:
    made = door(handshakes=10, handshakes_each=10, most=3, each=2)
    clients = [made.connect(RECORD) for _ in range(5)]
    wait_until(lambda: len(made.taken) == 5, "all of them")
    first, second, third, fourth, fifth = sorted(
        made.taken, key=lambda place: [str(c.getsockname()[1]) for c in clients].index(place.peer.rpartition(":")[2])
    )
    first.identify("a")
    second.idle_since = lambda: None  # at work
    second.identify("a")
    third.identify("a")
    assert first.refused
    assert ended(clients[0])
    first.leave()
    third.idle_since = lambda: None
    with pytest.raises(Full):
        fourth.identify("a")
    fourth.identify("b")
    fourth.idle_since = lambda: None
    with pytest.raises(Full):
        fifth.identify("c")
    second.leave()
    fifth.identify("c")


def test_what_is_expected_has_its_time(
    door: Callable[..., Door], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gate, "TLS_SECONDS", 0.5)
    made = door(handshakes=4, handshakes_each=4)
    slow, silent, kept = made.connect(RECORD[:3]), made.connect(RECORD), made.connect(RECORD)
    wait_until(lambda: len(made.taken) == 2, "both handshakes")
    port = str(kept.getsockname()[1])
    (place,) = [place for place in made.taken if place.peer.endswith(port)]
    place.identify("a")
    assert ended(slow)
    assert ended(silent)
    assert lives(kept)
    place.expect("say something", 0.0)
    assert ended(kept)
    assert {record.getMessage().partition("ended: ")[2] for record in caplog.records} == {
        "it did not show a certificate in time"
    }


class Exhausted(socket.socket):
    """Cannot accept for want of descriptors, this many times."""

    failures = 0
    tries = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries += 1
        if self.tries <= self.failures:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def exhausted(failures: int) -> Exhausted:
    made = Exhausted()
    made.failures = failures
    made.bind(("127.0.0.1", 0))
    made.listen(100)
    return made


def test_without_descriptors_it_neither_spins_nor_fills_the_log(caplog: pytest.LogCaptureFixture) -> None:
    listening = exhausted(1_000_000)
    made = Gate(listening, lambda place: None, logging.getLogger("door"))
    made.start()
    with socket.create_connection(listening.getsockname()) as client:
        client.sendall(RECORD)
        wait_until(lambda: listening.tries == 2, "it has tried again", 10)
        assert caplog.messages == ["cannot accept a connection: Too many open files"]
        threading.Event().wait(0.3)
        assert listening.tries == 2
    made.close()


def test_without_descriptors_who_has_not_begun_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = exhausted(0)
    taken: list[Place] = []
    made = Gate(listening, taken.append, logging.getLogger("door"))
    made.start()
    slow = [socket.create_connection(listening.getsockname()) for _ in range(3)]
    for client in slow:
        client.sendall(RECORD[:1])
    wait_until(lambda: len(made._arrivals) == 3, "the slow ones")
    listening.failures = listening.tries + 1
    with socket.create_connection(listening.getsockname()) as client:
        client.sendall(RECORD)
        wait_until(lambda: taken, "the one that has begun")
    assert ended(slow[0])
    assert lives(slow[1])
    assert made._paused_until == 0.0
    made.close()
    for held in (*slow, taken[0].socket):
        held.close()


def test_what_cannot_be_taken_is_closed(door: Callable[..., Door], caplog: pytest.LogCaptureFixture) -> None:
    def no_thread(place: Place) -> None:
        raise RuntimeError("can't start new thread")

    made = door(no_thread)
    for _ in range(5):
        assert ended(made.connect(RECORD))
    assert len(caplog.messages) == 1
    wait_until(lambda: not made.gate._all, "no place is taken")


def test_few_descriptors_mean_fewer_places() -> None:
    assert Places().within(65536) == Places()
    small = Places(most=10_000).within(1024)
    assert (small.arrivals, small.handshakes, small.most) == (256, 64, 512)
    assert small.arrivals + small.handshakes + small.most < 1024


def test_a_network_of_ipv6_is_one_address() -> None:
    one, other, far = (gate._names((host, 1))[1] for host in ("2001:db8::1", "2001:db8::2:3", "2001:db8:0:1::1"))
    assert one == other != far
    assert gate._names(("::ffff:10.0.0.1", 1))[1] == gate._names(("10.0.0.1", 1))[1]
    assert gate._names(("fe80::1%eth0", 1))[0] == "[fe80::1%eth0]:1"


def test_an_address_that_is_taken_is_reported(door: Callable[..., Door]) -> None:
    with pytest.raises(CannotListen, match="already in use"):
        listen(door().address)
