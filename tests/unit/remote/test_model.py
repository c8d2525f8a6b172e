"""Cycles over a link that cuts at random, against a model: what is done stays done, and a sealed point equals what was
sent."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asrcore.driver import CycleSpec, CycleWriter, ReplicaSpec, SealSpec, Site
from asrcore.errors import AsrError, Category, StaleEpoch, WrongCycle
from asrcore.model.extent import Extent, subtract
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.remote import RemoteDriver
from asrcore.remote.master_target import MasterTarget
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.testing.memory._target import MemoryWriter
from asrcore.units import KiB, MiB
from asrcore.wire.carrier import Address, Limits
from asrcore.wire.frames import WINDOW_FRAMES
from asrcore.wire.tls import Identity
from tests.certificates import Authority
from tests.unit.service.waiting import wait_until
from tests.unit.wire.relay import Relay

SIZE = 4 * MiB
DESCRIPTION = Description(Machine("m", "m", 1, MiB, Firmware.BIOS, (Disk("vda", SIZE),)), "memory")


@attrs.define
class Ends:
    """An engine's settings, and the world at the other end."""

    world: MemoryWorld
    relay: Relay
    settings: dict[str, str]
    replicas: int = 0

    def connect(self) -> Site:
        """Connect as a new engine, or as the same one after an error."""
        return RemoteDriver().connect("there", self.settings)

    def replica(self) -> str:
        """A new, empty replica, made without the wire."""
        self.replicas += 1
        name = f"r{self.replicas}"
        with MemoryDriver().connect("here", {"world": self.world.name}) as site:
            site.target.create_replica(ReplicaSpec(name, "m", 1, DESCRIPTION), Watch())
        return name

    def content(self, replica: str) -> bytes:
        """The content of its head, read without the wire."""
        data = bytearray(SIZE)
        with (
            MemoryDriver().connect("here", {"world": self.world.name}) as site,
            site.target.replica(replica).reader("vda") as reader,
        ):
            reader.read_into(0, memoryview(data))
        return bytes(data)

    def points(self, replica: str) -> list[str]:
        """The sealed points."""
        with MemoryDriver().connect("here", {"world": self.world.name}) as site:
            return [point.id for point in site.target.replica(replica).info().points]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    directory: Path = tmp_path_factory.mktemp("cutting")
    authority = Authority()
    serving = authority.issue(directory / "serving", "master-target")
    engine = authority.issue(directory / "engine", "process-server")
    world = MemoryWorld("cutting")
    with (
        MemoryDriver().connect("served", {"world": world.name}) as site,
        MasterTarget(site, Address("127.0.0.1", 0), Identity(serving), limits=Limits(silence=5.0)) as target,
    ):
        relay = Relay(target.address.port)
        yield Ends(world, relay, {"address": relay.address, "identity": str(engine), "silence": "5s"})
        relay.close()


def spec(cycle: str = "c1", epoch: int = 1) -> CycleSpec:
    return CycleSpec(cycle, epoch, None, {"vda": SIZE})


def seal(writer: CycleWriter, point: str = "p1") -> None:
    writer.seal(SealSpec(point, 1.0, Consistency.CRASH, True, DESCRIPTION))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), cuts=st.lists(st.integers(20_000, 3_000_000), max_size=4))
def test_a_copy_over_a_cutting_link_is_the_source(ends: Ends, seed: int, cuts: list[int]) -> None:
    """Each attempt queries what is done and sends the rest, in pieces of odd sizes, some of them zeroes."""
    chance = random.Random(seed)
    source = bytearray(chance.randbytes(SIZE))
    zero = [Extent(at, 64 * KiB) for at in range(0, SIZE, 64 * KiB) if chance.random() < 0.3]
    for item in zero:
        source[item.offset : item.end] = bytes(item.length)
    replica = ends.replica()
    left = list(cuts)
    while True:
        ends.relay.budget = left.pop(0) if left else None
        try:
            with ends.connect() as site, site.target.replica(replica).open_cycle(spec()) as writer:
                send(writer, source, chance)
                assert ends.points(replica) == []
                seal(writer)
            break
        except AsrError as problem:
            assert problem.category is Category.UNREACHABLE, problem  # noqa: PT017 - it may or may not be raised
            assert ends.points(replica) in ([], ["p1"])
    ends.relay.budget = None
    assert ends.content(replica) == bytes(source)


def send(writer: CycleWriter, source: bytearray, chance: random.Random) -> None:
    for extent in subtract([Extent(0, SIZE)], writer.done("vda")):
        at = extent.offset
        while at < extent.end:
            length = min(extent.end - at, chance.randrange(512, 200_000, 512), -(at % (64 * KiB)) + 64 * KiB)
            piece = memoryview(source)[at : at + length]
            if any(piece):
                writer.write("vda", at, piece)
            else:
                writer.zero("vda", at, length)
            at += length


def test_ten_cuts_resend_little(ends: Ends) -> None:
    """Data that arrived count, flushed by the engine or not: at most the data in flight at a cut are sent again."""
    replica, chance = ends.replica(), random.Random(3)
    source = bytearray(chance.randbytes(SIZE))
    ends.relay.cut()
    wait_until(lambda: ends.relay.idle, "no connection is left")
    begun, cut = ends.relay.sent, 0
    while True:
        ends.relay.budget = SIZE // 11 if cut < 10 else None
        try:
            with ends.connect() as site, site.target.replica(replica).open_cycle(spec()) as writer:
                for extent in subtract([Extent(0, SIZE)], writer.done("vda")):
                    for at in range(extent.offset, extent.end, 4096):
                        end = min(at + 4096, extent.end)
                        writer.write("vda", at, memoryview(source)[at:end])
                seal(writer)
            break
        except AsrError:
            cut += 1
    assert cut == 10
    assert ends.content(replica) == bytes(source)
    # Frames of 4 KiB have heads of some 110 bytes; at each cut at most the window is in flight.
    assert ends.relay.sent - begun < SIZE * 1.06 + 10 * 64 * 4096


def test_what_arrived_before_the_cut_is_done(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is slow, and the link is cut with much data unread: all of it counts, although it is not acknowledged
    and the engine reconnects before it is written."""
    write = MemoryWriter.write

    def slowly(writer: MemoryWriter, disk_id: str, offset: int, data: memoryview) -> None:
        time.sleep(0.2)
        write(writer, disk_id, offset, data)

    monkeypatch.setattr(MemoryWriter, "write", slowly)
    replica, frames, size = ends.replica(), 6, 8 * KiB  # in total less than a receive buffer
    one = {**ends.settings, "connections": "1"}
    with RemoteDriver().connect("there", one) as site, site.target.replica(replica).open_cycle(spec()) as writer:
        before = ends.relay.sent
        for index in range(frames):
            writer.write("vda", index * size, memoryview(random.Random(index).randbytes(size)))
        wait_until(lambda: ends.relay.sent > before + frames * size, "it has arrived")
        ends.relay.cut()
        wait_until(lambda: ends.relay.idle, "no connection is left")
        with ends.connect() as later, later.target.replica(replica).open_cycle(spec()) as resumed:
            assert resumed.done("vda") == [Extent(0, frames * size)]


# -- who may write ----------------------------------------------------------------------------------------------------


def test_a_second_session_takes_the_cycle_over(ends: Ends) -> None:
    replica = ends.replica()
    first_data, second_data = b"1" * 65536, b"2" * 65536
    with ends.connect() as one, ends.connect() as two:
        former = one.target.replica(replica).open_cycle(spec())
        former.write("vda", 0, memoryview(first_data))
        former.write("vda", MiB, memoryview(first_data))
        wait_until(lambda: all(lane.stream.acknowledged for lane in former._lanes.values()), "it has arrived")  # type: ignore[attr-defined]
        with two.target.replica(replica).open_cycle(spec()) as writer:
            assert writer.done("vda") == [Extent(0, 65536), Extent(MiB, 65536)], (
                "data that had arrived were made durable"
            )
            writer.write("vda", 0, memoryview(second_data))
            writer.flush()
            with pytest.raises(WrongCycle):  # noqa: PT012 - reported by a later call at the latest
                former.write("vda", 0, memoryview(first_data))
                former.flush()
            with pytest.raises(WrongCycle):
                seal(former)
            seal(writer)
        former.close()
    assert ends.content(replica)[:65536] == second_data


def test_an_older_epoch_takes_nothing_over(ends: Ends) -> None:
    replica = ends.replica()
    with (
        ends.connect() as one,
        ends.connect() as two,
        one.target.replica(replica).open_cycle(spec(epoch=3)) as writer,
    ):
        writer.write("vda", 0, memoryview(b"x" * 4096))
        with pytest.raises(StaleEpoch):
            two.target.replica(replica).open_cycle(spec(epoch=2))
        seal(writer)
    assert ends.points(replica) == ["p1"]


def test_overlapping_writes_keep_their_order(ends: Ends) -> None:
    """On whichever connection they are sent."""
    replica = ends.replica()
    chance = random.Random(5)
    model = bytearray(SIZE)
    with ends.connect() as site, site.target.replica(replica).open_cycle(spec()) as writer:
        for _ in range(400):
            at, length = chance.randrange(0, MiB, 512), chance.randrange(512, 96 * KiB, 512)
            if chance.random() < 0.2:
                writer.zero("vda", at, length)
                model[at : at + length] = bytes(length)
            else:
                data = bytes([chance.randrange(1, 256)]) * length
                writer.write("vda", at, memoryview(data))
                model[at : at + length] = data
        seal(writer)
    assert ends.content(replica) == bytes(model)


def test_frames_without_a_body_wait_for_the_other_side_too(ends: Ends) -> None:
    """The target is paused: at most the window's number of frames is sent, and the rest when it continues."""
    replica = ends.replica()
    one = {**ends.settings, "connections": "1"}
    errors: list[BaseException] = []
    with RemoteDriver().connect("there", one) as site, site.target.replica(replica).open_cycle(spec()) as writer:

        def send_many() -> None:
            try:
                for index in range(3 * WINDOW_FRAMES):
                    writer.zero("vda", index * 4096, 4096)
            except BaseException as problem:  # noqa: BLE001 - passed to the test
                errors.append(problem)

        sender = threading.Thread(target=send_many)
        with ends.world.look():  # writers wait
            sender.start()
            wait_until(lambda: 0 in writer._lanes and counted(writer) == WINDOW_FRAMES, "the window is full")  # type: ignore[attr-defined]
            sender.join(0.3)
            assert sender.is_alive() or errors
        sender.join(60)
        assert errors == []
        seal(writer)
    assert ends.points(replica) == ["p1"]


def counted(writer: CycleWriter) -> int:
    """The number of frames sent on the first connection."""
    lane = writer._lanes[0]  # type: ignore[attr-defined]
    return int(lane.stream.channel._wire.counts(lane.stream._stream)[0])


def test_a_loss_is_not_forgotten_at_the_seal(ends: Ends) -> None:
    """A piece was lost with its connection, the caller was notified, and seals nevertheless."""
    replica = ends.replica()
    with ends.connect() as site:
        writer = site.target.replica(replica).open_cycle(spec())
        writer.write("vda", 0, memoryview(b"x" * 4096))
        with pytest.raises(AsrError):  # noqa: PT012
            ends.relay.cut()
            while True:
                writer.write("vda", 0, memoryview(b"y" * 4096))
        with pytest.raises(AsrError):
            seal(writer)
        writer.close()
    assert ends.points(replica) == []
