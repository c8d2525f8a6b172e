"""The retention rule and its guarantees."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.model.point import Consistency, RecoveryPoint
from asrcore.model.policy import Policy, Rung
from asrcore.replication.retention import cutoff, point_due, to_drop
from asrcore.units import DAY, HOUR, MINUTE

NOW = 1_700_000_000.0


def point(taken_at: float, *, kept: bool = True, pinned: bool = False) -> RecoveryPoint:
    return RecoveryPoint(f"p{taken_at}", taken_at, taken_at + 1, Consistency.CRASH, kept, pinned)


def left(points: list[RecoveryPoint], policy: Policy, now: float) -> list[RecoveryPoint]:
    dropped = {item.id for item in to_drop(points, policy, now)}
    return [item for item in points if item.id not in dropped]


@st.composite
def ladders(draw: st.DrawFn) -> tuple[Rung, ...]:
    """Any ladder that a policy accepts, including spacings that are not multiples of each other."""
    count = draw(st.integers(0, 4))
    ages = sorted(draw(st.sets(st.integers(0, 40_000), min_size=count, max_size=count)))
    spaces = sorted(draw(st.sets(st.integers(1, 9_000), min_size=count, max_size=count)))
    return tuple(Rung(float(age), float(space)) for age, space in zip(ages, spaces, strict=True))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    keep = float(draw(st.integers(300, 50_000)))
    return Policy("p", interval=60.0, point_interval=60.0, keep=keep, ladder=draw(ladders()))


points_before_now = st.lists(st.integers(0, 60_000), min_size=1, max_size=60, unique=True).map(
    lambda ages: [point(NOW - age) for age in sorted(ages, reverse=True)]
)
later = st.integers(0, 60_000)


@given(points_before_now, policies(), later)
def test_newest_always_stays(points: list[RecoveryPoint], policy: Policy, wait: int) -> None:
    assert points[-1] not in to_drop(points, policy, NOW + wait)


@given(points_before_now, policies())
def test_thinning_again_drops_nothing(points: list[RecoveryPoint], policy: Policy) -> None:
    once = left(points, policy, NOW)
    assert to_drop(once, policy, NOW) == []


@given(points_before_now, policies(), later)
def test_points_that_may_go_and_the_newest_are_all_that_matters(
    points: list[RecoveryPoint], policy: Policy, wait: int
) -> None:
    old = [item for item in points if item.taken_at < cutoff(policy, NOW + wait) or item is points[-1]]
    assert to_drop(old, policy, NOW + wait) == to_drop(points, policy, NOW + wait)


@given(points_before_now, policies(), later)
def test_dropped_once_is_droppable_ever_after(points: list[RecoveryPoint], policy: Policy, wait: int) -> None:
    assert set(to_drop(points, policy, NOW)) <= set(to_drop(points, policy, NOW + wait))


@given(points_before_now, policies(), st.lists(later, max_size=5))
def test_thinning_often_loses_nothing_that_thinning_late_keeps(
    points: list[RecoveryPoint], policy: Policy, waits: list[int]
) -> None:
    often = points
    for wait in [*sorted(waits), 60_000]:
        often = left(often, policy, NOW + wait)
    assert set(left(points, policy, NOW + 60_000)) <= set(often)


def test_spacings_that_are_no_multiples_do_not_cut_through_each_other() -> None:
    """Buckets of 90 s next to buckets of 60 s would later keep points that were deleted earlier: applying retention
    twice would delete more."""
    policy = Policy("p", interval=60.0, point_interval=60.0, keep=DAY, ladder=(Rung(0.0, 60.0), Rung(1000.0, 90.0)))
    base = NOW // 180 * 180
    points = [point(base + 70), point(base + 100), point(base + 5000)]
    early = left(points, policy, base + 200)
    assert left(early, policy, base + 3000) == left(points, policy, base + 3000) == [points[0], points[2]]


@given(points_before_now, policies(), points_before_now)
def test_new_points_push_out_none_but_the_former_newest(
    points: list[RecoveryPoint], policy: Policy, more: list[RecoveryPoint]
) -> None:
    newer = [point(item.taken_at + 60_001) for item in more]
    now = NOW + 60_001
    assert set(to_drop([*points, *newer], policy, now)) - set(to_drop(points, policy, now)) <= {points[-1], *newer}


@given(policies(), st.integers(20, 900), st.integers(0, 1000))
def test_distance_of_kept_neighbours_is_bounded(policy: Policy, step: int, phase: int) -> None:
    points = [point(NOW - phase - age) for age in range(0, int(policy.keep), step)][::-1]
    for older, newer in pairwise(left(points, policy, NOW)):
        passed = [rung.every for rung in policy.ladder if NOW - older.taken_at > rung.after]
        assert newer.taken_at - older.taken_at <= (passed[-1] if passed else 0) + step


@given(policies(), st.integers(20, 900))
def test_number_of_points_is_bounded(policy: Policy, step: int) -> None:
    points = [point(NOW - age) for age in range(0, 60_000, step)]
    ends = [*(rung.after for rung in policy.ladder), policy.keep]
    bound = ends[0] / step + 3  # plus the newest, whatever its age
    for rung, end in zip(policy.ladder, ends[1:], strict=True):
        # Rounded down to a multiple of the previous one, a spacing is still more than half of the requested one.
        bound += max(0.0, min(end, policy.keep) - rung.after) / (rung.every / 2) + 2
    assert len(left(points, policy, NOW)) <= bound


def test_reference_ladder_keeps_what_it_says() -> None:
    policy = Policy("reference", keep=15 * DAY)
    points = [point(NOW - minutes * MINUTE) for minutes in range(0, 20 * 24 * 60, 5)]
    ages = [NOW - item.taken_at for item in left(points, policy, NOW)]
    assert sum(age <= 2 * HOUR for age in ages) == 25
    assert sum(2 * HOUR < age <= DAY for age in ages) in (22, 23)
    assert sum(DAY < age <= 7 * DAY for age in ages) in (72, 73)
    assert sum(7 * DAY < age <= 15 * DAY for age in ages) in (48, 49)
    assert max(ages) <= 15 * DAY


def test_day_by_day_the_oldest_points_stay_where_they_are() -> None:
    """A week of a running machine: the point of an hour bucket today is the same point tomorrow."""
    policy, former = Policy("p", keep=3 * DAY), set[RecoveryPoint]()
    points: list[RecoveryPoint] = []
    for tick in range(7 * 24 * 12):
        now = NOW + tick * 300
        points = left([*points, point(now)], policy, now)
        hourly = {item for item in points if 2 * HOUR < now - item.taken_at <= DAY}
        gone = former - set(points)
        assert all(now - item.taken_at > DAY for item in gone)
        former = hourly


def test_pinned_and_passing_points_are_left_alone_and_not_counted() -> None:
    policy = Policy("p", keep=HOUR, ladder=(Rung(0.0, HOUR),))
    start = NOW // HOUR * HOUR
    pinned = point(start + 1, pinned=True)
    passing = point(start + 2, kept=False)
    first, second, newest = point(start + 3), point(start + 4), point(start + 5)
    points = [pinned, passing, first, second, newest]
    assert to_drop(points, policy, start + 600) == [second]
    assert to_drop(points, policy, start + 2 * HOUR) == [first, second]


def test_without_points_nothing_is_dropped() -> None:
    assert to_drop([], Policy("p"), NOW) == []


@pytest.mark.parametrize(
    ("since", "due"),
    [(None, True), (300.0, True), (297.6, True), (297.4, False), (5.0, False), (0.0, False), (-60.0, True)],
    ids=["first", "on-time", "half-a-cycle-early", "too-early", "just-made", "same-instant", "clock-set-back"],
)
def test_point_due(since: float | None, due: bool) -> None:
    policy = Policy("p", interval=5.0, point_interval=300.0)
    assert point_due(policy, None if since is None else NOW - since, NOW) is due
