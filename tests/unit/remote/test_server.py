"""The state that a serving process keeps between calls, and its answers to invalid calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from asrcore import driver
from asrcore.driver import (
    CycleSpec,
    Digest,
    Examination,
    ReplicaSpec,
    SealSpec,
    ViewRequest,
    block_digests,
)
from asrcore.errors import (
    AsrError,
    InvalidValue,
    MachineNotFound,
    PeerError,
    PeerFailed,
    SiteUnreachable,
    StaleEpoch,
    UnsupportedOperation,
)
from asrcore.model.extent import Extent
from asrcore.model.health import clock_findings
from asrcore.model.machine import Description
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.remote import RemoteDriver, calls, server
from asrcore.remote.client.site import RemoteSite
from asrcore.remote.server import SiteServer
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.testing.memory._target import MemoryReplica
from asrcore.testing.memory.world import MemoryMachine
from asrcore.units import KiB, MiB
from asrcore.wire.carrier import Address, Limits
from asrcore.wire.channel import Answer, Channel
from asrcore.wire.failures import rebuilt
from asrcore.wire.listener import Listener
from asrcore.wire.tls import Identity, Role
from tests.certificates import Authority
from tests.unit.service.waiting import wait_until
from tests.unit.wire.relay import Relay


@attrs.define
class Place:
    """A served world with a machine, reached through a link that can be cut; `now` is the serving side's clock."""

    server: SiteServer
    world: MemoryWorld
    machine: MemoryMachine
    relay: Relay
    settings: dict[str, str]
    now: list[float]
    sites: list[RemoteSite] = attrs.field(factory=list)

    def connect(self) -> RemoteSite:
        self.sites.append(RemoteDriver().connect("there", self.settings))
        return self.sites[-1]

    def cut(self) -> None:
        """Cut the link and wait until both sides have noticed."""
        self.relay.cut()
        wait_until(lambda: not self.server._sessions, "the session has ended")
        wait_until(lambda: not any(site._peer.links.living() for site in self.sites), "the site has noticed")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    authority = Authority()
    serving = authority.issue(tmp_path / "serving", "master-target")
    engine = authority.issue(tmp_path / "engine", "process-server")
    world = MemoryWorld("served")
    machine = world.add_machine("web", {"vda": 2 * MiB})
    for at in range(0, 2 * MiB, 128 * KiB):
        machine.write("vda", at, b"x" * 4096)
    now = [0.0]
    with MemoryDriver().connect("served", {"world": world.name}) as site:
        server = SiteServer(site, clock=lambda: now[0])
        listener = Listener(
            Address("127.0.0.1", 0), Identity(serving), [Role.PROCESS_SERVER], server, limits=Limits(silence=10.0)
        )
        listener.start()
        relay = Relay(listener.address.port)
        settings = {"address": relay.address, "identity": str(engine), "silence": "10s"}
        yield Place(server, world, machine, relay, settings, now)
        relay.close()
        listener.close()
        server.close()


def opened(site: RemoteSite, view_id: str = "v1") -> driver.FrozenView:
    requests = [ViewRequest("web", view_id, None)]
    return site.source.open_view(requests, consistency=Consistency.CRASH, freeze_limit=5.0)


@pytest.mark.parametrize(("ahead", "codes"), [(0.0, []), (1.0, []), (3600.0, ["clock-skew"]), (-90.0, ["clock-skew"])])
def test_the_clock_of_the_serving_host_is_shown(
    place: Place, ahead: float, codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = SimpleNamespace(time=lambda: time.time() + ahead, monotonic=time.monotonic)
    monkeypatch.setattr("asrcore.remote.server.time", there)
    with place.connect() as site:
        status = site.status()
        assert status.skew == pytest.approx(ahead, abs=0.5)
        assert "clock" not in status.details
        assert [item.code for item in clock_findings("b", status.skew)] == codes


@pytest.mark.parametrize("reported", ["", "noon", "nan"])
def test_a_peer_that_does_not_report_its_time_has_no_skew(
    place: Place, reported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asrcore.remote.server.repr", lambda value: reported, raising=False)
    with place.connect() as site:
        assert site.status().skew is None


def test_a_view_outlives_a_cut(place: Place) -> None:
    with place.connect() as site:
        view = opened(site)
        place.cut()
        with pytest.raises(SiteUnreachable):
            view.confirm()
        place.machine.write("vda", 0, b"later")
        again = opened(site)
        assert again.taken_at == view.taken_at
        assert again.machines["web"].mark == view.machines["web"].mark
        with again.machines["web"].disks["vda"].reader() as reader:
            data = bytearray(5)
            reader.read_into(0, memoryview(data))
        assert bytes(data) == b"xxxxx"
        again.close()
        assert place.server._views == []


def test_a_view_that_nobody_comes_back_for_is_closed(place: Place) -> None:
    with place.connect() as site:
        opened(site)
    wait_until(lambda: not place.server._sessions, "the session has ended")
    place.server.tidy()
    assert len(place.server._views) == 1
    place.now[0] += server.KEEP_VIEWS + 1
    place.server.tidy()
    assert place.server._views == []
    assert not place.world.open_views


def test_what_is_opened_after_it_ends_what_was_left(place: Place) -> None:
    with place.connect() as site:
        opened(site)
        place.cut()
        opened(site, "v2").close()
        assert place.server._views == []


def test_a_view_that_was_lost_meanwhile_is_made_anew(place: Place) -> None:
    with place.connect() as site:
        view = opened(site)
        place.cut()
        place.machine.lose_views()
        again = opened(site)
        assert again.machines["web"].mark != view.machines["web"].mark
        again.close()


def test_long_lists_come_in_pages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PAGE", 3)
    with place.connect() as site, opened(site) as view:
        extents = view.machines["web"].disks["vda"].allocated()
    assert len(extents) > 9
    assert extents[-1].end == 2 * MiB
    assert [item.offset for item in extents[1:]] == [item.end for item in extents[:-1]]


def test_what_is_equal_exchanges_little(place: Place) -> None:
    """One digest in each direction for a piece of 4 MiB, whatever its content; block digests only where it differs."""
    size = 8 * MiB
    machine = place.world.add_machine("big", {"vda": size})
    with place.connect() as site:
        description = Description(machine.value, "memory")
        replica = site.target.create_replica(ReplicaSpec("r1", "big", 1, description), Watch())
        ours = block_digests(memoryview(bytes(size)))
        half = Extent(0, size // 2)
        before = place.relay.sent
        for _ in range(10):
            assert replica.compare("vda", half, ours[: len(ours) // 2], Digest.BLAKE3) == []
        assert place.relay.sent - before < 10 * 512
        wrong = bytearray(ours)
        wrong[16] ^= 1
        assert replica.compare("vda", Extent(0, size), bytes(wrong), Digest.BLAKE3) == [Extent(64 * KiB, 64 * KiB)]


def test_recorded_digests_are_answered_where_they_are_recorded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = place.world.add_machine("big", {"vda": MiB})
    asked: list[str] = []

    class Recorded(MemoryReplica):
        def digests(self, disk_id: str, extent: Extent, digest: Digest = Digest.BLAKE3) -> bytes:
            asked.append(f"{disk_id} {extent.offset}")
            return b"recorded" * (2 * extent.length // (64 * KiB))

    monkeypatch.setattr(MemoryReplica, "from_records", lambda self: Recorded(self._session, self._id))
    with place.connect() as site:
        replica = site.target.create_replica(ReplicaSpec("r1", "big", 1, Description(machine.value, "memory")), Watch())
        assert replica.digests("vda", Extent(0, MiB)) == block_digests(memoryview(bytes(MiB)))
        assert asked == []
        assert replica.from_records().digests("vda", Extent(0, MiB)) == b"recorded" * 32
        assert replica.from_records().compare("vda", Extent(0, MiB), b"recorded" * 32) == []
        assert asked == ["vda 0", "vda 0"]


def test_a_point_is_examined_where_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.connect() as site:
        machine = place.world.add_machine("big", {"vda": MiB})
        description = Description(machine.value, "memory")
        replica = site.target.create_replica(ReplicaSpec("r1", "big", 1, description), Watch())
        with replica.open_cycle(CycleSpec("c1", 1, None, {"vda": MiB})) as writer:
            writer.write("vda", 0, memoryview(b"x" * 64 * KiB))
            writer.seal(SealSpec("p1", 1.0, Consistency.CRASH, True, description))
        before = place.relay.sent
        assert replica.examine("p1", start=0) == Examination((), MiB, MiB)
        assert place.relay.sent - before < 4 * KiB
        place.world.damage_point("r1", "p1", "vda", 5)
        assert replica.examine("p1").damage
        replica.mark_damaged("p1", "a byte")
        assert replica.info().points[0].damaged == "a byte"
        replica.raise_epoch(2)
        with pytest.raises(StaleEpoch):
            replica.mark_damaged("p1", "", 1)
        assert replica.info().points[0].damaged == "a byte"
        # A master target of an older version knows neither call.
        call = SiteServer.call

        def older(self: SiteServer, channel: Channel, name: str, *given: Any) -> Answer:
            if name in ("replica.examine", "replica.mark_damaged"):
                raise UnsupportedOperation(driver="memory", operation=f"answer the call {name!r}")
            return call(self, channel, name, *given)

        monkeypatch.setattr(SiteServer, "call", older)
        assert replica.examine("p1", start=0) == Examination((), MiB, 0)
        replica.mark_damaged("p1", "")


# -- wrong questions -------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, dict[str, object], type[AsrError]]] = {
    "no such call": ("site.explode", {}, UnsupportedOperation),
    "a method that is no call": ("site.close", {}, UnsupportedOperation),
    "no such machine": ("inventory.machine", {"machine_id": "nobody"}, MachineNotFound),
    "an argument of another kind": ("inventory.machine", {"machine_id": 7}, InvalidValue),
    "an argument that is missing": ("inventory.power_off", {"machine_id": "web"}, InvalidValue),
    "a handle that was never given": ("view.confirm", {"view": "0" * 16}, SiteUnreachable),
    "a handle of something else": ("cycle.flush", {"cycle": "0" * 16}, SiteUnreachable),
    "a negative range": ("reader.read", {"reader": "x", "offset": -1, "length": 1}, InvalidValue),
    "too long a range": ("reader.read", {"reader": "x", "offset": 0, "length": 1 << 40}, InvalidValue),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_question_is_answered_in_words(place: Place, case: str) -> None:
    call, head, error = WRONG[case]
    with place.connect() as site:
        channel = site._links.channel()
        with pytest.raises(error):
            channel.ask(call, head)
        site.status()
        assert channel.error is None, "the connection stays open"


def test_an_answer_that_is_too_large_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from asrcore.wire import frames

    for number in range(5):
        place.world.add_machine(f"machine{number}", {"vda": MiB})
    with place.connect() as site:
        site.status()
        monkeypatch.setattr(frames, "MAX_HEAD", 600)
        with pytest.raises(PeerFailed, match="too large"):
            site.inventory.machines()


def test_an_error_of_a_newer_peer_keeps_its_words() -> None:
    head = {"code": "moon-missing", "attributes": {}, "happened": "no moon", "cause": "Gone.", "action": "Wait."}
    error = rebuilt(head, "x", "peer")
    assert isinstance(error, PeerError)
    assert "no moon" in str(error)
    assert ("Gone." in error.cause_text, error.action_text) == (True, "Wait.")
