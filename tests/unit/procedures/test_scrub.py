"""Kept recovery points are read in turn, slowly, and damage is found before it is needed."""

from __future__ import annotations

import attrs
import pytest

from asrcore.errors import Cancelled
from asrcore.model.point import Consistency, RecoveryPoint
from asrcore.model.policy import Window
from asrcore.model.watch import Watch
from asrcore.procedures import scrub
from asrcore.testing.memory._target import MemoryReplica
from asrcore.units import DAY, HOUR, KiB, MiB
from tests.unit.rig import Rig

FAST = 1e12
PART = 256 * KiB


@pytest.fixture
def three(protected: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """With three kept points."""
    monkeypatch.setattr(scrub, "PART", PART)
    for number in range(2):
        protected.clock.now += 60
        protected.machine.write("vda", 4096, b"newer %d" % number)
        protected.engine.replicate("web")
    return protected


def run(rig: Rig, watch: Watch | None = None, rate: float = FAST) -> bool:
    return scrub.scrub(rig.engine.context, rig.protection.id, watch or Watch(), rate=rate)


def point(name: str, sealed: float, proved: float | None = None, *, kept: bool = True, to: int = 0) -> RecoveryPoint:
    return RecoveryPoint(name, sealed, sealed, Consistency.CRASH, kept=kept, proved_at=proved, proved_to=to)


def test_the_newest_is_read_first_and_then_what_was_not_read_for_long() -> None:
    points = [
        point("old", 0.0),
        point("read", 1.0, 9 * DAY),
        point("older", 2.0, 1 * DAY),
        point("young", 9 * DAY),
        point("future", 3.0, 11 * DAY),  # of a clock that was wrong
        point("newest", 9.5 * DAY),
        point("head", 9.9 * DAY, kept=False),
    ]
    due = [item.id for item in scrub.points_due(points, 7 * DAY, 10 * DAY)]
    assert due == ["newest", "old", "older", "future"]
    begun = [attrs.evolve(item, proved_to=MiB) if item.id == "young" else item for item in points]
    assert scrub.points_due(begun, 7 * DAY, 10 * DAY)[0].id == "young"
    assert scrub.points_due([], 7 * DAY, 10 * DAY) == []


def test_a_scrub_reads_the_newest_point_and_records_it(three: Rig) -> None:
    assert run(three)
    assert [item.proved_at is not None for item in three.engine.points("web")] == [False, False, True]
    assert three.protection.last_scrub_at is not None
    three.clock.now += 8 * DAY
    assert run(three)
    assert all(item.proved_at is not None for item in three.engine.points("web"))


@pytest.mark.parametrize("offset", [0, MiB + 5, 2 * MiB - 1])
def test_damage_is_found_marked_and_reported(three: Rig, offset: int) -> None:
    bad = three.engine.points("web")[-1].id
    three.away.damage_point(three.protection.replica_id, bad, "vda", offset)
    assert run(three)
    found = three.engine.points("web")
    assert [bool(item.damaged) for item in found] == [False, False, True]
    assert found[-1].proved_at is not None
    assert three.engine.status()[0].damaged_points == 1
    assert bad in three.engine.vault.events(kinds=["damage"])[0].text
    three.away.damage_point(three.protection.replica_id, bad, "vda", offset)  # it is as it was
    assert run(three)
    assert not any(item.damaged for item in three.engine.points("web"))


def test_it_resumes_where_it_stopped(three: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int | None] = []
    examine = MemoryReplica.examine

    def seen(self: MemoryReplica, point_id: str, **given: object) -> object:
        starts.append(given["start"])  # type: ignore[arg-type]
        if len(starts) == 4:
            watch.cancel()
        return examine(self, point_id, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryReplica, "examine", seen)
    watch = Watch()
    with pytest.raises(Cancelled):
        run(three, watch)
    three.restart()
    watch = Watch()
    assert run(three)
    assert starts == [0, PART, 2 * PART, 3 * PART, *range(3 * PART, 3 * MiB, PART)]


def test_it_stands_back_while_the_machine_is_worked_on(three: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    busy = iter([None, "a cycle", "a cycle", None])
    monkeypatch.setattr(three.engine.context.locks, "busy", lambda _: next(busy, None))
    monkeypatch.setattr(Watch, "wait", lambda _, seconds: waits.append(seconds))
    assert run(three)
    assert waits.count(scrub.STAND_BACK) == 2


def test_it_gives_up_while_the_machine_is_worked_on_for_long(three: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    busy = iter(["a cycle", None, *["a resync"] * 10_000])
    monkeypatch.setattr(three.engine.context.locks, "busy", lambda _: next(busy))
    monkeypatch.setattr(Watch, "wait", lambda _, seconds: waits.append(seconds))
    assert not run(three)
    assert sum(waits) == pytest.approx(scrub.GIVE_UP + scrub.STAND_BACK, abs=0.01)
    assert three.protection.last_scrub_at is None
    assert three.engine.points("web")[-1].proved_to == PART  # a later one resumes there


def test_it_reads_no_faster_than_it_may(three: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Watch, "wait", lambda _, seconds: waits.append(seconds))
    still = lambda: 0.0  # noqa: E731 - reading takes no time
    assert scrub.scrub(three.engine.context, three.protection.id, Watch(), rate=1.0 * MiB, clock=still)
    assert sum(waits) == pytest.approx((3 * MiB - PART) / MiB)  # not after the last part


def test_it_stops_when_the_window_closes_or_the_policy_ends_it(three: Rig) -> None:
    vault = three.engine.vault
    policy = vault.policy("gold")
    for changed in (attrs.evolve(policy, scrub_every=0.0), attrs.evolve(policy, resync_window=Window(1.0, 1.5))):
        vault.update_policy(changed)
        assert not run(three)
        assert three.protection.last_scrub_at is None
    vault.update_policy(attrs.evolve(policy, scrub_every=HOUR))
    assert run(three)


def test_a_point_that_is_deleted_meanwhile_is_no_trouble(three: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    three.clock.now += 8 * DAY
    examine, dropped = MemoryReplica.examine, three.engine.points("web")[0].id

    def drop(self: MemoryReplica, point_id: str, **given: object) -> object:
        self.drop_points([dropped], three.protection.epoch)
        return examine(self, point_id, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryReplica, "examine", drop)
    assert run(three)
    assert three.protection.last_scrub_at is not None


def test_without_digests_content_is_not_read_regularly(three: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    info, examine, starts = MemoryReplica.info, MemoryReplica.examine, list[int | None]()

    def seen(self: MemoryReplica, point_id: str, **given: object) -> object:
        starts.append(given.get("start"))  # type: ignore[arg-type]
        return examine(self, point_id, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryReplica, "info", lambda self: attrs.evolve(info(self), keeps_digests=False))
    monkeypatch.setattr(MemoryReplica, "examine", seen)
    assert run(three)
    assert starts == [None]
    assert three.engine.points("web")[-1].proved_at is None
    three.away.damage_point(three.protection.replica_id, three.engine.points("web")[-1].id, "vda", 0)
    assert run(three)
    assert three.engine.points("web")[-1].damaged


@pytest.mark.parametrize(
    "place", ["scrub.part", "examine.noted", "target.marked", "vault.note-examined.committed", "scrub.ended"]
)
def test_a_kill_costs_nothing(three: Rig, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    bad = three.engine.points("web")[-1].id
    three.away.damage_point(three.protection.replica_id, bad, "vda", MiB + 5)
    with three.killed_at(place, monkeypatch) as reached:
        run(three)
    assert reached
    assert run(three)
    assert [item.id for item in three.engine.points("web") if item.damaged] == [bad]
    info = three.engine.context.site("b").target.replica(three.protection.replica_id).info()
    assert [item.id for item in info.points if item.damaged] == [bad]


def test_damage_that_is_found_meanwhile_is_not_taken_back(three: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    point = three.engine.points("web")[-1]
    examine = MemoryReplica.examine

    def seen(self: MemoryReplica, point_id: str, **given: object) -> object:
        if given["start"] == PART:
            three.engine.vault.note_examined(three.protection.id, point.id, damaged="a link", proved_at=None)
        return examine(self, point_id, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryReplica, "examine", seen)
    assert run(three)
    marked = three.engine.points("web")[-1]
    assert (marked.damaged, marked.proved_to) == ("a link", 0)
    monkeypatch.undo()
    assert run(three)
    assert not three.engine.points("web")[-1].damaged
