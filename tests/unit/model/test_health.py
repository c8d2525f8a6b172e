"""Health and its reasons, for every state and at every age."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.errors import AccessDenied, MachineNotFound, SiteUnreachable
from asrcore.model.finding import Finding, Severity
from asrcore.model.health import TEST_DUE, Health, Level, Load, assess, rpo
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency, RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection
from asrcore.model.state import State

NOW = 1_700_000_000.0
POLICY = Policy("gold", interval=60.0, point_interval=60.0)
WEB = Protection(
    id="p1",
    name="web",
    policy="gold",
    home_site="paris",
    source_site="paris",
    source_machine="m1",
    target_site="lyon",
    replica_id="r1",
    state=State.PROTECTED,
    created_at=NOW - 1000,
)


def newest(age: float, consistency: Consistency = Consistency.CRASH) -> RecoveryPoint:
    """A point that shows the instant `age` seconds ago, whenever it was sealed."""
    return RecoveryPoint("new", NOW - age, NOW - age / 2, consistency, kept=False)


def codes(health: Health) -> list[str]:
    return [reason.code for reason in health.reasons]


def test_rpo_is_counted_from_the_instant_shown_not_from_the_seal() -> None:
    assert rpo(newest(90.0), NOW) == 90.0
    assert rpo(None, NOW) is None


def test_rpo_of_a_point_from_the_future_is_unknown() -> None:
    assert rpo(newest(-30.0), NOW) is None
    assert rpo(newest(-1.5), NOW) == 0.0, "clocks of two hosts may differ by so much"


@pytest.mark.parametrize("ahead", [3.0, 3600.0, 86400.0])
def test_a_point_or_a_cycle_from_the_future_is_critical(ahead: float) -> None:
    health = assess(WEB, POLICY, newest(-ahead), NOW)
    assert (health.level, codes(health)) == (Level.CRITICAL, ["clock-went-back"])
    assert codes(assess(attrs.evolve(WEB, last_cycle_at=NOW + ahead), POLICY, newest(0), NOW)) == ["clock-went-back"]
    assert codes(assess(attrs.evolve(WEB, last_cycle_at=NOW + 1), POLICY, newest(-1), NOW)) == []


def test_a_test_from_the_future_says_nothing() -> None:
    assert codes(assess(attrs.evolve(WEB, last_test_at=NOW + 86400), POLICY, newest(0), NOW)) == ["test-due"]
    assert codes(assess(attrs.evolve(WEB, created_at=NOW + 86400), POLICY, newest(0), NOW)) == []


@pytest.mark.parametrize(
    ("age", "level"),
    [(0, Level.OK), (120, Level.OK), (121, Level.WARNING), (180, Level.WARNING), (181, Level.CRITICAL)],
)
def test_rpo_past_two_and_three_intervals(age: float, level: Level) -> None:
    health = assess(WEB, POLICY, newest(age), NOW)
    assert health.level is level
    assert codes(health) == ([] if level is Level.OK else ["rpo-exceeded"])


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_health_never_improves_by_waiting(age: float, wait: float) -> None:
    order = list(Level)
    now, later = (assess(WEB, POLICY, newest(age), at).level for at in (NOW, NOW + wait))
    assert order.index(later) >= order.index(now)


REASONS = {
    State.ENABLING: ("initial-copy", Level.OK),
    State.INITIAL_COPY: ("initial-copy", Level.OK),
    State.FINALIZING: ("initial-copy", Level.OK),
    State.PROTECTED: ("", Level.OK),
    State.RESYNC_PENDING: ("resync-pending", Level.WARNING),
    State.RESYNCING: ("resyncing", Level.OK),
    State.FAILING_OVER: ("", Level.OK),
    State.FAILED_OVER: ("commit-pending", Level.WARNING),
    State.UNDOING: ("", Level.OK),
    State.COMMITTING: ("", Level.OK),
    State.COMMITTED: ("not-protected", Level.WARNING),
    State.REVERSING: ("reprotecting", Level.WARNING),
    State.DISABLING: ("", Level.OK),
}


@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_every_state_says_what_it_means_for_protection(state: State) -> None:
    reason, level = REASONS[state]
    health = assess(attrs.evolve(WEB, state=state), POLICY, newest(10), NOW)
    assert codes(health) == ([reason] if reason else [])
    assert health.level is level


@pytest.mark.parametrize("state", [State.INITIAL_COPY, State.FAILED_OVER, State.COMMITTED], ids=lambda s: s.value)
def test_age_of_points_says_nothing_where_no_cycles_run(state: State) -> None:
    assert "rpo-exceeded" not in codes(assess(attrs.evolve(WEB, state=state), POLICY, newest(1e6), NOW))


def test_source_that_was_shut_down_after_its_last_point_is_fine() -> None:
    off = newest(1e6, Consistency.OFFLINE)
    health = assess(WEB, POLICY, off, NOW, PowerState.OFF)
    assert (health.level, codes(health)) == (Level.OK, ["source-off"])


@pytest.mark.parametrize(
    ("consistency", "power"),
    [(Consistency.CRASH, PowerState.OFF), (Consistency.OFFLINE, PowerState.RUNNING)],
    ids=["last-writes-not-sent", "started-since"],
)
def test_source_that_may_have_written_since_its_last_point_is_not(consistency: Consistency, power: PowerState) -> None:
    assert assess(WEB, POLICY, newest(1e6, consistency), NOW, power).level is Level.CRITICAL


def test_recoverable_error_warns_and_names_the_next_try() -> None:
    error = SiteUnreachable(site="lyon", detail="no route")
    failed = attrs.evolve(WEB, error=error.as_dict(), attempt=2, retry_at=NOW + 240)
    (reason,) = assess(failed, POLICY, newest(10), NOW).reasons
    assert (reason.code, reason.severity) == ("site-unreachable", Severity.WARNING)
    assert reason.what == "site 'lyon' cannot be reached: no route (attempt 3 in 4m 00s)"
    assert (reason.cause, reason.action) == (error.cause_text, error.action_text)


def test_unrecoverable_error_is_critical() -> None:
    error = AccessDenied(site="lyon", detail="wrong key")
    health = assess(attrs.evolve(WEB, error=error.as_dict(), attempt=1), POLICY, newest(10), NOW)
    assert health.level is Level.CRITICAL
    assert "not retried automatically" in health.reasons[0].what


def test_error_that_somebody_has_to_repair_is_critical_while_it_is_retried() -> None:
    error = MachineNotFound(site="lyon", machine="web")
    failed = attrs.evolve(WEB, error=error.as_dict(), attempt=2, retry_at=NOW + 60)
    (reason,) = assess(failed, POLICY, newest(10), NOW).reasons
    assert (reason.code, reason.severity) == ("machine-not-found", Severity.ERROR)
    assert "attempt 3 in 1m 00s" in reason.what


def test_fence_that_is_due_warns() -> None:
    health = assess(attrs.evolve(WEB, fence_due=True, state=State.FAILED_OVER), POLICY, newest(10), NOW)
    assert set(codes(health)) == {"fence-due", "commit-pending"}


@pytest.mark.parametrize(
    ("created", "tested", "due"),
    [
        (NOW - TEST_DUE, None, False),
        (NOW - TEST_DUE - 1, None, True),
        (0.0, NOW - TEST_DUE, False),
        (0.0, NOW - TEST_DUE - 1, True),
    ],
    ids=["new", "never", "recently", "long-ago"],
)
def test_failover_that_nobody_tried(created: float, tested: float | None, due: bool) -> None:
    health = assess(attrs.evolve(WEB, created_at=created, last_test_at=tested), POLICY, newest(10), NOW)
    assert ("test-due" in codes(health)) is due
    assert health.level is Level.OK


@pytest.mark.parametrize("obtained", Consistency, ids=lambda item: item.value)
def test_consistency_below_what_was_asked_for(obtained: Consistency) -> None:
    asked = attrs.evolve(POLICY, consistency=Consistency.FILESYSTEM)
    health = assess(WEB, asked, newest(10, obtained), NOW)
    assert ("consistency-lower" in codes(health)) is (obtained is Consistency.CRASH)


def test_worst_reason_comes_first_and_makes_the_level() -> None:
    bad = attrs.evolve(WEB, error=AccessDenied(site="lyon", detail="").as_dict(), created_at=0.0, fence_due=True)
    health = assess(bad, POLICY, newest(150), NOW)
    assert codes(health) == ["access-denied", "rpo-exceeded", "fence-due", "test-due"]
    assert health.level is Level.CRITICAL


def test_every_reason_tells_cause_and_action() -> None:
    for state in State:
        for reason in assess(attrs.evolve(WEB, state=state, fence_due=True), POLICY, newest(1e6), NOW).reasons:
            assert isinstance(reason, Finding)
            assert reason.what
            assert reason.cause.endswith(".")
            assert reason.action.endswith(".")


@pytest.mark.parametrize(
    ("age", "load", "reported"),
    [
        (121, Load(late=17, machines=500, at_a_time=16), True),
        (121, Load(late=16, machines=500, at_a_time=16), False),
        (121, None, False),
        (119, Load(late=17, machines=500, at_a_time=16), False),
    ],
    ids=["saturated", "keeps-up", "nothing-known", "not-late-itself"],
)
def test_a_late_machine_says_that_the_service_is_saturated(age: float, load: Load | None, reported: bool) -> None:
    reasons = {reason.code: reason for reason in assess(WEB, POLICY, newest(age), NOW, load=load).reasons}
    assert ("service-saturated" in reasons) is reported
    if reported:
        assert "17 of 500 machines are late" in reasons["service-saturated"].what
        assert reasons["service-saturated"].cause
        assert reasons["service-saturated"].action


def test_without_an_engine_every_machine_that_needs_one_is_critical() -> None:
    for state in State:
        found = assess(attrs.evolve(WEB, state=state), POLICY, newest(1.0), NOW, engine=False)
        waits_for_a_person = state in (State.FAILED_OVER, State.COMMITTED)
        assert ("no-engine" in codes(found)) is not waits_for_a_person, state
        assert not any("automatically" in reason.action for reason in found.reasons), state
        owed = assess(attrs.evolve(WEB, state=state, fence_due=True), POLICY, newest(1.0), NOW, engine=False)
        assert codes(owed)[0] == "no-engine"
        assert "the service quarantines it" not in "".join(reason.action for reason in owed.reasons)
        assert "no-engine" not in codes(assess(attrs.evolve(WEB, state=state), POLICY, newest(1.0), NOW))


def test_without_an_engine_no_attempt_is_promised() -> None:
    failed = attrs.evolve(WEB, error=SiteUnreachable(site="paris", detail="x").as_dict(), retry_at=NOW + 5, attempt=1)
    retried, waits = assess(failed, POLICY, newest(1.0), NOW), assess(failed, POLICY, newest(1.0), NOW, engine=False)
    assert "attempt 2 in 5" in retried.reasons[0].what
    assert "attempt 2 waits for an engine" in waits.reasons[1].what


@pytest.mark.parametrize(
    ("state", "code", "way_out"),
    [
        (State.FAILING_OVER, "failover-stuck", "asr failover undo web"),
        (State.UNDOING, "failover-stuck", "asr failover undo web"),
        (State.COMMITTING, "failover-stuck", "asr failover commit web"),
        (State.DISABLING, "unprotect-stuck", "asr unprotect web"),
    ],
)
def test_a_state_that_no_job_works_on_is_critical_and_names_the_way_out(state: State, code: str, way_out: str) -> None:
    stuck = attrs.evolve(WEB, state=state)
    health = assess(stuck, POLICY, newest(0), NOW, working=False)
    assert health.level is Level.CRITICAL
    assert codes(health) == [code]
    assert f"`{way_out}`" in health.reasons[0].action
    assert assess(stuck, POLICY, newest(0), NOW).reasons == ()


def test_an_undo_that_a_site_owes_is_critical_and_no_fence_is_shown() -> None:
    owed = attrs.evolve(WEB, failover_point="p", target_machine="web", fence_due=True)
    health = assess(owed, POLICY, newest(0), NOW)
    assert codes(health) == ["undo-due"]
    assert health.level is Level.CRITICAL
    assert "`asr replicate web`" in health.reasons[0].action
