"""Health: how well a machine is protected, with a reason for every deviation. Pure: time is an argument.

State says where a machine stands; health says whether an operator should act. Nothing here is stored.
"""

from __future__ import annotations

from enum import Enum

import attrs

from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency, RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.units import DAY, format_duration

__all__ = [
    "CLOCK_TOLERANCE",
    "RPO_CRITICAL",
    "RPO_WARNING",
    "TEST_DUE",
    "Clock",
    "Health",
    "Level",
    "Load",
    "assess",
    "clock_findings",
    "rpo",
]

RPO_WARNING = 2.0
RPO_CRITICAL = 3.0
"""Times the policy's interval: one interval is normal, the rest is what a slow or repeated cycle may take."""

TEST_DUE = 90 * DAY
"""Seconds after which a test failover is due again: a quarter of a year."""

CLOCK_TOLERANCE = 2.0
"""Seconds by which clocks of hosts that share a vault may differ: a time that is further ahead lies in the future."""


class Level(Enum):
    """The worst of the reasons: an ERROR makes CRITICAL, a WARNING makes WARNING, INFO leaves it OK."""

    OK = "ok"
    WARNING = "warning"
    CRITICAL = "critical"


@attrs.frozen
class Health:
    """Reasons with the worst first; a healthy machine may have INFO ones."""

    reasons: tuple[Finding, ...] = ()

    @property
    def level(self) -> Level:
        """The worst of the reasons."""
        severities = {reason.severity for reason in self.reasons}
        if Severity.ERROR in severities:
            return Level.CRITICAL
        return Level.WARNING if Severity.WARNING in severities else Level.OK


@attrs.frozen
class Load:
    """How the replication service keeps up: of `machines` that have deltas, `late` ones are due for longer than their
    interval; it works on at most `at_a_time`."""

    late: int
    machines: int
    at_a_time: int

    @property
    def saturated(self) -> bool:
        """More are late than it can be working on: they wait for the service, not for their own cycles."""
        return self.late > self.at_a_time


_START = (
    "Start the service: `systemctl start asr-run.service` or `asr run`, or the process servers that share the vault."
)
_AUTOMATIC = "No action needed"
"""Begins the action of a finding that an engine resolves."""


@attrs.frozen
class Clock:
    """What is known of the clock of the engine's host. `held`: it is in doubt, for the reason `text`, and nothing is
    deleted by age. `stale`: the machine's newest point was recorded before the clock was set back."""

    held: bool = False
    text: str = ""
    stale: bool = False


_FENCE_REFUSED = "fence-refused"
_FENCE_PROBLEMS = (_FENCE_REFUSED, "quarantined-by-another")  # of a fence that is due; the second one also of a cycle
_WORST_FIRST = (Severity.ERROR, Severity.WARNING, Severity.INFO)
# Where cycles are expected, so that the age of the newest point says something.
_REPLICATING = (State.FINALIZING, State.PROTECTED, State.RESYNC_PENDING, State.RESYNCING)
_RANK = (Consistency.CRASH, Consistency.FILESYSTEM, Consistency.APPLICATION, Consistency.OFFLINE)


def rpo(newest: RecoveryPoint | None, now: float) -> float | None:
    """The true RPO in seconds: what would be lost if the source were lost now. None without a point.

    It is counted from the instant that the newest point shows, not from when it was sealed. The newest is the one
    recorded last: an older one may claim a later time, if the clock was wrong then. None also where the newest claims a
    time in the future: its age is unknown.
    """
    if newest is None or newest.taken_at > now + CLOCK_TOLERANCE:
        return None
    return max(0.0, now - newest.taken_at)


def assess(
    protection: Protection,
    policy: Policy,
    newest: RecoveryPoint | None,
    now: float,
    power: PowerState = PowerState.UNKNOWN,
    load: Load | None = None,
    *,
    engine: bool = True,
    working: bool = True,
    clock: Clock = Clock(),
    points: int = 0,
    damaged: int = 0,
) -> Health:
    """Judge a protected machine by its newest sealed point, at the time `now`. `power` is the source machine's, if
    known; `load` that of the replication service, if one runs; `engine` says whether one works on the vault; `working`:
    a job is recorded that works on the machine; `clock` what is known of the engine's clock. Of its
    `points`, this many are `damaged`."""
    found = [
        *_of_state(protection, policy),
        *([] if working else _of_stuck(protection)),
        *_of_undo(protection),
        *_of_clock(protection, newest, now, clock),
        *_of_point(protection, policy, None if clock.stale else newest, now, power, load),
        *_of_damage(protection, points, damaged),
        *_of_error(protection, now, engine=engine),
        *_of_restore(protection),
        *_of_fence(protection),
        *(protection.notices if protection.state in _REPLICATING else ()),
        *_of_tests(protection, now),
    ]
    if not engine:
        found = [*_of_engine(protection), *map(_waiting, found)]
    return Health(tuple(sorted(found, key=lambda finding: _WORST_FIRST.index(finding.severity))))


def _of_engine(protection: Protection) -> list[Finding]:
    if protection.state in (State.FAILED_OVER, State.COMMITTED) and not protection.fence_due:
        return []  # it waits for a person
    return [
        Finding(
            "no-engine",
            Severity.ERROR,
            f"nothing works on {protection.name!r}: no engine runs",
            "No process replicates, continues jobs or keeps quarantines for this vault.",
            _START,
        )
    ]


def clock_findings(site: str, skew: float | None) -> list[Finding]:
    """Whether the clock of a site's host, `skew` seconds ahead of the engine's, needs attention."""
    if skew is None or abs(skew) <= CLOCK_TOLERANCE:
        return []
    return [
        Finding(
            "clock-skew",
            Severity.WARNING,
            f"the clock of site {site!r} is {format_duration(abs(skew))} {'ahead of' if skew > 0 else 'behind'} the "
            "engine's",
            "One of the two hosts is not synchronised.",
            "Synchronise both hosts with NTP (`timedatectl`). Replication does not depend on it; certificates do.",
        )
    ]


def _waiting(finding: Finding) -> Finding:
    """What would continue automatically does not without an engine."""
    if not finding.action.startswith(_AUTOMATIC):
        return finding
    return attrs.evolve(finding, action=f"It waits until an engine runs. {_START}")


def _of_state(protection: Protection, policy: Policy) -> list[Finding]:
    name = protection.name
    match protection.state:
        case State.ENABLING | State.INITIAL_COPY | State.FINALIZING:
            return [
                Finding(
                    "initial-copy",
                    Severity.INFO,
                    f"{name!r} is not protected yet",
                    "The initial copy or the settings for failover are not complete.",
                    "No action needed; it continues automatically.",
                )
            ]
        case State.RESYNC_PENDING:
            return [
                Finding(
                    "resync-pending",
                    Severity.WARNING,
                    f"replication of {name!r} waits for a resynchronisation",
                    protection.resync_reason or "Changes since the last point are not known.",
                    f"No action needed; it starts in the policy's window ({policy.resync_window}). "
                    f"To start now: `asr resync {name} --now`.",
                )
            ]
        case State.RESYNCING:
            return [
                Finding(
                    "resyncing",
                    Severity.INFO,
                    f"source and replica of {name!r} are being compared",
                    protection.resync_reason or "A comparison was requested.",
                    "No action needed; replication resumes when it is done.",
                )
            ]
        case State.FAILED_OVER:
            return [
                Finding(
                    "commit-pending",
                    Severity.WARNING,
                    f"{name!r} runs at {protection.target_site!r}, not committed and not protected",
                    "The failover waits to be committed or undone.",
                    f"Run `asr failover commit {name}` or `asr failover undo {name}`.",
                )
            ]
        case State.COMMITTED:
            return [
                Finding(
                    "not-protected",
                    Severity.WARNING,
                    f"{name!r} runs at {protection.target_site!r} and is not protected",
                    "A machine is not replicated after a committed failover until it is re-protected.",
                    f"Run `asr reprotect {name}`.",
                )
            ]
        case State.REVERSING:
            return [
                Finding(
                    "reprotecting",
                    Severity.WARNING,
                    f"{name!r} is not protected until its re-protect is done",
                    "The replica in the new direction has no recovery point yet.",
                    "No action needed; it continues automatically.",
                )
            ]
        case _:  # a job is running, which shows its own progress; or none, see `_of_stuck`
            return []


def _of_clock(protection: Protection, newest: RecoveryPoint | None, now: float, clock: Clock) -> list[Finding]:
    if protection.state not in _REPLICATING or newest is None:
        return []
    found = []
    ahead = max(newest.taken_at, protection.last_cycle_at or 0.0) - now
    if clock.stale or ahead > CLOCK_TOLERANCE:
        found.append(
            Finding(
                "clock-went-back",
                Severity.ERROR,
                f"the newest point of {protection.name!r} was recorded before the clock went back; its RPO is unknown"
                if clock.stale
                else f"the newest point or cycle of {protection.name!r} is {format_duration(ahead)} in the future; "
                "its RPO is unknown",
                "The clock of the engine's host was ahead, or is behind now.",
                "Check the time of the engine's host (`timedatectl`). The next cycle records the present time. "
                f"To run it now: `asr replicate {protection.name}`.",
            )
        )
    if clock.held:
        found.append(
            Finding(
                "retention-held",
                Severity.WARNING,
                "no recovery point is deleted: the clock of the engine's host is in doubt",
                clock.text,
                "Check the time of the engine's host (`timedatectl`). Retention resumes when the clock has held for an "
                "hour while the service runs. If the time is right: `asr clock accept`.",
            )
        )
    return found


def _of_stuck(protection: Protection) -> list[Finding]:
    """A state that only a job leaves, and no job is recorded."""
    name = protection.name
    again = "planned" if protection.planned else "unplanned"
    ways_out = {
        State.FAILING_OVER: (
            "failover",
            f"To give the machine back to {protection.source_site!r}: `asr failover undo {name}`. "
            f"To try again: `asr failover {again} {name}`.",
        ),
        State.UNDOING: ("undo of the failover", f"Run `asr failover undo {name}` again."),
        State.COMMITTING: ("commit of the failover", f"Run `asr failover commit {name}` again."),
        State.DISABLING: ("end of protection", f"Run `asr unprotect {name}` again."),
    }
    if protection.state not in ways_out:
        return []
    what, action = ways_out[protection.state]
    return [
        Finding(
            "unprotect-stuck" if protection.state is State.DISABLING else "failover-stuck",
            Severity.ERROR,
            f"the {what} of {name!r} has stopped half-way"
            + ("" if protection.state is State.DISABLING else "; the machine may run at neither site"),
            "Its job failed or was cancelled (`asr job list`), and nothing works on it.",
            action,
        )
    ]


def _of_undo(protection: Protection) -> list[Finding]:
    if not protection.undo_due:
        return []
    name = protection.name
    return [
        Finding(
            "undo-due",
            Severity.ERROR,
            f"the failover of {name!r} was taken back, but a site has not done its part yet; it is not replicated",
            f"{protection.target_site!r} did not delete the machine made there, which may still run, or "
            f"{protection.source_site!r} did not release its machine, which may still be stopped.",
            f"Repair the site. The service then completes the undo within a minute; to complete it now: "
            f"`asr replicate {name}`.",
        )
    ]


def _of_point(
    protection: Protection,
    policy: Policy,
    newest: RecoveryPoint | None,
    now: float,
    power: PowerState,
    load: Load | None,
) -> list[Finding]:
    if newest is None or protection.state not in _REPLICATING:
        return []
    age = rpo(newest, now)
    found = []
    if _RANK.index(newest.consistency) < _RANK.index(policy.consistency):
        found.append(
            Finding(
                "consistency-lower",
                Severity.WARNING,
                f"the newest point of {protection.name!r} is {newest.consistency.value}-consistent, "
                f"the policy asks for {policy.consistency.value}",
                "The guest's agent does not answer, or the site cannot freeze it.",
                "Install or start the agent in the guest; the next cycle tries again.",
            )
        )
    if power is PowerState.OFF and newest.consistency is Consistency.OFFLINE:
        # Shut down when the point was taken and still: nothing can be lost, however old the point is.
        found.append(
            Finding(
                "source-off",
                Severity.INFO,
                f"{protection.name!r} is shut down; its newest point holds all its data",
                "It was stopped at the source.",
                "No action needed; replication resumes when it is started.",
            )
        )
    elif age is not None and age > RPO_WARNING * policy.interval:
        critical = age > RPO_CRITICAL * policy.interval
        found.append(
            Finding(
                "rpo-exceeded",
                Severity.ERROR if critical else Severity.WARNING,
                f"the newest point of {protection.name!r} is {format_duration(age)} old, "
                f"the interval is {format_duration(policy.interval)}",
                "Cycles fail, wait, or take longer than the interval.",
                f"See the other reasons. To run one cycle now: `asr {_cycle_command(protection)}`.",
            )
        )
        if load is not None and load.saturated:
            found.append(
                Finding(
                    "service-saturated",
                    Severity.WARNING,
                    f"the replication service cannot keep up: {load.late} of {load.machines} machines are late",
                    f"Cycles become due faster than they finish; at most {load.at_a_time} run at a time.",
                    "Lengthen the interval of policies, or move machines to a vault and service on another host.",
                )
            )
    return found


def _of_damage(protection: Protection, points: int, damaged: int) -> list[Finding]:
    if not damaged:
        return []
    name = protection.name
    whole = damaged < points
    return [
        Finding(
            "points-damaged",
            Severity.WARNING if whole else Severity.ERROR,
            f"{damaged} of {points} recovery points of {name!r} are damaged"
            + ("" if whole else "; none is left to fail over to"),
            "Files of the replica were changed or lost, or its disk returns other data than was written.",
            f"Check the disks at {protection.target_site!r}. `asr point list {name}` shows which points; "
            f"`asr verify {name} --repair` repairs the latest state, and the points after it are whole.",
        )
    ]


def _cycle_command(protection: Protection) -> str:
    if protection.state is State.RESYNC_PENDING:
        return f"resync {protection.name} --now"
    return f"replicate {protection.name}"


def _of_error(protection: Protection, now: float, *, engine: bool) -> list[Finding]:
    error = protection.error
    if error is None or error.get("code") == _FENCE_REFUSED or _is_of_fence(protection):
        return []
    if protection.retry_at is None:
        severity, again = Severity.ERROR, "not retried automatically"
    elif not engine:
        severity = Severity.WARNING if error.get("retry") else Severity.ERROR
        again = f"attempt {protection.attempt + 1} waits for an engine"
    else:
        # What time alone does not repair is critical, although it is tried again in case it is repaired.
        severity = Severity.WARNING if error.get("retry") else Severity.ERROR
        again = f"attempt {protection.attempt + 1} in {format_duration(max(0.0, protection.retry_at - now))}"
    return [
        Finding(
            str(error.get("code", "unknown-error")),
            severity,
            f"{error.get('happened', 'replication failed')} ({again})",
            str(error.get("cause", "")),
            str(error.get("action", "")),
        )
    ]


def _of_restore(protection: Protection) -> list[Finding]:
    if not protection.restored or (protection.error or {}).get("code") == "vault-behind":  # which says more
        return []
    return [
        Finding(
            "vault-put-back",
            Severity.WARNING,
            f"the record of {protection.name!r} is from an earlier copy of the vault",
            f"The vault was restored, and {protection.target_site!r} has not been compared with it yet.",
            "No action needed; it is asked before anything is changed.",
        )
    ]


def _is_of_fence(protection: Protection) -> bool:
    due = protection.fence_due and not protection.undo_due
    return due and (protection.error or {}).get("code") in _FENCE_PROBLEMS


def _of_fence(protection: Protection) -> list[Finding]:
    if not protection.fence_due or protection.undo_due:
        return []
    if _is_of_fence(protection) and (error := protection.error) is not None:
        code, happened, cause, action = (str(error.get(key, "")) for key in ("code", "happened", "cause", "action"))
        return [Finding(code, Severity.ERROR, happened, cause, action)]
    return [
        Finding(
            "fence-due",
            Severity.WARNING,
            f"the old {protection.name!r} at {protection.source_site!r} is not quarantined yet",
            "The site could not be reached at the failover; the old machine may still run there.",
            "No action needed; the service quarantines it as soon as the site answers. Do not start it there.",
        )
    ]


def _of_tests(protection: Protection, now: float) -> list[Finding]:
    if protection.state is not State.PROTECTED:
        return []
    last = protection.last_test_at
    since = protection.created_at if last is None else last
    if 0 <= now - since <= TEST_DUE or (last is None and since > now):
        return []
    name = protection.name
    return [
        Finding(
            "test-due",
            Severity.INFO,
            f"no test failover of {name!r} has been run yet"
            if last is None
            else f"the last test failover of {name!r} is recorded in the future: it is not known when it was"
            if last > now
            else f"the last test failover of {name!r} was {format_duration(now - last)} ago",
            "Only a test shows that the machine boots and works at the target.",
            f"Run `asr failover test {protection.name}`; it does not disturb the machine or its replication.",
        )
    ]
