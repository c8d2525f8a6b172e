"""Whether the vault and the target agree about a machine: asked before anything is changed at either side.

A vault can be put back to an earlier copy: a backup is restored, a database loses its last transactions, or a host
returns to a snapshot. The target then holds points that the vault does not know, or the machine has been failed over
since. What the target knows better is adopted, never overwritten:

- Points that only the target knows become points of the vault, as long as it is proven that the machine still runs at
  the source: no failover, undo or re-protect since (the generation of the epoch is the vault's), and no promotion.
- Everything else waits for a person (`VaultBehind`, `asr machine adopt`).

The engine of a newer copy of the vault may be at work. So replication adopts only what has not changed for some time,
and takes a new generation with it: the other engine, if it comes back, is the one that is behind then. A person's
failover takes the machine in any case and does not wait.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

import attrs

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import (
    AsrError,
    MachineNotFound,
    NotAssigned,
    ReplicaDamaged,
    ReplicaNotFound,
    SiteUnreachable,
    UnsupportedOperation,
    VaultBehind,
    VaultUnavailable,
)
from asrcore.model.epoch import generation, next_generation, shown
from asrcore.model.machine import PowerState
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.replication import retry
from asrcore.replication.context import Context
from asrcore.replication.record import record_found
from asrcore.units import MINUTE, format_time
from asrcore.vault import Changes

__all__ = [
    "Adoption",
    "Asked",
    "adopt",
    "adoption",
    "ask_target",
    "check_commit",
    "check_fence",
    "check_undo",
    "check_unprotect",
    "unknown_points",
]

_FAILED_OVER = (State.FAILING_OVER, State.FAILED_OVER, State.UNDOING, State.COMMITTING)
"""States in which the vault knows that a machine was or is being made at the target."""
_NO_CHANGES = Changes()
_NOTHING_MADE = Changes(target_machine=None, failover_point=None, planned=False, fence_due=False)


@attrs.frozen
class Asked:
    """What the target answered. `recorded`: a point that was sealed there and is recorded only now; `before`: the
    record without it."""

    protection: Protection
    replica: driver.Replica
    info: driver.ReplicaInfo
    before: Protection
    recorded: RecoveryPoint | None = None


@attrs.frozen
class Adoption:
    """What a person may let the vault record of what the target holds. `unknown`: points that only the target knows.
    `needed` False: they agree. `state`: None if that follows from the points."""

    protection: Protection
    info: driver.ReplicaInfo
    unknown: Collection[str]
    needed: bool
    state: State | None = None
    changes: Changes = _NO_CHANGES


def ask_target(context: Context, protection_id: str, *, at_once: bool = False) -> Asked:
    """Compare the vault's record of a machine with its replica; record what the target knows better.

    `at_once`: although another engine may be at work on the machine. Raises VaultBehind if a person has to decide, and
    what the target raises.
    """
    protection = context.vault.protection(protection_id)
    try:
        replica = context.site(protection.target_site).target.replica(protection.replica_id)
        info = replica.info()
    except ReplicaNotFound as problem:
        if not protection.restored:
            raise
        raise _refused(context, protection, "it has no replica of the machine", _no_replica(protection)) from problem
    if _differs(protection, info):
        # A cycle or a take-over may have come in between: first what the target holds is read, then the vault.
        protection = context.vault.protection(protection_id)
        unknown = unknown_points(context, protection, info)
        if unknown or info.epoch > protection.epoch or _is_unknown(protection, info.promoted):
            info = replica.info()
            unknown &= {point.id for point in info.points}
            _check_owner(context, protection, info)
            if unknown or info.epoch > protection.epoch:
                if not at_once and not _stands_still(context, protection, info):
                    raise _refused(context, protection, _points_text(info, unknown), _wait_or_adopt(protection))
                protection = _adopt_points(context, protection, info)
    before = protection
    recorded, info = record_found(context, protection, replica, info)
    if recorded is not None:
        protection = context.vault.protection(protection_id)
    return Asked(_agreed(context, protection), replica, info, before, recorded)


def unknown_points(context: Context, protection: Protection, info: driver.ReplicaInfo) -> set[str]:
    """Points that only the target knows. The latest state of the past, which a test kept there, is none of them; nor is
    what the cycle under way has just sealed (`record_found`). A point of that cycle with later ones is one."""
    pending = protection.pending.point_id if protection.pending else None
    held = {point.id for point in info.points if point.kept or point.pinned or point.id == info.head}
    known = context.vault.known_points(protection.id)
    return held - known - ({pending} if pending == info.head else set())


def adoption(context: Context, protection_id: str) -> Adoption:
    """What `adopt` would record; nothing is changed.

    Raises VaultBehind where the target has no replica, and what the target raises.
    """
    protection = context.vault.protection(protection_id)
    target = context.site(protection.target_site)
    try:
        info = target.target.replica(protection.replica_id).info()
    except ReplicaNotFound as problem:
        raise _behind(protection, "it has no replica of the machine", _no_replica(protection)) from problem
    protection = _now(context, protection)
    unknown, made, newer = unknown_points(context, protection, info), info.promoted, info.epoch > protection.epoch
    if made is not None and (newer or _is_unknown(protection, made)):
        runs = target.inventory.machine(made.machine_id).power is not PowerState.OFF
        state = State.FAILED_OVER if runs else State.FAILING_OVER
        changes = Changes(target_machine=made.machine_id, failover_point=made.point_id, planned=False, fence_due=True)
        return Adoption(protection, info, unknown, True, state, changes)
    needed = made is None and (newer or bool(unknown))
    if needed and protection.state in _FAILED_OVER:
        return Adoption(protection, info, unknown, True, State.RESYNC_PENDING, _NOTHING_MADE)
    return Adoption(protection, info, unknown, needed)


def adopt(context: Context, protection_id: str) -> dict[str, object]:
    """Record what the target holds, on a person's decision: also a failover that the vault does not know, or one that
    was undone. Returns facts for the job. Raises what `adoption` raises."""
    try:
        found = adoption(context, protection_id)
    except VaultBehind as error:
        _record(context, context.vault.protection(protection_id), error)
        raise
    protection = found.protection
    if found.needed:
        protection = _adopt_points(context, protection, found.info, found.state, found.changes)
    protection = _agreed(context, protection)
    return {
        "adopted_points": sorted(found.unknown),
        "points": len(found.info.points),
        "state_before": found.protection.state.value,
        "state": protection.state.value,
        "epoch": protection.epoch,
    }


def check_undo(context: Context, protection: Protection, *, by_person: bool = False) -> None:
    """Before a source is given back: no failover has been made, committed or undone that the vault does not know.

    A target that does not answer does not block it, unless the vault was put back or found behind; nor does one that
    has lost the replica, where a person has decided (`by_person`). Raises VaultBehind.
    """
    try:
        info = context.site(protection.target_site).target.replica(protection.replica_id).info()
    except (VaultUnavailable, NotAssigned):
        raise
    except ReplicaNotFound as problem:
        made_there = protection.target_machine or protection.source_machine
        if (protection.restored or not by_person) and _runs(context, protection.target_site, made_there):
            detail = "it has no replica any more, and the machine runs there: the failover was committed"
            way_out = (
                f"To accept the machine there: `asr failover commit {protection.name}`. To go back to the source "
                "nevertheless, shut the machine down at the target first."
            )
            raise _refused(context, protection, detail, way_out) from problem
    except AsrError:
        if protection.restored:
            raise
    else:
        protection = _now(context, protection)
        _check_owner(context, protection, info)
        made = info.promoted if protection.target_machine is None else None
        if made is not None and _runs(context, protection.target_site, made.machine_id):
            raise _refused(context, protection, _promoted_text(made), _adopt(protection))
        _agreed(context, protection)


def check_commit(context: Context, protection: Protection) -> None:
    """Before a commit. A replica that is gone was deleted by one. Raises VaultBehind, and what the target raises."""
    with suppress(ReplicaNotFound):
        info = context.site(protection.target_site).target.replica(protection.replica_id).info()
        protection = _now(context, protection)
        _check_owner(context, protection, info)
        _agreed(context, protection)


def check_unprotect(context: Context, protection: Protection) -> None:
    """Before a replica is deleted: no machine that the vault does not know stands on it. A target that does not answer,
    or has no whole replica, blocks nothing here. Raises VaultBehind."""
    with suppress(SiteUnreachable, ReplicaNotFound, ReplicaDamaged, UnsupportedOperation):
        check_commit(context, protection)


def check_fence(context: Context, protection: Protection) -> None:
    """Before a machine is stopped or quarantined: the one that owns the identity is still the vault's.

    A target that does not answer does not block it, unless the vault was put back or found behind. Raises VaultBehind.
    """
    site = context.site(protection.target_site)
    try:
        if protection.state is State.COMMITTED:
            _check_committed(context, protection, site)
        else:
            info = site.target.replica(protection.replica_id).info()
            _check_owner(context, _now(context, protection), info)
    except (VaultUnavailable, NotAssigned, VaultBehind):
        raise
    except ReplicaNotFound as problem:
        if protection.state is not State.COMMITTING:  # which deletes it
            detail = "it has no replica of the machine"
            raise _refused(context, protection, detail, _no_replica(protection)) from problem
    except AsrError:
        if protection.restored:
            raise
        return
    _agreed(context, _now(context, protection))


def _check_committed(context: Context, protection: Protection, site: driver.Site) -> None:
    """The replica of a committed failover is deleted. But a failback quarantines the machine at the target."""
    if protection.target_machine is None:
        return
    try:
        fence = site.inventory.fenced(protection.target_machine)
    except MachineNotFound as problem:
        if not protection.restored:
            return
        detail = "its machine of the committed failover is not there any more"
        raise _refused(context, protection, detail, _no_replica(protection)) from problem
    except UnsupportedOperation as problem:
        if not protection.restored:
            raise
        detail = "it cannot quarantine machines, so it is not known whether the machine was failed back since"
        raise _refused(context, protection, detail, _end_protection(protection)) from problem
    if fence is not None and fence.epoch > protection.epoch:
        detail = f"its machine is quarantined there at epoch {shown(fence.epoch)}: it was failed back since"
        raise _refused(context, protection, detail, _no_replica(protection))


def _differs(protection: Protection, info: driver.ReplicaInfo) -> bool:
    pending = protection.pending.point_id if protection.pending else None
    return (
        info.epoch > protection.epoch
        or info.head not in (protection.head_point, pending)
        or _is_unknown(protection, info.promoted)
    )


def _is_unknown(protection: Protection, promoted: driver.Promoted | None) -> bool:
    return promoted is not None and protection.state not in _FAILED_OVER and not protection.undo_due


def _check_owner(context: Context, protection: Protection, info: driver.ReplicaInfo) -> None:
    """The machine has not changed its place since the vault's record. Raises VaultBehind."""
    if _is_unknown(protection, info.promoted) and info.promoted is not None:
        raise _refused(context, protection, _promoted_text(info.promoted), _adopt(protection))
    if generation(info.epoch) > generation(protection.epoch):
        detail = f"the replica is owned at epoch {shown(info.epoch)}, the vault is at {shown(protection.epoch)}"
        raise _refused(context, protection, detail, _adopt(protection))


def _stands_still(context: Context, protection: Protection, info: driver.ReplicaInfo) -> bool:
    """Whether nothing has changed at the target for two intervals: no other engine replicates to it."""
    wait = max(2 * context.vault.policy(protection.policy).interval, MINUTE)
    found = (info.epoch, info.head, info.pending)
    before, since = context.found_at_target.get(protection.id, (None, 0.0))
    if before != found:
        context.found_at_target[protection.id] = found, context.elapsed()
        return False
    return context.elapsed() - since >= wait


def _adopt_points(
    context: Context,
    protection: Protection,
    info: driver.ReplicaInfo,
    state: State | None = None,
    changes: Changes = _NO_CHANGES,
) -> Protection:
    vault = context.vault
    unknown, known = unknown_points(context, protection, info), vault.known_points(protection.id)
    points = [_point(item) for item in info.points if item.id in unknown or item.id in known]
    count = context.aging.count(protection.id, vault.policy(protection.policy).interval)
    text = _points_text(info, unknown)
    reason = protection.resync_reason
    if info.head != protection.head_point:
        reason = f"The vault was behind the target: {text}."
    epoch = next_generation(max(protection.epoch, info.epoch))
    adopted = vault.adopt(
        protection,
        points,
        {"resync_reason": reason, "epoch": epoch, **changes},
        state=state,
        counted_by=context.clock() if count is None else count,
    )
    reach("adopt.recorded")
    context.found_at_target.pop(protection.id, None)
    context.vault.add_event(
        at=context.clock(),
        machine=protection.name,
        kind="adopt",
        text=f"{text}; recorded as {adopted.state.value}, epoch {shown(adopted.epoch)}",
        data={"points": sorted(unknown), "epoch": adopted.epoch},
    )
    return adopted


def _point(stored: driver.StoredPoint) -> RecoveryPoint:
    """As recorded from what the target keeps with it. When it was sealed is not known by the engine's clock."""
    return RecoveryPoint(
        id=stored.id,
        taken_at=stored.taken_at,
        sealed_at=stored.taken_at,
        consistency=stored.consistency,
        kept=stored.kept,
        pinned=stored.pinned,
        held=stored.held,
    )


def _agreed(context: Context, protection: Protection) -> Protection:
    """Vault and target agree: an earlier refusal no longer holds."""
    context.found_at_target.pop(protection.id, None)
    if (protection.error or {}).get("code") == VaultBehind.code:
        return context.vault.update(protection.id, error=None, attempt=0, retry_at=None, restored=False)
    return context.vault.update(protection.id, restored=False) if protection.restored else protection


def _behind(protection: Protection, detail: str, way_out: str) -> VaultBehind:
    return VaultBehind(machine=protection.name, site=protection.target_site, detail=detail, way_out=way_out)


def _refused(context: Context, protection: Protection, detail: str, way_out: str) -> VaultBehind:
    """The error, recorded with the machine."""
    error = _behind(protection, detail, way_out)
    _record(context, protection, error)
    return error


def _record(context: Context, protection: Protection, error: VaultBehind) -> None:
    """So that the machine's health says it whatever asked; once in the log. A cycle counts its failure itself.

    From then on the record is not trusted while the target does not answer, also when another error takes the place of
    this one.
    """
    known = protection.error or {}
    if known.get("code") != error.code:
        context.vault.add_event(at=context.clock(), machine=protection.name, kind="vault", text=str(error))
    if known.get("happened") != str(error):
        retry_at = retry.decide(error, protection.attempt).at(context.clock())
        context.vault.update(protection.id, error=error.as_dict(), retry_at=retry_at, restored=True)
    elif not protection.restored:
        context.vault.update(protection.id, restored=True)


def _now(context: Context, protection: Protection) -> Protection:
    """Read after the target: a take-over or a failover may have come in between."""
    return context.vault.protection(protection.id)


def _runs(context: Context, site: str, machine: str) -> bool:
    try:
        return context.site(site).inventory.machine(machine).power is not PowerState.OFF
    except MachineNotFound:
        return False


def _points_text(info: driver.ReplicaInfo, unknown: Collection[str]) -> str:
    if not unknown:
        return f"the replica is owned at epoch {shown(info.epoch)}"
    newest = [point for point in info.points if point.id in unknown][-1]
    count = "a recovery point" if len(unknown) == 1 else f"{len(unknown)} recovery points"
    return f"the target holds {count} that the vault did not know, the newest {newest.id} of " + format_time(
        newest.taken_at
    )


def _promoted_text(promoted: driver.Promoted) -> str:
    return f"the machine was failed over to it, from point {promoted.point_id}"


def _adopt(protection: Protection) -> str:
    return (
        "Stop every other engine that has a copy of this vault. To see what the target holds: "
        f"`asr machine adopt {protection.name} --dry-run`; to record it: `asr machine adopt {protection.name}`."
    )


def _wait_or_adopt(protection: Protection) -> str:
    return (
        "If nothing changes at the target for two intervals, it is recorded automatically. If another engine has a "
        f"copy of this vault, stop one of the two. To record it now: `asr machine adopt {protection.name}`."
    )


def _no_replica(protection: Protection) -> str:
    return (
        f"If the replica directory is not mounted, mount it. If the failover was committed or reversed since: `asr "
        f"unprotect {protection.name}`, which changes neither machine, and then protect it from the site where it runs."
    )


def _end_protection(protection: Protection) -> str:
    return (
        "Check at which site the machine runs, and shut it down at the other one. Then `asr unprotect "
        f"{protection.name}`, which changes neither machine, and protect it from the site where it runs."
    )
