"""How a remote reader uses its connection: several extents in a request, several requests in flight, all bounded."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asrcore.driver import DiskReader, ViewRequest
from asrcore.errors import InvalidValue, SiteUnreachable, ViewLost
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.remote import RemoteDriver
from asrcore.remote.client import source
from asrcore.remote.client.site import RemoteSite
from asrcore.remote.client.source import RemoteReader
from asrcore.remote.server import SiteServer
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.testing.memory import _source as memory
from asrcore.units import KiB, MiB
from asrcore.wire.carrier import Address, Limits
from asrcore.wire.channel import Answer, Channel
from asrcore.wire.frames import Bytes
from asrcore.wire.listener import Listener
from asrcore.wire.tls import Identity, Role
from tests.certificates import Authority
from tests.unit.service.waiting import wait_until
from tests.unit.wire.relay import Relay

SIZE = 8 * MiB
SECONDS = 30.0
CONTENT = random.Random(4).randbytes(SIZE)


class CountingServer(SiteServer):
    """Counts the reads that were asked for and not answered. While `hold` is set none is answered; `fail` is raised by
    the read of that number."""

    def begin(self) -> None:
        """Count from here on."""
        self.changed = threading.Condition()
        self.asked = self.in_flight = self.most = 0
        self.hold = False
        self.fail: dict[int, Exception] = {}

    def call(self, channel: Channel, call: str, head: Mapping[str, Any], body: Bytes, watch: Watch) -> Answer:
        if call not in ("reader.read", "reader.read_each"):
            return super().call(channel, call, head, body, watch)
        with self.changed:
            self.asked += 1
            number = self.asked
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: not self.hold, SECONDS)
        try:
            if number in self.fail:
                raise self.fail[number]
            return super().call(channel, call, head, body, watch)
        finally:
            with self.changed:
                self.in_flight -= 1
                self.changed.notify_all()

    def wait(self, true: Callable[[], bool]) -> None:
        """Until something is so."""
        with self.changed:
            assert self.changed.wait_for(true, SECONDS)

    def release(self) -> None:
        """Answer from now on."""
        with self.changed:
            self.hold = False
            self.changed.notify_all()


@attrs.define
class Place:
    """A served disk with random content, and a site that is connected to it by one connection."""

    server: CountingServer
    relay: Relay
    site: RemoteSite

    @contextmanager
    def reader(self) -> Iterator[RemoteReader]:
        requests = [ViewRequest("web", "v1", None)]
        with self.site.source.open_view(requests, consistency=Consistency.CRASH, freeze_limit=5.0) as view:
            disk = view.machines["web"].disks["vda"]
            assert not disk.near
            with disk.reader() as reader:
                assert isinstance(reader, RemoteReader)
                yield reader


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    path: Path = tmp_path_factory.mktemp("reads")
    authority = Authority()
    serving, engine = authority.issue(path / "s", "master-target"), authority.issue(path / "e", "process-server")
    world = MemoryWorld("served-reads")
    world.add_machine("web", {"vda": SIZE}).write("vda", 0, CONTENT)
    with MemoryDriver().connect("served", {"world": world.name}) as site:
        server = CountingServer(site)
        server.begin()
        roles, limits = [Role.PROCESS_SERVER], Limits(silence=10.0)
        listener = Listener(Address("127.0.0.1", 0), Identity(serving), roles, server, limits=limits)
        listener.start()
        relay = Relay(listener.address.port)
        settings = {"address": relay.address, "identity": str(engine), "silence": "10s", "connections": "1"}
        with RemoteDriver().connect("there", settings) as connected:
            yield Place(server, relay, connected)
        relay.close()
        listener.close()
        server.close()


@pytest.fixture
def place(served: Place) -> Iterator[Place]:
    served.server.begin()
    yield served
    served.server.release()


def buffers(extents: list[tuple[int, int]]) -> list[tuple[int, memoryview]]:
    return [(offset, memoryview(bytearray(length))) for offset, length in extents]


def check(reads: list[tuple[int, memoryview]]) -> None:
    for offset, buffer in reads:
        assert buffer == CONTENT[offset : offset + len(buffer)]


def test_scattered_extents_take_one_round_trip(place: Place) -> None:
    reads = buffers([(at, 4 * KiB) for at in range(0, SIZE, 64 * KiB)])
    with place.reader() as reader:
        reader.read_each(reads)
    assert (len(reads), place.server.asked) == (128, 1)
    check(reads)


def test_requests_are_in_flight_together_and_no_more_than_two(place: Place) -> None:
    reads = buffers([(0, SIZE)])
    place.server.hold = True
    with place.reader() as reader, ThreadPoolExecutor(1) as pool:
        work = pool.submit(reader.read_each, reads)
        place.server.wait(lambda: place.server.in_flight == 2)
        assert not work.done()
        place.server.release()
        work.result(SECONDS)
    assert (place.server.asked, place.server.most) == (8, 2)
    check(reads)


def test_what_is_read_at_the_other_side_is_read_by_one_thread_at_a_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers of the contract are not shared between threads."""
    busy = threading.Lock()
    read = memory._Reader.read_into

    def alone(self: memory._Reader, offset: int, buffer: memoryview) -> None:
        assert busy.acquire(blocking=False), "two threads read"
        try:
            read(self, offset, buffer)
        finally:
            busy.release()

    monkeypatch.setattr(memory._Reader, "read_into", alone)
    reads = buffers([(0, SIZE)])
    with place.reader() as reader:
        for _ in range(5):
            reader.read_each(reads)
    check(reads)


@pytest.mark.parametrize("number", [1, 2, 5, 8])
def test_an_error_ends_the_read_and_nothing_else(place: Place, number: int) -> None:
    place.server.fail = {number: ViewLost(machine="web", detail="in the middle")}
    reads = buffers([(0, SIZE)])
    with place.reader() as reader:
        channel = reader._channel
        with pytest.raises(ViewLost, match="in the middle"):
            reader.read_each(reads)
        assert place.server.in_flight == 0, "a request of the read that failed is still in flight"
        assert place.server.asked <= number + 1
        reader.read_each(reads)
        assert channel.error is None
    check(reads)


def test_the_error_is_that_of_the_first_request_that_failed(place: Place) -> None:
    place.server.fail = {
        1: ViewLost(machine="web", detail="the first"),
        2: ViewLost(machine="web", detail="the second"),
    }
    with place.reader() as reader, pytest.raises(ViewLost, match="the first"):
        reader.read_into(0, memoryview(bytearray(SIZE)))


def test_a_cut_in_the_middle_ends_the_read(place: Place) -> None:
    place.server.hold = True
    with place.reader() as reader, ThreadPoolExecutor(1) as pool:
        work = pool.submit(reader.read_into, 0, memoryview(bytearray(SIZE)))
        place.server.wait(lambda: place.server.in_flight == 2)
        place.relay.cut()
        with pytest.raises(SiteUnreachable):
            work.result(SECONDS)
        place.server.release()
    wait_until(lambda: not place.server._sessions, "the session has ended")


def test_a_close_in_the_middle_waits_for_what_is_read_and_refuses_the_rest(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side's reader is not closed below a thread that reads with it."""
    begun, go = threading.Event(), threading.Event()
    closed: list[str] = []
    read = memory._Reader.read_into

    def slow(self: memory._Reader, offset: int, buffer: memoryview) -> None:
        begun.set()
        assert go.wait(SECONDS)
        assert not closed
        read(self, offset, buffer)

    monkeypatch.setattr(memory._Reader, "read_into", slow)
    monkeypatch.setattr(memory._Reader, "close", lambda self: closed.append("closed"))
    with place.reader() as reader, ThreadPoolExecutor(2) as pool:
        work = pool.submit(reader.read_into, 0, memoryview(bytearray(4 * MiB)))
        assert begun.wait(SECONDS)
        place.server.wait(lambda: place.server.in_flight == 2)
        other = pool.submit(reader.close)
        wait_until(lambda: not any_reader(place.server), "the handle is gone")
        assert not closed
        go.set()
        with pytest.raises(SiteUnreachable, match="what was opened"):
            work.result(SECONDS)
        other.result(SECONDS)
    assert closed == ["closed"]


def any_reader(server: SiteServer) -> bool:
    sessions = list(server._sessions.values())
    return any(type(item).__name__ == "_Reader" for session in sessions for item in session.handles.values())


def test_an_older_peer_is_asked_for_one_read_at_a_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would give one reader to two threads."""
    opened = SiteServer._open_reader

    def older(self: SiteServer, session: Any, reader: DiskReader) -> Answer:
        return Answer({"handle": opened(self, session, reader).head["handle"]})

    monkeypatch.setattr(SiteServer, "_open_reader", older)
    known = {key: call for key, call in place.server._calls.items() if key != "reader.read_each"}
    monkeypatch.setattr(place.server, "_calls", known)
    reads = buffers([(0, 3 * MiB), (5 * MiB, 4 * KiB), (4 * MiB, 1)])
    with place.reader() as reader:
        reader.read_each(reads)
    assert (place.server.asked, place.server.most) == (5, 1)
    check(reads)


def test_too_much_in_a_request_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_READ", 4 * MiB)
    with place.reader() as reader, pytest.raises(InvalidValue, match="length"):
        reader.read_each(buffers([(0, 2 * MiB), (4 * MiB, 1)]))


EXTENTS = st.lists(
    st.integers(0, SIZE - 1).flatmap(
        lambda offset: st.tuples(
            st.just(offset),
            st.one_of(st.integers(0, min(64 * KiB, SIZE - offset)), st.integers(0, min(3 * MiB, SIZE - offset))),
        )
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(EXTENTS, min_size=1, max_size=3))
def test_any_extents_are_read_as_they_are(place: Place, rounds: list[list[tuple[int, int]]]) -> None:
    with place.reader() as reader:
        for extents in rounds:
            reads = buffers(extents)
            reader.read_each(reads)
            check(reads)
    assert place.server.most <= 2
