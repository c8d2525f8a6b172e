"""What the replication service has to do for a machine, and when: pure functions of its record, policy and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum

from asrcore.model.health import Load
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.replication import windows
from asrcore.units import HOUR
from asrcore.vault import JobState

__all__ = ["QUICK", "SLOW", "Action", "cycle_at", "due_action", "load", "next_cycle_at", "verification_due"]

QUICK = 8
"""Cycles at a time. An idle one takes 0.25 s, of which it uses a processor for 0.05 s: two are busy with eight."""
SLOW = 8
"""Cycles beside them that have taken longer than 10 s: a few with large changes, or whose source hangs."""


class Action(Enum):
    """One piece of work."""

    NOTHING = "nothing"
    CYCLE = "cycle"
    """A delta."""
    PROTECT = "protect"
    """Resume an initial copy or finalisation that no job works on."""
    RESYNC = "resync"
    """Start or resume a comparison."""
    REPROTECT = "reprotect"
    """Resume a reversal."""


_GO_ON = {
    State.ENABLING: Action.PROTECT,
    State.INITIAL_COPY: Action.PROTECT,
    State.FINALIZING: Action.PROTECT,
    State.RESYNCING: Action.RESYNC,
    State.REVERSING: Action.REPROTECT,
}


TAKE_UP_AFTER = 10.0
"""Seconds until work starts on a recorded machine without a job: its own job follows the record at once, unless
the process that asked for it was killed in between."""


def next_cycle_at(protection: Protection, policy: Policy) -> float:
    """When the next delta is due: an interval after the last one began, so that points are evenly spaced."""
    if protection.retry_at is not None:
        return protection.retry_at
    if protection.last_cycle_at is None:
        return protection.created_at
    return protection.last_cycle_at + policy.interval


def due_action(protection: Protection, policy: Policy, now: float) -> Action:
    """The work that is due, without regard to what runs already.

    After an unrecoverable error (an attempt was recorded and no time for the next) nothing is retried automatically.
    """
    if protection.attempt and protection.retry_at is None:
        return Action.NOTHING
    waiting = protection.retry_at is not None and now < protection.retry_at
    if waiting:
        return Action.NOTHING
    if protection.state is State.ENABLING and not protection.attempt and now < protection.created_at + TAKE_UP_AFTER:
        return Action.NOTHING
    if protection.state in _GO_ON:
        return _GO_ON[protection.state]
    if protection.state is State.RESYNC_PENDING and windows.is_open(policy.resync_window, now):
        return Action.RESYNC
    if protection.state is State.PROTECTED and now >= next_cycle_at(protection, policy):
        return Action.CYCLE
    return Action.NOTHING


def cycle_at(protection: Protection, policy: Policy) -> float | None:
    """When the machine's next delta is due, or None if deltas have to wait for something else."""
    if protection.state is not State.PROTECTED or (protection.attempt and protection.retry_at is None):
        return None
    return next_cycle_at(protection, policy)


VERIFY_AGAIN = HOUR
"""Seconds until a verification that did not finish is retried; it resumes with what it had already compared."""


def verification_due(protection: Protection, policy: Policy, ended: Mapping[JobState, float], now: float) -> bool:
    """Whether an automatic verification is due. `ended`: when the last verifications ended, by their result."""
    if not policy.verify_every or cycle_at(protection, policy) is None or protection.attempt:
        return False
    if now < max(ended.values(), default=0.0) + VERIFY_AGAIN or not windows.is_open(policy.resync_window, now):
        return False
    return now >= max(protection.created_at, ended.get(JobState.DONE, 0.0)) + policy.verify_every


def load(protections: Iterable[Protection], policies: Mapping[str, Policy], now: float, *, engines: int = 1) -> Load:
    """How the service keeps up, where this many engines or process servers share the machines.

    A machine whose cycles fail is not late: it waits for its retry.
    """
    late = machines = 0
    for protection in protections:
        policy = policies[protection.policy]
        at = cycle_at(protection, policy)
        if at is not None:
            machines += 1
            late += not protection.attempt and now - at > policy.interval
    return Load(late, machines, engines * (QUICK + SLOW))
