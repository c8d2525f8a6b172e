"""What the replication service has to do for a machine, and when: pure functions of its record, policy and time.

A recorded time that lies in the future counts as due now: the clock is or was wrong, and nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum

from asrcore.model.health import Load
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.replication import retry, windows
from asrcore.units import HOUR
from asrcore.vault import JobState

__all__ = [
    "QUICK",
    "SLOW",
    "Action",
    "cycle_at",
    "due_action",
    "load",
    "next_cycle_at",
    "scrub_due",
    "verification_due",
]

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
    UNDO = "undo"
    """Retry an undo that failed half-way."""
    COMMIT = "commit"
    """Retry a commit that failed half-way."""
    UNPROTECT = "unprotect"
    """Retry an end of protection that failed half-way."""


_GO_ON = {
    State.ENABLING: Action.PROTECT,
    State.INITIAL_COPY: Action.PROTECT,
    State.FINALIZING: Action.PROTECT,
    State.RESYNCING: Action.RESYNC,
    State.REVERSING: Action.REPROTECT,
}
_HALF_WAY = {
    State.UNDOING: Action.UNDO,
    State.COMMITTING: Action.COMMIT,
    State.DISABLING: Action.UNPROTECT,
}
"""What a person has decided: only a job that failed for a reason that passes is retried."""


TAKE_UP_AFTER = 10.0
"""Seconds until work starts on a recorded machine without a job: its own job follows the record at once, unless
the process that asked for it was killed in between."""


def next_cycle_at(protection: Protection, policy: Policy, now: float) -> float:
    """When the next delta is due: an interval after the last one began, so that points are evenly spaced.

    At most `now` where what is recorded cannot be true: a cycle that began in the future, or a retry that is further
    off than its own wait. Then the clock is or was wrong, and replication must not wait until it gets there.
    """
    if protection.retry_at is not None:
        at, longest = protection.retry_at, retry.delay(protection.attempt)
    elif protection.last_cycle_at is not None:
        at, longest = protection.last_cycle_at + policy.interval, policy.interval
    else:
        at, longest = protection.created_at, 0.0
    return at if at <= now + longest else now


def due_action(protection: Protection, policy: Policy, now: float) -> Action:
    """The work that is due, without regard to what runs already.

    After an unrecoverable error (an attempt was recorded and no time for the next) nothing is retried automatically.
    """
    if protection.undo_due or (protection.attempt and protection.retry_at is None):
        return Action.NOTHING
    if protection.retry_at is not None and now < next_cycle_at(protection, policy, now):
        return Action.NOTHING
    new = protection.state is State.ENABLING and not protection.attempt
    if new and 0 <= now - protection.created_at < TAKE_UP_AFTER:
        return Action.NOTHING
    if protection.state in _GO_ON:
        return _GO_ON[protection.state]
    if protection.state in _HALF_WAY and protection.attempt:
        return _HALF_WAY[protection.state]
    if protection.state is State.RESYNC_PENDING and windows.is_open(policy.resync_window, now):
        return Action.RESYNC
    if protection.state is State.PROTECTED and now >= next_cycle_at(protection, policy, now):
        return Action.CYCLE
    return Action.NOTHING


def cycle_at(protection: Protection, policy: Policy, now: float) -> float | None:
    """When the machine's next delta is due, or None if deltas have to wait for something else."""
    if protection.state is not State.PROTECTED or protection.undo_due:
        return None
    if protection.attempt and protection.retry_at is None:
        return None
    return next_cycle_at(protection, policy, now)


VERIFY_AGAIN = HOUR
"""Seconds until a verification that did not finish is retried; it resumes with what it had already compared."""


def verification_due(protection: Protection, policy: Policy, ended: Mapping[JobState, float], now: float) -> bool:
    """Whether an automatic verification is due. `ended`: when the last verifications ended, by their result; one that
    ended in the future does not count."""
    if not policy.verify_every or cycle_at(protection, policy, now) is None or protection.attempt:
        return False
    past = {state: at for state, at in ended.items() if at <= now}
    if now < max(past.values(), default=0.0) + VERIFY_AGAIN or not windows.is_open(policy.resync_window, now):
        return False
    since = max([at for at in (protection.created_at, past.get(JobState.DONE, 0.0)) if at <= now], default=0.0)
    return now >= since + policy.verify_every


def scrub_due(protection: Protection, policy: Policy, now: float) -> bool:
    """Whether the machine's kept points are to be read, or the scrub of them resumed."""
    if not policy.scrub_every or cycle_at(protection, policy, now) is None or protection.head_point is None:
        return False
    if not windows.is_open(policy.resync_window, now):
        return False
    last = protection.last_scrub_at  # without one it is due at once: it records digests that a fast first copy has not
    return last is None or not 0 <= now - last < policy.scrub_every


def load(protections: Iterable[Protection], policies: Mapping[str, Policy], now: float, *, engines: int = 1) -> Load:
    """How the service keeps up, where this many engines or process servers share the machines.

    A machine whose cycles fail is not late: it waits for its retry.
    """
    late = machines = 0
    for protection in protections:
        policy = policies[protection.policy]
        at = cycle_at(protection, policy, now)
        if at is not None:
            machines += 1
            late += not protection.attempt and now - at > policy.interval
    return Load(late, machines, engines * (QUICK + SLOW))
