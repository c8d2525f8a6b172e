"""A recovery point is looked at before it is used; a damaged one is marked, reported and not chosen."""

from __future__ import annotations

import pytest

from asrcore.driver import Examination
from asrcore.errors import DriverFailed, PointDamaged
from asrcore.model.health import Level
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from asrcore.procedures import examine
from asrcore.testing.memory._target import MemoryReplica
from asrcore.units import KiB, MiB, format_time
from tests.unit.rig import Rig, facts


@pytest.fixture
def two(protected: Rig) -> Rig:
    """With two kept points of different content."""
    protected.clock.now += 60
    protected.machine.write("vda", 4096, b"newer")
    protected.engine.replicate("web")
    assert len(protected.engine.points("web")) == 2
    return protected


def damage(rig: Rig, number: int, offset: int = 0) -> str:
    """Change a byte of a point at the target; returns the point's id."""
    point_id = rig.engine.points("web")[number].id
    rig.away.damage_point(rig.protection.replica_id, point_id, "vda", offset)
    return point_id


def marked(rig: Rig) -> list[str]:
    """What the target says of each point."""
    info = rig.engine.context.site("b").target.replica(rig.protection.replica_id).info()
    return [point.damaged for point in info.points]


def test_a_damaged_latest_point_is_passed_over_by_an_unplanned_failover(two: Rig) -> None:
    first, bad = two.engine.points("web")[0].id, damage(two, -1)
    job = two.engine.failover_unplanned("web")
    assert two.protection.failover_point == first
    assert facts(job)["passed_over"] == [bad]
    assert "disk vda" in two.engine.points("web")[-1].damaged
    said = [event.text for event in two.engine.vault.events(kinds=["failover"])]
    assert f"point {first} is taken; newer ones are damaged: {bad}" in said


def test_a_damaged_point_of_a_time_is_passed_over(two: Rig) -> None:
    first, at = two.engine.points("web")[0].id, two.engine.points("web")[-1].taken_at
    bad = damage(two, -1)
    job = two.engine.failover_unplanned("web", point=format_time(at + 1))
    assert (two.protection.failover_point, facts(job)["passed_over"]) == (first, [bad])


@pytest.mark.parametrize("known", [False, True])
def test_a_damaged_point_that_is_named_stops_an_unplanned_failover_before_anything_is_taken(
    two: Rig, known: bool
) -> None:
    first, bad = two.engine.points("web")[0].id, damage(two, -1)
    epoch = two.protection.epoch
    for _ in range(2 if known else 1):
        with pytest.raises(PointDamaged, match=f"{bad} of 'web' is damaged: disk vda") as caught:
            two.engine.failover_unplanned("web", point=bad)
    assert first in str(caught.value.attributes["other"])
    assert first in caught.value.action_text
    assert (two.protection.state, two.protection.epoch) == (State.PROTECTED, epoch)
    assert two.power("a") is PowerState.RUNNING


def test_where_all_points_are_damaged_a_failover_ends(two: Rig) -> None:
    newest = [damage(two, number) for number in (0, 1)][-1]
    with pytest.raises(PointDamaged, match=newest):
        two.engine.failover_unplanned("web")
    assert all(point.damaged for point in two.engine.points("web"))
    assert (two.protection.state, two.power("a")) == (State.PROTECTED, PowerState.RUNNING)


def test_only_some_points_are_passed_over(two: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "_MOST_PASSED_OVER", 0)
    bad = damage(two, -1)
    with pytest.raises(PointDamaged, match=bad):
        two.engine.failover_unplanned("web")


def test_a_damaged_point_stops_a_test_and_leaves_no_test(two: Rig) -> None:
    first, bad = two.engine.points("web")[0].id, damage(two, -1)
    with pytest.raises(PointDamaged, match=bad):
        two.engine.failover_test("web")
    assert two.protection.test is None
    assert facts(two.engine.failover_test("web"))["point"] == first


def test_a_damaged_head_stops_a_planned_failover_while_the_source_runs(two: Rig) -> None:
    damage(two, -1)
    with pytest.raises(PointDamaged) as caught:
        two.engine.failover_planned("web")
    assert "asr verify web --repair" in caught.value.action_text
    assert two.power("a") is PowerState.RUNNING
    assert two.protection.state is State.PROTECTED


def test_a_damaged_point_is_marked_here_and_at_the_target_and_reported(two: Rig) -> None:
    bad = damage(two, 0)
    with pytest.raises(PointDamaged):
        two.engine.failover_test("web", point=bad)
    assert "disk vda" in two.engine.points("web")[0].damaged
    assert ["disk vda" in text for text in marked(two)] == [True, False]
    status = two.engine.status()[0]
    assert status.damaged_points == 1
    reasons = {reason.code: reason for reason in status.health.reasons}
    assert reasons["points-damaged"].what == "1 of 2 recovery points of 'web' are damaged"
    assert [event.kind for event in two.engine.vault.events(kinds=["damage"])] == ["damage"]


def test_without_a_whole_point_health_is_critical(two: Rig) -> None:
    for number in (0, 1):
        with pytest.raises(PointDamaged):
            two.engine.failover_test("web", point=damage(two, number))
    status = two.engine.status()[0]
    assert status.health.level is Level.CRITICAL
    assert "none is left to fail over to" in next(
        reason.what for reason in status.health.reasons if reason.code == "points-damaged"
    )
    with pytest.raises(PointDamaged) as caught:
        two.engine.failover_unplanned("web")
    assert caught.value.attributes["other"] == "none"


def test_a_known_damaged_point_is_refused_by_name_unless_it_is_allowed(two: Rig) -> None:
    bad = damage(two, 0)
    for _ in range(2):
        with pytest.raises(PointDamaged, match=bad):
            two.engine.failover_unplanned("web", point=bad)
    shown = two.engine.impact("failover-unplanned", "web", point=bad)
    assert any("is damaged" in text for text in shown.effects)
    job = two.engine.failover_unplanned("web", point=bad, allow_damaged=True)
    assert "disk vda" in facts(job)["damaged"]
    assert two.protection.failover_point == bad


def test_a_quick_look_does_not_read_all_of_it_and_a_proof_does(two: Rig) -> None:
    bad = damage(two, -1, offset=MiB)  # neither at the beginning nor at the end of the disk
    assert facts(two.engine.failover_test("web"))["point"] == bad
    two.engine.failover_cleanup("web")
    with pytest.raises(PointDamaged, match=bad):
        two.engine.failover_test("web", prove=True)
    assert two.engine.points("web")[-1].proved_at is not None


def test_a_proof_in_parts_covers_all_of_it(two: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "PART", 192 * KiB)
    result = facts(two.engine.failover_test("web", prove=True))
    assert (result["examined_bytes"], result["proved_bytes"]) == (3 * MiB, 3 * MiB)
    point = two.engine.points("web")[-1]
    assert (point.damaged, point.proved_to) == ("", 0)
    assert point.proved_at is not None
    two.engine.failover_cleanup("web")
    damage(two, -1, offset=2 * MiB - 1)
    with pytest.raises(PointDamaged):
        two.engine.failover_test("web", prove=True)


def test_only_a_proof_takes_a_mark_back(two: Rig) -> None:
    bad = damage(two, -1)
    with pytest.raises(PointDamaged):
        two.engine.failover_test("web")
    damage(two, -1)  # the same byte: it is as it was
    two.engine.failover_test("web", point=bad, allow_damaged=True)
    assert two.engine.points("web")[-1].damaged
    two.engine.failover_test("web", point=bad, allow_damaged=True, prove=True)
    assert not two.engine.points("web")[-1].damaged
    assert marked(two) == ["", ""]
    assert facts(two.engine.failover_test("web"))["point"] == bad


def test_what_cannot_be_marked_at_the_target_is_refused_all_the_same(two: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise DriverFailed(operation="mark", site="b", detail="a test")

    monkeypatch.setattr(MemoryReplica, "mark_damaged", refused)
    bad = damage(two, -1)
    with pytest.raises(PointDamaged):
        two.engine.failover_unplanned("web", point=bad)
    assert two.engine.points("web")[-1].damaged


def test_a_target_that_does_not_answer_has_no_damaged_points(two: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> Examination:
        raise DriverFailed(operation="read", site="b", detail="a test")

    monkeypatch.setattr(MemoryReplica, "examine", lost)
    with pytest.raises(DriverFailed):
        two.engine.failover_unplanned("web")
    assert not two.engine.points("web")[-1].damaged
    assert two.protection.state is State.PROTECTED
