"""Giving a machine back to its source: what an undo and a failover that failed have in common.

The target is cleaned up first where it answers, so that never both machines run. What a site cannot do now is owed: the
machine is PROTECTED again but keeps its `failover_point` (`Protection.undo_due`), takes no cycles, and the service
calls `finish_undo` until both sites are as before the failover. Until then `fence_due` says that the source is not to
be started: it was not stopped by the failover, or it is released already.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress

from asrcore.crashpoint import reach
from asrcore.errors import AsrError, MachineNotFound, StaleEpoch, UnsupportedOperation
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency
from asrcore.model.protection import Protection
from asrcore.procedures.quarantine import (
    NO_FAILURE_OF_A_SITE,
    fence_at,
    is_of_another,
    is_surely_own,
    unexplained,
)
from asrcore.replication.agreement import check_undo
from asrcore.replication.context import Context
from asrcore.replication.cycle import CycleResult
from asrcore.vault import JobState

__all__ = [
    "NO_FAILURE_OF_A_SITE",
    "clean_target",
    "finish_undo",
    "give_source_back",
    "release",
    "release_source",
    "runs_at_target",
    "source_was_stopped",
    "try_undo",
    "withdraw_late_fence",
]

_log = logging.getLogger(__name__)

_LOOK_BACK = 20  # jobs of a machine among which its last failover is looked for


def clean_target(context: Context, protection: Protection) -> AsrError | None:
    """Delete the machine that was made at the target, and restore what it replaced; the reason if that failed.

    Raises StaleEpoch: a replica that has another owner must not be touched, and the source not be started.
    """
    try:
        context.site(protection.target_site).failover.undo(protection.replica_id, protection.epoch)
    except (*NO_FAILURE_OF_A_SITE, StaleEpoch):
        raise
    except AsrError as problem:
        _log.warning("%s: %s is not cleaned up yet: %s", protection.name, protection.target_site, problem)
        return problem
    return None


def runs_at_target(context: Context, protection: Protection) -> bool | None:
    """Whether the machine that was made at the target runs; None if that is not known."""
    if protection.target_machine is None:
        return False  # it is started only after it is recorded
    try:
        power = context.site(protection.target_site).inventory.machine(protection.target_machine).power
    except MachineNotFound:
        return False
    except NO_FAILURE_OF_A_SITE:
        raise
    except AsrError:
        return None
    return None if power is PowerState.UNKNOWN else power is not PowerState.OFF


def release_source(context: Context, protection: Protection, *, start: bool) -> AsrError | None:
    """Remove the fence of a failover at the source and start the machine if it is to be; the reason if that failed."""
    # Undo is also how another point is chosen while the source is lost: it must not depend on it.
    return release(context, protection, (protection.source_site, protection.source_machine), start=start)


def release(context: Context, protection: Protection, place: tuple[str, str], *, start: bool) -> AsrError | None:
    """The same at `place`, a site and its machine. Where the site has no such machine any more, or takes no commands,
    nothing is left to do. Another vault's quarantine stays, and the machine is not started."""
    site, machine = place
    try:
        inventory = context.site(site).inventory
        fence = fence_at(inventory, machine)
        if fence is not None and is_of_another(protection, fence):
            return unexplained(protection, site, fence) if start else None
        with suppress(UnsupportedOperation):  # then it was not fenced
            inventory.unfence(machine, protection.epoch)
        reach("undo.released")
        if start and inventory.machine(machine).power is PowerState.OFF:
            inventory = context.site(site).inventory
            context.vault.check_assigned(protection)  # last, when the connection is up: the command has no epoch
            inventory.power_on(machine)
    except NO_FAILURE_OF_A_SITE:
        raise
    except (MachineNotFound, UnsupportedOperation) as problem:
        _log.warning("%s: there is nothing to release at %s: %s", protection.name, site, problem)
    except AsrError as problem:
        _log.warning("%s: it could not be released yet at %s: %s", protection.name, site, problem)
        return problem
    return None


def give_source_back(context: Context, protection: Protection) -> AsrError | None:
    """Release the source at an undo, and start it if the failover had stopped it; the reason if that failed."""
    try:
        # Of an unplanned failover whose fence was owed, only the source knows whether it was fenced, thus stopped, and
        # the reply was lost. A planned one has stopped it in any case.
        if protection.fence_due and not protection.planned:
            inventory = context.site(protection.source_site).inventory
            fence = inventory.fenced(protection.source_machine)
            if fence is not None and not is_of_another(protection, fence):
                # Recorded before the fence is removed: after a kill, nothing else shows that it was stopped.
                protection = context.vault.update(protection.id, fence_due=False)
    except NO_FAILURE_OF_A_SITE:
        raise
    except (MachineNotFound, UnsupportedOperation):
        pass
    except AsrError as problem:
        return problem
    return release_source(context, protection, start=not protection.fence_due)


def withdraw_late_fence(context: Context, protection: Protection, result: CycleResult) -> None:
    """After a cycle of a machine that is off: remove a quarantine that arrived after the machine was given back, and
    start the machine. An engine that was killed, or another server, may have sent it, so no memory is needed for this.

    The cycle proves that this vault has not failed the machine over, whatever its records are worth: a replica with a
    machine at the target takes none. It proves nothing of other vaults: a quarantine that this vault has not sent
    stays, and is reported by an error, QuarantinedByAnother. `protection`: as before the cycle.
    """
    if result.point.consistency is not Consistency.OFFLINE:
        return
    site, machine = protection.source_site, protection.source_machine
    fence = fence_at(context.site(site).inventory, machine)
    if fence is None:
        return
    now = context.vault.protection(protection.id)
    if not is_surely_own(now, fence):
        problem: AsrError = unexplained(now, site, fence)
        if (protection.error or {}).get("code") != problem.code:
            _note(context, now, f"{problem}; it was not started")
        raise problem
    left = release_source(context, now, start=True)
    if left is not None:
        raise left
    text = f"a quarantine at {site} that arrived after the machine was given back was removed; the machine runs"
    _note(context, now, text)


def _note(context: Context, protection: Protection, text: str) -> None:
    context.vault.add_event(at=context.clock(), machine=protection.name, kind="quarantine", text=text)


def source_was_stopped(context: Context, protection: Protection, but: str) -> bool:
    """Whether a failover of those that the machine is in the middle of has stopped its source: a planned one that got
    stuck before an unplanned one. The vault's record knows only the last one. `but`: the id of the job that asks."""
    for job in context.vault.jobs(machine=protection.name, limit=_LOOK_BACK):
        facts = json.loads(job.result or "{}")
        if job.id == but:
            continue
        if job.kind == "failover-unplanned" and ("source_to_start" in facts or "started_at" in facts):
            return bool(facts.get("source_to_start"))
        if job.kind == "failover-planned" and "source_was_running" in facts:
            return bool(facts["source_was_running"])
        if job.state is JobState.DONE and job.kind != "failover-cleanup":
            return False
    return False


def finish_undo(context: Context, protection_id: str) -> None:
    """Do what an undo or a failover that was taken back still owes to a site. Raises the first site's error."""
    protection = context.vault.protection(protection_id)
    if protection.undo_due:
        left, unreleased = try_undo(context, protection)
        if (problem := left or unreleased) is not None:
            raise problem


def try_undo(context: Context, protection: Protection) -> tuple[AsrError | None, AsrError | None]:
    """The same, of a machine for which an undo is due; why target and source cannot do their parts."""
    check_undo(context, protection)
    left = clean_target(context, protection)
    unreleased = give_source_back(context, protection)
    protection = context.vault.protection(protection.id)
    if left is None and unreleased is None:
        context.vault.update(protection.id, failover_point=None, target_machine=None, fence_due=False)
        reach("undo.completed")
        context.vault.add_event(
            at=context.clock(),
            machine=protection.name,
            kind="failover",
            text="the undo is complete: source and target are as before the failover",
        )
    elif unreleased is None and not protection.fence_due:
        context.vault.update(protection.id, fence_due=True)  # if a person stops it now, it stays off
    return left, unreleased
