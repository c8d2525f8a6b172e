"""Steps that several procedures share."""

from __future__ import annotations

from collections.abc import Mapping

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import (
    AsrError,
    FenceRefused,
    MachineNotFound,
    QuarantinedByAnother,
    SiteUnreachable,
    UnsupportedOperation,
    VaultBehind,
)
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.procedures.procedure import Work
from asrcore.procedures.quarantine import before_fence, quarantine
from asrcore.replication.agreement import check_fence

__all__ = ["commanded", "create_replica", "fence_source", "note_repairs", "refused"]


def create_replica(work: Work) -> driver.Replica:
    """The replica of the protection as the vault has it now; it is filled from its seed machine where it has one."""
    protection = work.protection
    inventory = work.context.site(protection.source_site).inventory
    spec = driver.ReplicaSpec(
        replica_id=protection.replica_id,
        name=protection.name,
        epoch=protection.epoch,
        description=inventory.description(protection.source_machine),
        seed_machine=protection.seed_machine,
    )
    work.watch.start("preparing the replica", sum(disk.size for disk in spec.description.machine.disks))
    return work.context.site(protection.target_site).target.create_replica(spec, work.watch)


def note_repairs(work: Work, instance: driver.Instance) -> None:
    """Record what the target changed on the machine's disks so that it boots there."""
    if instance.repairs:
        work.facts["repairs"] = list(instance.repairs)
    for repair in instance.repairs:
        work.note("repair", repair)


def commanded(work: Work, site: str) -> driver.Inventory:
    """The inventory of a site, to switch the machine on or off. Such a command carries no epoch, so ownership of the
    machine is checked last, when the connection is up. Raises NotAssigned."""
    inventory = work.context.site(site).inventory
    work.context.vault.check_assigned(work.protection)
    return inventory


def fence_source(work: Work) -> None:
    """Quarantine the machine at the site that it was taken from. A slow site may do it after the machine was given
    back: then it stays in `Context.fencing`, and the service withdraws it."""
    context, protection = work.context, work.protection
    place = protection.source_site, protection.source_machine
    check_fence(context, protection)
    inventory = context.site(protection.source_site).inventory
    start = before_fence(inventory, protection, place).start
    if work.protection.epoch != protection.epoch:
        return  # connecting took so long that the machine was given back meanwhile
    context.fencing[protection.id] = place, start
    problem: Exception | None = None
    try:
        inventory.fence(protection.source_machine, quarantine(protection, f"failed over to {protection.target_site}"))
        reach("failover.fenced")
    except Exception as error:  # noqa: BLE001 - it may have been done, and only the reply be lost
        problem = error
    now = work.protection
    if now.epoch != protection.epoch or now.state not in (State.FAILING_OVER, State.FAILED_OVER):
        context.fencing[protection.id] = place, start
        return
    context.fencing.pop(protection.id, None)
    if problem is not None:
        raise problem
    context.vault.update(protection.id, fence_due=False, error=None)
    work.facts["fence"] = "done"
    work.note("quarantine", f"machine quarantined at {protection.source_site}")


def refused(protection: Protection, problem: Exception) -> Mapping[str, object] | None:
    """The error to record with a machine whose fence failed: a site that answers but refuses needs a person."""
    if isinstance(problem, (SiteUnreachable, MachineNotFound, UnsupportedOperation, VaultBehind)):
        return protection.error
    if isinstance(problem, QuarantinedByAnother):
        return problem.as_dict()
    detail = str(problem) if isinstance(problem, AsrError) else repr(problem)
    return FenceRefused(site=protection.source_site, machine=protection.name, detail=detail).as_dict()
