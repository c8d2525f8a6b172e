"""States of a protected machine and every transition between them, in one table.

State says where a machine stands between durable steps. Progress (how far a copy is) and health (how well it is
protected) are separate, in `watch` and `health`. docs/reference/states.md is generated from this table; its notes
W1 to W5 and F1 to F8 are items of docs/reference/site-recovery-map.md.
"""

from __future__ import annotations

from enum import Enum

import attrs

from asrcore.errors import WrongState

__all__ = ["STATES_WITH_POINTS", "TRANSITIONS", "Event", "State", "Transition", "allowed", "possible_events"]


class State(Enum):
    """What is true when the state is recorded."""

    ENABLING = "enabling"
    """The relationship is recorded; checks run, the replica's disks may be missing."""
    INITIAL_COPY = "initial-copy"
    """The replica's disks exist; there is no recovery point yet."""
    FINALIZING = "finalizing"
    """The first recovery point is sealed; network and other settings for failover are being checked."""
    PROTECTED = "protected"
    """At least one recovery point is sealed; deltas follow at the policy's interval."""
    RESYNC_PENDING = "resync-pending"
    """Deltas are suspended; recovery points are intact; a comparison waits for its window."""
    RESYNCING = "resyncing"
    """Source and replica are being compared and made equal; recovery points are intact."""
    FAILING_OVER = "failing-over"
    """A failover has begun; the machine may already run at the target, or not yet."""
    FAILED_OVER = "failed-over"
    """The machine runs at the target (commit pending); recovery points are intact; undo is possible."""
    UNDOING = "undoing"
    """The failover is being undone: the machine at the target and its writes are being deleted."""
    COMMITTING = "committing"
    """The failover is final; the replica and its recovery points are being deleted."""
    COMMITTED = "committed"
    """The machine runs at the target from its own disks and is not protected: there are no recovery points."""
    REVERSING = "reversing"
    """Re-protect: the direction is reversed; the new replica is being made equal and has no recovery point yet."""
    DISABLING = "disabling"
    """Protection is ending; the replica and its recovery points are being deleted."""


STATES_WITH_POINTS = (State.PROTECTED, State.RESYNC_PENDING, State.RESYNCING)
"""The machine runs at its source and may be failed over."""


class Event(Enum):
    """What may happen to a protected machine; the value completes 'cannot ...'."""

    REPLICA_CREATED = "start its initial copy"
    COPIED = "finish its initial copy"
    FINALIZED = "be finalized"
    REPLICATE = "replicate"
    LOSE_TRACKING = "be marked for resync"
    START_RESYNC = "be resynchronised"
    RESYNCED = "finish a resync"
    VERIFY = "be verified"
    TEST = "be test-failed-over"
    FAIL_OVER = "be failed over"
    ABORT_FAILOVER = "have its failover aborted"
    FAILED_OVER = "finish its failover"
    UNDO = "have its failover undone"
    UNDONE = "finish the undo"
    COMMIT = "be committed"
    COMMITTED = "finish the commit"
    REPROTECT = "be re-protected"
    REVERSED = "finish the re-protect"
    DISABLE = "be unprotected"


@attrs.frozen
class Transition:
    """`source` --event--> `target`, and why it exists."""

    source: State
    event: Event
    target: State
    reason: str


def _table() -> tuple[Transition, ...]:
    s, e = State, Event
    rows = [
        Transition(s.ENABLING, e.REPLICA_CREATED, s.INITIAL_COPY, "W1: prerequisites hold, the relationship exists"),
        Transition(s.INITIAL_COPY, e.COPIED, s.FINALIZING, "W2: all disks have arrived and the point is sealed"),
        Transition(s.FINALIZING, e.FINALIZED, s.PROTECTED, "W3: settings for failover are in place"),
        Transition(s.PROTECTED, e.REPLICATE, s.PROTECTED, "W4: a delta was sealed"),
        Transition(s.PROTECTED, e.LOSE_TRACKING, s.RESYNC_PENDING, "W5: tracking lost, or the change log too large"),
        Transition(s.RESYNCING, e.LOSE_TRACKING, s.RESYNCING, "W5: lost again while comparing: keep comparing"),
        Transition(s.PROTECTED, e.START_RESYNC, s.RESYNCING, "W5: started by hand"),
        Transition(s.RESYNC_PENDING, e.START_RESYNC, s.RESYNCING, "W5: the window opened, or started by hand"),
        Transition(s.RESYNCING, e.START_RESYNC, s.RESYNCING, "W5: an interrupted comparison resumes"),
        Transition(s.RESYNCING, e.RESYNCED, s.PROTECTED, "W5: equal again; deltas resume"),
        Transition(s.PROTECTED, e.VERIFY, s.PROTECTED, "replica and source may be compared at any time"),
        *(Transition(state, e.TEST, state, "F1: a test disturbs nothing") for state in STATES_WITH_POINTS),
        *(
            Transition(state, e.FAIL_OVER, s.FAILING_OVER, "F2, F3: a sealed point exists to fail over to")
            for state in STATES_WITH_POINTS
        ),
        Transition(s.FAILING_OVER, e.FAIL_OVER, s.FAILING_OVER, "an interrupted failover is repeated"),
        Transition(s.FAILING_OVER, e.ABORT_FAILOVER, s.PROTECTED, "F2, F3: the target cannot give; the source stays"),
        Transition(s.FAILING_OVER, e.FAILED_OVER, s.FAILED_OVER, "F5: the machine runs at the target"),
        Transition(s.FAILED_OVER, e.UNDO, s.UNDOING, "F5: another point, or back to the source, before commit"),
        Transition(s.FAILING_OVER, e.UNDO, s.UNDOING, "a failover that got stuck is undone"),
        Transition(s.UNDOING, e.UNDO, s.UNDOING, "an interrupted undo is repeated"),
        Transition(s.UNDOING, e.UNDONE, s.PROTECTED, "the replica and its recovery points are as before the failover"),
        Transition(s.FAILED_OVER, e.COMMIT, s.COMMITTING, "F5: the workload is accepted at the target"),
        Transition(s.COMMITTING, e.COMMIT, s.COMMITTING, "an interrupted commit is repeated"),
        Transition(
            s.COMMITTING,
            e.COMMITTED,
            s.COMMITTED,
            "the replica and all its recovery points are deleted; the machine keeps its own disks",
        ),
        Transition(s.COMMITTED, e.REPROTECT, s.REVERSING, "F8: reverse replication"),
        Transition(s.REVERSING, e.REPROTECT, s.REVERSING, "an interrupted re-protect resumes"),
        Transition(s.REVERSING, e.REVERSED, s.PROTECTED, "F8: a first point is sealed in the new direction"),
        *(
            Transition(state, e.DISABLE, s.DISABLING, "protection can be ended wherever no failover is under way")
            for state in (
                s.ENABLING,
                s.INITIAL_COPY,
                s.FINALIZING,
                *STATES_WITH_POINTS,
                s.COMMITTED,
                s.REVERSING,
                s.DISABLING,
            )
        ),
    ]
    return tuple(rows)


TRANSITIONS = _table()
_BY_KEY = {(row.source, row.event): row for row in TRANSITIONS}


def possible_events(state: State) -> list[Event]:
    """What may happen next, in the order of the table."""
    return [row.event for row in TRANSITIONS if row.source is state]


def allowed(machine: str, state: State, event: Event) -> Transition:
    """The transition for that event; raises WrongState, naming what is possible instead."""
    row = _BY_KEY.get((state, event))
    if row is None:
        possible = ", ".join(other.name.lower().replace("_", " ") for other in possible_events(state))
        sources = ", ".join(other.source.value for other in TRANSITIONS if other.event is event)
        raise WrongState(
            machine=machine,
            event=event.value,
            state=state.value,
            reason=f"That is possible only from: {sources}.",
            possible=possible or "no command; wait for the running job",
        )
    return row
