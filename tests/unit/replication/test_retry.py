"""The retry schedule (W6 of docs/reference/site-recovery-map.md), to the minute."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.errors import (
    AccessDenied,
    Cancelled,
    MachineNotFound,
    ReplicaDirNotMounted,
    SiteUnreachable,
    TargetFull,
    TargetReadOnly,
)
from asrcore.replication.retry import LAST_DELAY, Decision, decide
from asrcore.units import MINUTE

CUT = SiteUnreachable(site="lyon", detail="no route to host")
FULL = TargetFull(where="/srv", detail="")
DENIED = AccessDenied(site="lyon", detail="bad password")
READ_ONLY = TargetReadOnly(where="/srv", detail="")
UNMOUNTED = ReplicaDirNotMounted(path="/srv", site="lyon", mark="0123456789abcdef")
LOST = MachineNotFound(site="lyon", machine="web")


def test_recoverable_errors_wait_as_the_reference_does() -> None:
    delays, attempt = [], 0
    for _ in range(8):
        decision = decide(CUT, attempt)
        attempt = decision.attempt
        assert decision.delay is not None
        delays.append(decision.delay / MINUTE)
    assert delays == [1, 2, 4, 8, 10, 30, 30, 30]
    assert attempt == 8


@pytest.mark.parametrize("error", [DENIED, Cancelled(work="a cycle")], ids=lambda error: error.code)
def test_refused_credentials_and_cancelled_work_are_not_retried(error: BaseException) -> None:
    assert decide(error, 3) == Decision(4, None)
    assert decide(error, 3).at(1000.0) is None


@pytest.mark.parametrize("error", [READ_ONLY, UNMOUNTED, LOST], ids=lambda error: error.code)
def test_what_has_to_be_repaired_is_looked_at_every_minute(error: BaseException) -> None:
    assert [decide(error, attempt).delay for attempt in (0, 1, 7, 1000)] == [MINUTE] * 4


def test_defect_is_retried_too() -> None:
    assert decide(ZeroDivisionError(), 0) == Decision(1, MINUTE)


def test_at_counts_from_now() -> None:
    assert decide(FULL, 1).at(1000.0) == 1000.0 + 2 * MINUTE


@given(st.integers(-5, 10**9))
def test_delay_never_shrinks_and_ends_at_half_an_hour(attempt: int) -> None:
    here, after = decide(CUT, attempt).delay, decide(CUT, attempt + 1).delay
    assert here is not None
    assert after is not None
    assert 0 < here <= after <= LAST_DELAY
