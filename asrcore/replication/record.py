"""Recording a sealed point in the vault, also one whose engine was killed between seal and record."""

from __future__ import annotations

from asrcore import driver
from asrcore.model.health import CLOCK_TOLERANCE
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import PendingCycle, Protection
from asrcore.model.state import Event, State
from asrcore.replication.context import Context
from asrcore.replication.transfer import Counts
from asrcore.vault import CycleStats

__all__ = ["record_found", "record_sealed"]

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
    *,
    interval: float,
    started: float,
    ahead: float | None = None,
) -> RecoveryPoint:
    """Record the point and advance the mark, in one transaction (invariant 2 in docs/explanation/architecture.md).

    `started`: when the cycle began, by the engine's clock. `ahead`: how far that clock was ahead of the monotonic one
    when it gave `started` and the point's time; None: these are not known that well. `interval`: the policy's. The
    target's own time of the seal is not recorded.
    """
    context.aging.watch()
    sealed_at, elapsed = context.clock(), context.elapsed()
    instant, taken_at = elapsed, stored.taken_at
    if ahead is not None:
        instant = taken_at - ahead
        moved = sealed_at - elapsed - ahead
        if abs(moved) > CLOCK_TOLERANCE:  # the clock was set while the target sealed
            started, taken_at = started + moved, taken_at + moved
    counted_at = context.aging.count(protection.id, interval, instant)
    point = RecoveryPoint(
        id=stored.id,
        taken_at=taken_at,
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
        taken_at=taken_at,
        started_at=started,
        sealed_at=sealed_at,
        **counts.facts(),
    )
    event = _EVENTS.get(protection.state)
    recorded = context.vault.record_point(
        protection.id, pending.id, point, event=event, stats=stats, epoch=protection.epoch, counted_at=counted_at
    )
    context.aging.recorded(protection.id, point.id, taken_at if counted_at is None else counted_at, instant)
    context.plugins.recovery_point_created(recorded, point)
    return point


def record_found(
    context: Context, protection: Protection, replica: driver.Replica, info: driver.ReplicaInfo
) -> tuple[RecoveryPoint | None, driver.ReplicaInfo]:
    """Record the point of a cycle that is sealed at the target but not recorded; None if there is no such. Also what
    the target holds then.

    Whoever chooses a recovery point does this first: until then the vault may name a head that the sealed point has
    replaced.
    """
    pending = protection.pending
    if pending is None:
        return None, info
    if info.epoch < protection.epoch:  # taken over from another server, which may still be about to seal
        replica.raise_epoch(protection.epoch)
        info = replica.info()
    if not info.points or info.points[-1].id != pending.point_id:
        return None, info
    stored = info.points[-1]
    # What was sent, and when the cycle began, is no longer known; only the point matters.
    interval = context.vault.policy(protection.policy).interval
    recorded = record_sealed(context, protection, pending, stored, Counts(), interval=interval, started=context.clock())
    return recorded, info
