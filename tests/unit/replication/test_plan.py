"""The planner: which disk is copied, which is compared, and the work left of an interrupted cycle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.driver import Tracking
from asrcore.model.extent import Extent, intersect, normalise, subtract, union
from asrcore.model.protection import CycleMode
from asrcore.replication.plan import DiskFacts, Method, ResyncDue, method_of, work_of, work_resumed

SIZE = 1000
EXTENTS = st.lists(st.builds(Extent, st.integers(0, SIZE - 1), st.integers(1, 200), st.booleans()), max_size=8).map(
    lambda items: [item for item in normalise(items) if item.end <= SIZE]
)


def facts(tracking: Tracking, at_target: int | None = SIZE) -> DiskFacts:
    return DiskFacts("vda", SIZE, tracking, "why", at_target)


@pytest.mark.parametrize(
    ("tracking", "at_target", "mode", "method"),
    [
        (Tracking.CHANGED, SIZE, CycleMode.DELTA, Method.CHANGES),
        (Tracking.CHANGED, SIZE, CycleMode.COMPARE, Method.COMPARE),
        (Tracking.CHANGED, SIZE, CycleMode.FULL, Method.ALL),
        (Tracking.NONE, SIZE, CycleMode.DELTA, Method.COMPARE),
        (Tracking.NONE, SIZE, CycleMode.FULL, Method.ALL),
        (Tracking.NEW, SIZE, CycleMode.DELTA, Method.COMPARE),
        (Tracking.NEW, None, CycleMode.DELTA, Method.ALL),
        (Tracking.LOST, None, CycleMode.DELTA, Method.ALL),
        (Tracking.LOST, SIZE, CycleMode.COMPARE, Method.COMPARE),
        (Tracking.LOST, SIZE, CycleMode.FULL, Method.ALL),
    ],
)
def test_method(tracking: Tracking, at_target: int | None, mode: CycleMode, method: Method) -> None:
    assert method_of(facts(tracking, at_target), mode) is method


def test_a_delta_never_guesses() -> None:
    with pytest.raises(ResyncDue, match="why"):
        method_of(facts(Tracking.LOST), CycleMode.DELTA)


@pytest.mark.parametrize(("changed", "due"), [(499, False), (500, True), (1000, True)])
def test_a_change_log_of_half_the_disk_makes_a_resync_due(changed: int, due: bool) -> None:
    extents = [Extent(0, changed)]
    if due:
        with pytest.raises(ResyncDue, match="%"):
            work_of(facts(Tracking.CHANGED), Method.CHANGES, extents, 0.5)
    else:
        assert work_of(facts(Tracking.CHANGED), Method.CHANGES, extents, 0.5).copy == tuple(extents)


def test_discarded_space_does_not_make_a_resync_due() -> None:
    extents = [Extent(0, 400), Extent(400, 600, zero=True)]
    assert work_of(facts(Tracking.CHANGED), Method.CHANGES, extents, 0.5).copy == tuple(extents)


def test_zeroes_of_a_new_disk_are_not_sent_but_of_a_reused_one_are() -> None:
    extents = [Extent(0, 100), Extent(100, 900, zero=True)]
    assert work_of(facts(Tracking.NEW, None), Method.ALL, extents, 0.5).copy == (Extent(0, 100),)
    assert work_of(facts(Tracking.NEW, SIZE), Method.ALL, extents, 0.5).copy == tuple(extents)


@given(planned=EXTENTS, done=EXTENTS, changed=EXTENTS, mode=st.sampled_from([CycleMode.FULL, CycleMode.DELTA]))
def test_a_resumed_cycle_covers_what_is_missing_and_what_changed(
    planned: list[Extent], done: list[Extent], changed: list[Extent], mode: CycleMode
) -> None:
    first, rest = work_resumed(facts(Tracking.CHANGED), mode, planned=planned, done=done, changed=changed)
    assert not first.compare
    assert not rest.compare
    assert _bytes(first.copy) == _bytes(changed)
    assert _bytes([*first.copy, *rest.copy]) == _bytes([*changed, *subtract(planned, done)])
    assert not intersect(first.copy, rest.copy)


@given(planned=EXTENTS, done=EXTENTS)
def test_unknown_changes_mean_comparing_all(planned: list[Extent], done: list[Extent]) -> None:
    first, rest = work_resumed(facts(Tracking.NONE), CycleMode.DELTA, planned=planned, done=done, changed=None)
    assert first.compare == (Extent(0, SIZE),)
    assert not rest.plan


@given(planned=EXTENTS, done=EXTENTS, changed=EXTENTS)
def test_a_resumed_comparison_compares(planned: list[Extent], done: list[Extent], changed: list[Extent]) -> None:
    first, rest = work_resumed(facts(Tracking.CHANGED), CycleMode.COMPARE, planned=planned, done=done, changed=changed)
    assert not first.copy
    assert not rest.copy
    assert _bytes(union(first.compare, rest.compare)) == _bytes([*changed, *subtract(planned, done)])


def _bytes(extents: list[Extent] | tuple[Extent, ...]) -> set[int]:
    return {at for item in extents for at in range(item.offset, item.end)}
