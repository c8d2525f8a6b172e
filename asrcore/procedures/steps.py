"""Steps that several procedures share."""

from __future__ import annotations

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.procedures.procedure import Work

__all__ = ["commanded", "create_replica", "fence_source", "note_repairs"]


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
    """Quarantine the machine at the site that it was taken from."""
    protection = work.protection
    reason = f"failed over to {protection.target_site}"
    inventory = work.context.site(protection.source_site).inventory
    if work.protection.epoch != protection.epoch:
        return  # connecting took so long that the machine was given back meanwhile
    inventory.fence(protection.source_machine, driver.Fence(protection.epoch, reason))
    reach("failover.fenced")
    work.context.vault.update(protection.id, fence_due=False)
    work.facts["fence"] = "done"
    work.note("quarantine", f"machine quarantined at {protection.source_site}")
