"""How a view's reader asks the agent: many ranges in a request, and none for what the spool holds."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asr_driver_physical.servers.hub import Gateway
from asr_driver_physical.servers.identity import Identity
from asr_driver_physical.servers.spool import Spool
from asr_driver_physical.settings import SiteSettings
from asr_driver_physical.source.view import _DiskView, _View, open_view
from asr_mobility.channel import Answer, CallFailed, Channel
from asr_mobility.service import MAX_READ, Service, _Watched
from asrcore.driver import DiskReader
from asrcore.errors import DriverFailed, SiteUnreachable, ViewLost
from asrcore.model.extent import Extent, subtract
from asrcore.units import KiB, MiB
from drivers.physical.tests.rig import HOST, wait_until
from drivers.physical.tests.test_parts import FACTS, enrol

SIZE = 8 * MiB
SECONDS = 30.0
HELD = [Extent(64 * KiB, 4 * KiB), Extent(MiB, 3 * MiB + 512), Extent(SIZE - 4 * KiB, 4 * KiB)]


@attrs.define
class PlainDisk:
    """A file that counts as a disk."""

    path: str
    size: int = SIZE


class Agent:
    """The real service, reading a file. Counts requests; while `go` is not set reads are not answered."""

    def __init__(self, path: Path) -> None:
        self.service = Service(path.parent)
        self.service._watched = {"d": _Watched(PlainDisk(str(path)), None, "")}  # type: ignore[arg-type]
        self.changed = threading.Condition()
        self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self.calls: list[str] = []
        self.sent = self.in_flight = 0
        self.hold = self.older = False
        self.fail: dict[int, CallFailed] = {}

    def serve(self, call: str, arguments: Mapping[str, Any]) -> Answer:
        if call == "open":
            disk = {"id": "d", "name": "sda", "size": SIZE, "tracking": "none", "reason": "", "changed": []}
            return {"marks": {}, "disks": [disk], "machine": FACTS["machine"]}, b""
        with self.changed:
            self.calls.append(call)
            number = len(self.calls)
            self.in_flight += 1
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: not self.hold, SECONDS)
        try:
            if number in self.fail:
                raise self.fail[number]
            if self.older and call == "read-each":
                raise CallFailed("unsupported-operation", {"driver": "physical", "operation": call})
            head, body = self.service.serve(call, arguments)
            self.sent += len(body)
            return head, body
        finally:
            with self.changed:
                self.in_flight -= 1

    def wait(self, count: int) -> None:
        """Until so many requests are in flight."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.in_flight == count, SECONDS)

    def release(self) -> None:
        """Answer from now on."""
        with self.changed:
            self.hold = False
            self.changed.notify_all()


@attrs.define
class Place:
    """A server that is connected, and its view. `content`: of its disk."""

    agent: Agent
    channel: Channel
    view: _View
    content: bytes

    @property
    def disk(self) -> _DiskView:
        return self.view.machine._disks["d"]


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("reads")
    content = bytearray(random.Random(6).randbytes(SIZE))
    content[5 * MiB : 6 * MiB] = bytes(MiB)
    (root / "disk").write_bytes(content)
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    (root / "spool").mkdir()
    place = SiteSettings(HOST, port, root / "identity", root / "spool")
    identity, agent = Identity(place.identity), Agent(root / "disk")
    with closing(Gateway("dc", place, identity)) as gateway:
        carrier = enrol(identity, root).wrap_socket(socket.create_connection((HOST, port), 10))
        me = {"name": "box", "identity": "aa" * 16}
        with closing(Channel(carrier, dialled=True, me=me, serve=agent.serve)) as channel:
            wait_until(lambda: "box" in gateway.connected(), "the server has connected")
            record = identity.server("box")
            assert record is not None
            opened = open_view(gateway, Spool(place.spool, "box", 64 * MiB), record, "v1", None, 5.0)
            assert isinstance(opened, _View)
            yield Place(agent, channel, opened, bytes(content))


@pytest.fixture
def place(connected: Place) -> Iterator[Place]:
    connected.agent.begin()
    connected.view.reads_each = True
    connected.disk.held = []
    yield connected
    connected.agent.release()


@pytest.fixture
def reader(place: Place) -> Iterator[DiskReader]:
    with place.disk.reader() as made:
        yield made


def buffers(extents: list[tuple[int, int]]) -> list[tuple[int, memoryview]]:
    return [(offset, memoryview(bytearray(b"\xff" * length))) for offset, length in extents]


def check(reads: list[tuple[int, memoryview]], content: bytes) -> None:
    for offset, buffer in reads:
        assert buffer == content[offset : offset + len(buffer)]


def test_scattered_ranges_take_one_round_trip(place: Place, reader: DiskReader) -> None:
    assert not place.disk.near
    reads = buffers([(at, 4 * KiB) for at in range(0, SIZE, 64 * KiB)])
    reader.read_each(reads)
    assert (len(reads), place.agent.calls) == (128, ["read-each"])
    assert place.agent.sent == (128 - 16) * 4 * KiB, "zeroes were sent"
    check(reads, place.content)


def test_a_request_asks_for_two_mebibytes_at_most(place: Place, reader: DiskReader) -> None:
    reads = buffers([(0, 5 * MiB), (SIZE - 100, 100), (7, MiB)])
    reader.read_each(reads)
    assert place.agent.calls == ["read", "read", "read-each", "read"]
    check(reads, place.content)


def test_what_the_spool_holds_is_not_asked_for(place: Place, reader: DiskReader) -> None:
    place.view.spool.put(0, [(item.offset, memoryview(b"h" * item.length)) for item in HELD])
    place.disk.held = list(HELD)
    reader.read_each(held := buffers([(item.offset, item.length) for item in HELD]))
    assert all(buffer == b"h" * len(buffer) for _, buffer in held)
    assert place.agent.calls == []
    reader.read_each(buffers([(0, 128 * KiB), (MiB - 512, KiB)]))
    assert place.agent.calls == ["read-each"], "the parts around what is held are asked for together"


def test_an_older_agent_is_asked_one_by_one(place: Place) -> None:
    place.agent.older = True
    reads = buffers([(at, 4 * KiB) for at in range(0, 64 * KiB, 16 * KiB)])
    for _ in range(2):  # it is found out once in a view, whichever reader asks
        with place.disk.reader() as reader:
            reader.read_each(reads)
    assert place.agent.calls == ["read-each", *["read"] * 8]
    check(reads, place.content)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_an_error_ends_the_read_and_nothing_else(place: Place, reader: DiskReader, number: int) -> None:
    place.agent.fail = {number: CallFailed("view-lost", {"machine": "", "detail": "in the middle"})}
    reads = buffers([(0, 7 * MiB)])
    with pytest.raises(ViewLost, match="in the middle"):
        reader.read_each(reads)
    assert (len(place.agent.calls), place.agent.in_flight) == (number, 0)
    reader.read_each(reads)
    assert not place.channel.ended
    check(reads, place.content)


def test_readers_have_requests_in_flight_together(place: Place) -> None:
    place.agent.hold = True
    reads = [buffers([(0, 64 * KiB), (MiB, 64 * KiB)]) for _ in range(2)]
    with place.disk.reader() as first, place.disk.reader() as second, ThreadPoolExecutor(2) as pool:
        work = [pool.submit(reader.read_each, some) for reader, some in zip((first, second), reads, strict=True)]
        place.agent.wait(2)
        place.agent.release()
        for item in work:
            item.result(SECONDS)
    assert place.agent.calls == ["read-each"] * 2
    check(reads[0] + reads[1], place.content)


@pytest.mark.parametrize("ranges", [[[0, MAX_READ], [MAX_READ, 1]], [[0, 1], [5, 0]], [[0, 1], [5, -1]]])
def test_the_agent_refuses_what_it_cannot_hold(place: Place, ranges: list[list[int]]) -> None:
    with pytest.raises(DriverFailed, match="read-each"):
        place.view.call("read-each", disk="d", ranges=ranges)


EXTENTS = st.lists(
    st.integers(0, SIZE - 1).flatmap(
        lambda offset: st.tuples(
            st.just(offset),
            st.one_of(st.integers(0, min(64 * KiB, SIZE - offset)), st.integers(0, min(3 * MiB, SIZE - offset))),
        )
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(EXTENTS, min_size=1, max_size=3), held=st.booleans())
def test_any_extents_are_read_as_they_are(
    place: Place, reader: DiskReader, rounds: list[list[tuple[int, int]]], held: bool
) -> None:
    place.disk.held = list(HELD) if held else []
    expected = bytearray(place.content)
    if held:
        place.view.spool.put(0, [(item.offset, memoryview(b"h" * item.length)) for item in HELD])
        for item in HELD:
            expected[item.offset : item.end] = b"h" * item.length
    for extents in rounds:
        reads = buffers(extents)
        before = len(place.agent.calls)
        reader.read_each(reads)
        check(reads, bytes(expected))
        asked = [part for offset, length in extents for part in subtract([Extent(offset, length)], place.disk.held)]
        pieces = sum(-(-part.length // MAX_READ) for part in asked)
        total = sum(part.length for part in asked)
        # Two requests that follow each other ask for more than 2 MiB together.
        assert len(place.agent.calls) - before <= min(pieces, 2 * -(-total // MAX_READ) + 1)


def test_a_connection_that_ends_in_the_middle_ends_the_read(place: Place, reader: DiskReader) -> None:
    """The last test: the server does not connect again."""
    place.agent.hold = True
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(reader.read_into, 0, memoryview(bytearray(MiB)))
        place.agent.wait(1)
        place.channel.close()
        with pytest.raises(SiteUnreachable):
            work.result(SECONDS)
        place.agent.release()
