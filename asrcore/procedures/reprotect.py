"""Re-protect: replication in the reverse direction, sending only what differs.

F8 and F9 in docs/reference/site-recovery-map.md.
"""

from __future__ import annotations

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import MachineNotFound, NoFailback
from asrcore.model.protection import NetworkMap, Protection
from asrcore.model.state import Event, State, allowed
from asrcore.procedures.failure import recorded
from asrcore.procedures.procedure import Procedure, Step, Work
from asrcore.procedures.protect import Pairing, check_ready
from asrcore.procedures.quarantine import fence_at, is_of_another, quarantine, unexplained
from asrcore.procedures.steps import create_replica
from asrcore.replication.agreement import check_fence
from asrcore.replication.cycle import run_cycle
from asrcore.replication.ids import new_id

__all__ = ["REPROTECT"]


def _begin(work: Work) -> None:
    protection = work.protection
    allowed(protection.name, protection.state, Event.REPROTECT)
    if protection.state is State.REVERSING or protection.target_machine is None:
        return
    check_fence(work.context, protection)
    # Both sites must answer before the direction is reversed.
    former = work.context.site(protection.source_site)
    if driver.Capability.TARGET not in work.context.plugins.driver(former.driver).info.capabilities:  # F9
        raise NoFailback(machine=protection.name, site=former.name, driver=former.driver)
    there = _quarantined(former, protection)
    can_seed = driver.Capability.SEED in former.status().capabilities
    seed = protection.source_machine if there and can_seed else None
    work.context.vault.update(protection.id, fence_due=False)
    reach("reprotect.fenced")
    networks = NetworkMap({there: here for here, there in protection.networks.networks.items()})
    pairing = Pairing(
        name=protection.name,
        policy=protection.policy,
        source_site=protection.target_site,
        machine_id=protection.target_machine,
        target_site=protection.source_site,
        networks=networks,
    )
    check_ready(work.context, pairing)
    work.context.vault.start_reverse(
        protection.id,
        source_machine=protection.target_machine,
        replica_id=new_id("r"),
        seed_machine=seed,
        networks=networks,
    )
    reach("reprotect.begun")
    work.note("reprotect", f"replication reversed: from {protection.target_site} to {protection.source_site}")


def _quarantined(former: driver.Site, protection: Protection) -> bool:
    """Quarantine the machine at the former source; False if it is no longer there (a rebuilt site). Raises
    QuarantinedByAnother: its disks are not for this vault to write to."""
    try:
        found = fence_at(former.inventory, protection.source_machine)
        if found is not None and is_of_another(protection, found):
            raise unexplained(protection, former.name, found)
        fence = quarantine(protection, f"runs at {protection.target_site}")
        former.inventory.fence(protection.source_machine, fence)
    except MachineNotFound:
        return False
    return True


def _create(work: Work) -> None:
    protection = work.protection
    if protection.state is not State.REVERSING:
        return
    replica = create_replica(work)
    work.context.vault.update(protection.id, replica_kind=replica.info().kind)
    reach("reprotect.replica-created")


def _compare(work: Work) -> None:
    protection = work.protection
    if protection.state is not State.REVERSING:
        return
    result = run_cycle(work.context, protection.id, work.watch, keep=True)
    reach("reprotect.compared")
    work.facts.update(point=result.point.id, **result.counts.facts())
    work.note("reprotect", f"equal again after {result.counts.sent} bytes sent")


REPROTECT = Procedure(
    "reprotect",
    (Step("begin", _begin), Step("create-replica", recorded(_create)), Step("compare", recorded(_compare))),
)
