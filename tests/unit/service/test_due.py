"""Which work is due, from the record alone."""

from __future__ import annotations

import attrs
import pytest

from asrcore.model.health import Load
from asrcore.model.policy import ALWAYS, Policy, Window
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.service.due import (
    QUICK,
    SLOW,
    Action,
    cycle_at,
    due_action,
    load,
    next_cycle_at,
    scrub_due,
    verification_due,
)
from asrcore.units import DAY, HOUR
from asrcore.vault import JobState

NOW = 1_800_000_000.0
POLICY = Policy("gold", interval=5, point_interval=5, resync_window=ALWAYS)
PROTECTION = Protection(
    id="m1",
    name="web",
    policy="gold",
    home_site="a",
    source_site="a",
    source_machine="u",
    target_site="b",
    replica_id="r1",
    state=State.PROTECTED,
    last_cycle_at=NOW - 4,
)


@pytest.mark.parametrize(
    ("state", "action"),
    [
        (State.ENABLING, Action.PROTECT),
        (State.INITIAL_COPY, Action.PROTECT),
        (State.FINALIZING, Action.PROTECT),
        (State.RESYNC_PENDING, Action.RESYNC),
        (State.RESYNCING, Action.RESYNC),
        (State.REVERSING, Action.REPROTECT),
        (State.PROTECTED, Action.CYCLE),
        (State.FAILING_OVER, Action.NOTHING),
        (State.FAILED_OVER, Action.NOTHING),
        (State.UNDOING, Action.NOTHING),
        (State.COMMITTING, Action.NOTHING),
        (State.COMMITTED, Action.NOTHING),
        (State.DISABLING, Action.NOTHING),
    ],
)
def test_each_state_has_its_work(state: State, action: Action) -> None:
    assert due_action(attrs.evolve(PROTECTION, state=state), POLICY, NOW + 10) is action


def test_a_cycle_is_due_an_interval_after_the_last_began() -> None:
    assert due_action(PROTECTION, POLICY, NOW) is Action.NOTHING
    assert due_action(PROTECTION, POLICY, NOW + 1) is Action.CYCLE
    assert next_cycle_at(PROTECTION, POLICY, NOW) == NOW + 1


@pytest.mark.parametrize("back", [10.0, 3600.0, 400 * DAY])
def test_nothing_waits_for_a_clock_that_was_set_back(back: float) -> None:
    now = NOW - back
    assert due_action(attrs.evolve(PROTECTION, last_cycle_at=NOW), POLICY, now) is Action.CYCLE
    assert cycle_at(attrs.evolve(PROTECTION, last_cycle_at=NOW), POLICY, now) == now
    first = attrs.evolve(PROTECTION, last_cycle_at=None, created_at=NOW)
    assert due_action(first, POLICY, now) is Action.CYCLE
    failed = attrs.evolve(PROTECTION, attempt=2, retry_at=NOW + 120)
    assert due_action(failed, POLICY, now) is Action.CYCLE
    assert due_action(failed, POLICY, NOW) is Action.NOTHING, "a retry waits for its whole delay"
    new = attrs.evolve(PROTECTION, state=State.ENABLING, created_at=NOW)
    assert due_action(new, POLICY, now) is Action.PROTECT


def test_a_verification_does_not_wait_for_a_clock_that_was_set_back() -> None:
    assert verification_due(PROTECTION, POLICY, {JobState.DONE: NOW + DAY}, NOW)
    assert verification_due(attrs.evolve(PROTECTION, created_at=NOW + DAY), POLICY, {}, NOW)
    both = {JobState.DONE: NOW + DAY, JobState.FAILED: NOW - 60}
    assert not verification_due(PROTECTION, POLICY, both, NOW), "the failed one was just now"


def test_a_failed_cycle_waits_for_its_retry() -> None:
    waiting = attrs.evolve(PROTECTION, attempt=1, retry_at=NOW + 60)
    assert due_action(waiting, POLICY, NOW + 59) is Action.NOTHING
    assert due_action(waiting, POLICY, NOW + 60) is Action.CYCLE


def test_an_unrecoverable_error_is_not_retried() -> None:
    stopped = attrs.evolve(PROTECTION, attempt=1, retry_at=None)
    assert due_action(stopped, POLICY, NOW + 1e6) is Action.NOTHING


def test_a_machine_recorded_just_now_is_left_to_its_own_job() -> None:
    new = attrs.evolve(PROTECTION, state=State.ENABLING, created_at=NOW)
    assert due_action(new, POLICY, NOW + 1) is Action.NOTHING
    assert due_action(new, POLICY, NOW + 11) is Action.PROTECT


def test_a_resync_waits_for_its_window() -> None:
    pending = attrs.evolve(PROTECTION, state=State.RESYNC_PENDING)
    never = Policy("night", resync_window=Window(1.0, 1.5))
    assert due_action(pending, never, NOW + 10) is Action.NOTHING


def test_a_machine_whose_deltas_stand_still_has_no_time_for_the_next() -> None:
    assert cycle_at(PROTECTION, POLICY, NOW) == NOW + 1
    assert cycle_at(attrs.evolve(PROTECTION, attempt=1, retry_at=NOW + 60), POLICY, NOW) == NOW + 60
    assert cycle_at(attrs.evolve(PROTECTION, attempt=1), POLICY, NOW) is None
    assert cycle_at(attrs.evolve(PROTECTION, state=State.RESYNCING), POLICY, NOW) is None


@pytest.mark.parametrize(
    ("ended", "due"),
    [
        ({}, True),
        ({JobState.DONE: NOW - 7 * DAY}, True),
        ({JobState.DONE: NOW - 7 * DAY + 1}, False),
        ({JobState.DONE: NOW - 8 * DAY, JobState.FAILED: NOW - HOUR + 1}, False),
        ({JobState.DONE: NOW - 8 * DAY, JobState.CANCELLED: NOW - HOUR}, True),
        ({JobState.FAILED: NOW - 30 * DAY}, True),
    ],
)
def test_a_verification_is_due_a_week_after_the_last_good_one(ended: dict[JobState, float], due: bool) -> None:
    assert verification_due(PROTECTION, POLICY, ended, NOW) is due


def test_a_verification_waits_for_a_machine_in_order_and_for_the_window() -> None:
    assert not verification_due(attrs.evolve(PROTECTION, created_at=NOW - 7 * DAY + 1), POLICY, {}, NOW)
    assert verification_due(attrs.evolve(PROTECTION, created_at=NOW - 7 * DAY), POLICY, {}, NOW)
    assert not verification_due(attrs.evolve(PROTECTION, state=State.RESYNCING), POLICY, {}, NOW)
    assert not verification_due(attrs.evolve(PROTECTION, attempt=1, retry_at=NOW + 60), POLICY, {}, NOW)
    assert not verification_due(PROTECTION, attrs.evolve(POLICY, resync_window=Window(1.0, 1.5)), {}, NOW)
    assert not verification_due(PROTECTION, attrs.evolve(POLICY, verify_every=0.0), {}, NOW)


@pytest.mark.parametrize(
    ("last", "due"),
    [(None, True), (NOW - 7 * DAY, True), (NOW - 7 * DAY + 1, False), (NOW + 60, True), (NOW - 30 * DAY, True)],
)
def test_a_scrub_is_due_a_week_after_the_last(last: float | None, due: bool) -> None:
    scrubbed = attrs.evolve(PROTECTION, head_point="p1", last_scrub_at=last)
    assert scrub_due(scrubbed, POLICY, NOW) is due


def test_a_scrub_waits_for_a_point_and_for_the_window() -> None:
    ready = attrs.evolve(PROTECTION, head_point="p1")
    assert not scrub_due(attrs.evolve(ready, head_point=None), POLICY, NOW)
    assert not scrub_due(attrs.evolve(ready, state=State.RESYNCING), POLICY, NOW)
    assert not scrub_due(ready, attrs.evolve(POLICY, resync_window=Window(1.0, 1.5)), NOW)
    assert not scrub_due(ready, attrs.evolve(POLICY, scrub_every=0.0), NOW)


def test_the_service_is_saturated_when_more_are_late_than_it_works_on() -> None:
    policies = {"gold": POLICY}
    late = attrs.evolve(PROTECTION, last_cycle_at=NOW - 11)
    failing = attrs.evolve(late, attempt=1, retry_at=NOW - 100)
    at_a_time = QUICK + SLOW
    others = [PROTECTION, failing, attrs.evolve(late, state=State.RESYNCING)]
    busy = load([late] * at_a_time + others, policies, NOW)
    assert busy == Load(at_a_time, at_a_time + 2, at_a_time)
    assert not busy.saturated
    assert load([late] * (at_a_time + 1) + others, policies, NOW).saturated
    assert not load([attrs.evolve(late, last_cycle_at=NOW - 10)] * 100, policies, NOW).saturated
