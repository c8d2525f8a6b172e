"""Recording a sealed point in the vault, also one whose engine was killed between seal and record."""

from __future__ import annotations

from asrcore import driver
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import PendingCycle, Protection
from asrcore.model.state import Event, State
from asrcore.replication.context import Context
from asrcore.replication.transfer import Counts
from asrcore.vault import CycleStats

__all__ = ["adopt_sealed", "record_sealed"]

_EVENTS = {
    State.INITIAL_COPY: Event.COPIED,
    State.PROTECTED: Event.REPLICATE,
    State.RESYNCING: Event.RESYNCED,
    State.REVERSING: Event.REVERSED,
}
"""The event of a recorded point, by state. In all other states (a planned failover's last delta) the state stays."""


def record_sealed(
    context: Context,
    protection: Protection,
    pending: PendingCycle,
    stored: driver.StoredPoint,
    counts: Counts,
    started: float,
) -> RecoveryPoint:
    """Record the point and advance the mark, in one transaction (invariant 2 in docs/explanation/architecture.md).

    `started`: when the cycle began, by the engine's clock. The target's own time of the seal is not recorded.
    """
    sealed_at = context.clock()
    point = RecoveryPoint(
        id=stored.id,
        taken_at=stored.taken_at,
        sealed_at=sealed_at,
        consistency=stored.consistency,
        kept=stored.kept,
        pinned=stored.pinned,
        bytes_sent=counts.sent,
        held=stored.held,
    )
    stats = CycleStats(
        id=pending.id,
        mode=pending.mode,
        taken_at=stored.taken_at,
        started_at=started,
        sealed_at=sealed_at,
        **counts.facts(),
    )
    event = _EVENTS.get(protection.state)
    recorded = context.vault.record_point(
        protection.id, pending.id, point, event=event, stats=stats, epoch=protection.epoch
    )
    context.plugins.recovery_point_created(recorded, point)
    return point


def adopt_sealed(context: Context, protection: Protection) -> RecoveryPoint | None:
    """Record the point of a cycle that is sealed at the target but not recorded; None if there is no such.

    Asks only the target. Whoever chooses a recovery point does this first: until then the vault may name a head that
    the sealed point has replaced.
    """
    pending = protection.pending
    if pending is None:
        return None
    replica = context.site(protection.target_site).target.replica(protection.replica_id)
    info = replica.info()
    if info.epoch < protection.epoch:  # taken over from another server, which may still be about to seal
        replica.raise_epoch(protection.epoch)
        info = replica.info()
    if not info.points or info.points[-1].id != pending.point_id:
        return None
    stored = info.points[-1]
    # What was sent, and when the cycle began, is no longer known; only the point matters.
    return record_sealed(context, protection, pending, stored, Counts(), context.clock())
