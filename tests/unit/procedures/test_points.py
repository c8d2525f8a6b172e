"""Which recovery point is meant by `latest`, an id, the start of one, or a time."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.errors import PointDamaged, PointNotFound
from asrcore.model.point import Consistency, RecoveryPoint
from asrcore.model.state import State
from asrcore.procedures.points import choose_point
from asrcore.units import format_time
from tests.unit.rig import Rig


def test_unplanned_failover_to_an_older_point_by_id_and_by_time(protected: Rig) -> None:
    first = protected.engine.points("web")[0]
    old = protected.truth()
    protected.clock.now += 60
    protected.machine.write("vda", 0, b"newer")
    protected.engine.replicate("web")
    between = format_time(first.taken_at + 30)
    for wanted in (first.id, first.id[:6], between):
        protected.engine.failover_unplanned("web", point=wanted)
        assert protected.protection.failover_point == first.id
        instance = protected.away.machine("web")
        assert {disk.id: instance.sha256(disk.id) for disk in instance.value.disks} == old
        protected.engine.failover_undo("web")
    with pytest.raises(PointNotFound):
        protected.engine.failover_unplanned("web", point="2001-01-01T00:00:00Z")
    assert protected.protection.state is State.PROTECTED


def point(name: str, taken_at: float = 0.0) -> RecoveryPoint:
    return RecoveryPoint(name, taken_at, taken_at, Consistency.CRASH, kept=True)


def test_the_latest_is_the_last() -> None:
    assert choose_point([point("p1", 1.0), point("p2", 2.0)], "latest", "web").id == "p2"


def test_a_whole_id_is_meant_before_the_start_of_another() -> None:
    points = [point("pa"), point("pab"), point("pabc")]
    assert choose_point(points, "pa", "web").id == "pa"
    assert choose_point(points, "pabc", "web").id == "pabc"


@pytest.mark.parametrize("text", ["p", "", "q", "pac", "2001-01-01", "latest "])
def test_what_names_no_single_point_is_refused(text: str) -> None:
    points = [point("pa", 1_800_000_000.0), point("pab", 1_800_000_001.0)]
    with pytest.raises(PointNotFound) as caught:
        choose_point(points, text, "web")
    assert caught.value.attributes == {"machine": "web", "point": text}


def bad(name: str, taken_at: float) -> RecoveryPoint:
    return attrs.evolve(point(name, taken_at), damaged="a byte")


def test_a_damaged_point_is_neither_the_latest_nor_that_of_a_time() -> None:
    points = [point("p1", 1_800_000_000.0), bad("p2", 1_800_000_100.0), bad("p3", 1_800_000_200.0)]
    assert choose_point(points, "latest", "web").id == "p1"
    assert choose_point(points, format_time(1_800_000_150.0), "web").id == "p1"
    assert choose_point(points, "latest", "web", allow_damaged=True).id == "p1"
    assert choose_point(points, "p1", "web").id == "p1"


def test_a_damaged_point_is_refused_and_the_newest_whole_one_before_it_named() -> None:
    points = [point("p1", 1_800_000_000.0), bad("p2", 1_800_000_100.0), bad("p3", 1_800_000_200.0)]
    for wanted in ("p2", "p3"):
        with pytest.raises(PointDamaged) as caught:
            choose_point(points, wanted, "web")
        assert caught.value.attributes["point"] == wanted
        assert str(caught.value.attributes["other"]).startswith("p1 of ")
        assert choose_point(points, wanted, "web", allow_damaged=True).id == wanted
    with pytest.raises(PointDamaged) as caught:
        choose_point(points[1:], "latest", "web")
    assert (caught.value.attributes["point"], caught.value.attributes["other"]) == ("p3", "none")
    assert choose_point(points[1:], "latest", "web", allow_damaged=True).id == "p3"


@pytest.mark.parametrize("text", ["latest", "p1", "2030-01-01"])
def test_without_points_none_is_found(text: str) -> None:
    with pytest.raises(PointNotFound):
        choose_point([], text, "web")


@given(times=st.lists(st.integers(1, 2_000_000_000), min_size=1, max_size=6, unique=True), at=st.integers(1, 2**31))
def test_a_time_means_the_newest_point_not_after_it(times: list[int], at: int) -> None:
    points = [point(f"p-{when}", float(when)) for when in sorted(times)]
    before = [when for when in sorted(times) if when <= at]
    if before:
        assert choose_point(points, format_time(float(at)), "web").taken_at == before[-1]
    else:
        with pytest.raises(PointNotFound):
            choose_point(points, format_time(float(at)), "web")
