"""Quarantines, and whose they are.

Several vaults may protect one machine, and their epochs say nothing about each other. So the reason of a quarantine
ends with the id of the machine's record in the vault that sent it; the contract, and what sites store, are as before.
Earlier releases wrote no id: such a quarantine counts as this vault's only where the vault has a failover on record. A
copy of a vault has the same ids and is not distinguished here; the replica is what two copies share
(`replication.agreement`).
"""

from __future__ import annotations

import logging
import re

import attrs

from asrcore import driver
from asrcore.errors import AsrError, NotAssigned, QuarantinedByAnother, UnsupportedOperation, VaultUnavailable
from asrcore.model.epoch import shown
from asrcore.model.machine import PowerState
from asrcore.model.protection import Protection

__all__ = [
    "NO_FAILURE_OF_A_SITE",
    "Before",
    "before_fence",
    "fence_at",
    "is_of_another",
    "is_surely_own",
    "quarantine",
    "unexplained",
]

_log = logging.getLogger(__name__)

NO_FAILURE_OF_A_SITE = (VaultUnavailable, NotAssigned)
"""Errors within a step that say nothing about source and target: the first is like a kill, and after the second another
server continues. Nothing is taken back because of them."""

_RECORD = re.compile(r" \[record (\S+)\]\Z")


def quarantine(protection: Protection, why: str) -> driver.Fence:
    """To be sent to a site for this machine."""
    return driver.Fence(protection.epoch, f"{why} [record {protection.id}]")


def is_of_another(protection: Protection, fence: driver.Fence | None) -> bool:
    """Whether another vault sent it."""
    found = None if fence is None else _RECORD.search(fence.reason)
    return found is not None and found[1] != protection.id


def is_surely_own(protection: Protection, fence: driver.Fence) -> bool:
    """Whether this vault sent it, and not a later copy of this vault."""
    found = _RECORD.search(fence.reason)
    return found is not None and found[1] == protection.id and fence.epoch <= protection.epoch


def unexplained(protection: Protection, site: str, fence: driver.Fence) -> QuarantinedByAnother:
    """The error of a machine that stays as it is because of this quarantine."""
    detail = f"{fence.reason}, at epoch {shown(fence.epoch)}"
    return QuarantinedByAnother(machine=protection.name, site=site, detail=detail)


def fence_at(inventory: driver.Inventory, machine: str) -> driver.Fence | None:
    """The same as `Inventory.fenced`; None also where the site has no quarantines."""
    try:
        return inventory.fenced(machine)
    except UnsupportedOperation:
        return None


@attrs.frozen
class Before:
    """A machine before its quarantine. `start`: whether it is to be started if it was given back before the quarantine
    arrived. `kept`: it is off and quarantined, so that nothing is changed. `problem`: why it could not be looked at."""

    start: bool
    kept: bool = False
    problem: Exception | None = None


def before_fence(inventory: driver.Inventory, protection: Protection, place: tuple[str, str]) -> Before:
    """Look at the machine that is to be quarantined at a site. A look that fails does not prevent the quarantine.

    A machine that is off although the failover did not stop it stays off. But one that is quarantined already was
    stopped by an earlier attempt whose reply was lost. Raises QuarantinedByAnother: the machine is off, and another
    vault's quarantine must not be replaced, because with it the record would be lost that this vault did not stop it.
    """
    site, machine = place
    try:
        fence = fence_at(inventory, machine)
        off = inventory.machine(machine).power is PowerState.OFF
    except NO_FAILURE_OF_A_SITE:
        raise
    except Exception as problem:  # noqa: BLE001 - a driver's defect must not leave the machine running at both sites
        unexpected = None if isinstance(problem, AsrError) else problem
        _log.info("%s at %s could not be looked at: %r", protection.name, site, problem, exc_info=unexpected)
        return Before(start=True, problem=problem)
    if off and fence is not None and is_of_another(protection, fence):
        raise unexplained(protection, site, fence)
    return Before(start=protection.planned or not off or fence is not None, kept=off and fence is not None)
