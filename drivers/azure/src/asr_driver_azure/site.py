"""One Azure site: an account, and the roles that stand on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.cleanup.probes import sweep_probes
from asr_driver_azure.cleanup.sweep import sweep
from asr_driver_azure.failover import AzureFailover
from asr_driver_azure.inventory import AzureInventory
from asr_driver_azure.machines.machines import Machines
from asr_driver_azure.settings import DRIVER, SiteSettings
from asr_driver_azure.source import AzureSource
from asr_driver_azure.target.target import AzureTarget
from asrcore.driver import Capability, Failover, Inventory, Site, SiteStatus, Source, Target

__all__ = ["AzureSite"]

_STORES = frozenset({Capability.TARGET})
_RUNS = _STORES | {Capability.FAILOVER, Capability.POWER, Capability.FENCE, Capability.SOURCE, Capability.TRACKING}


class AzureSite(Site):
    """See `Site`. Thread-safe. Without the setting `subscription` it stores replicas and runs nothing."""

    driver = DRIVER

    def __init__(
        self,
        name: str,
        settings: SiteSettings,
        clock: Callable[[], float] = time.time,
        heard: Callable[[Any], None] | None = None,
    ) -> None:
        self.name = name
        self.account = AzureAccount(name, settings, clock, heard)
        self.machines = Machines(self.account)
        self._inventory = AzureInventory(self.account, self.machines)
        self._source = AzureSource(self.account, self.machines)
        self._failover = AzureFailover(self.account, self.machines)
        self._target = AzureTarget(self.account, self._failover)

    def status(self) -> SiteStatus:
        """See `Site.status`. Includes what is stored, since that is billed. Raises AccessDenied, too."""
        account = self.account
        there = account.reach()
        details = {
            "replica kind": "page-blob: a snapshot per point",
            "container": account.container.where + ("" if there else " (created with the first replica)"),
        }
        if there:
            details["stored"] = self._target.stored()
        if account.settings.runs_machines:
            details["machines"] = f"{account.settings.resource_group} in {account.settings.location}"
        if account.calls.pacer.delays:
            details["busy answers"] = str(account.calls.pacer.delays)
        return SiteStatus("Azure", _RUNS if account.settings.runs_machines else _STORES, details)

    @property
    def inventory(self) -> Inventory:
        """See `Site.inventory`."""
        self._need("list machines")
        return self._inventory

    @property
    def source(self) -> Source:
        """See `Site.source`."""
        self._need("be a source")
        return self._source

    @property
    def target(self) -> Target:
        """See `Site.target`."""
        return self._target

    @property
    def failover(self) -> Failover:
        """See `Site.failover`."""
        self._need("run replicas")
        return self._failover

    def _need(self, operation: str) -> None:
        if not self.account.settings.runs_machines:
            raise self._unsupported(f"{operation}: its setting subscription is not set")

    def sweep(self) -> list[str]:
        """See `Site.sweep`."""
        swept = sweep(self.account, self.machines) if self.account.reach() else []
        return [*swept, *sweep_probes(self.account)]

    def close(self) -> None:
        """See `Site.close`."""
        self.account.close()
