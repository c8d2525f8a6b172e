"""A connection to one storage account and, where machines are run, one resource group."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from azure.core.exceptions import ResourceExistsError

from asr_driver_azure._arm import Arm
from asr_driver_azure._calls import Calls
from asr_driver_azure._clients import Clients
from asr_driver_azure._container import Container
from asr_driver_azure._machines import Machines
from asr_driver_azure._pacer import Pacer
from asr_driver_azure._settings import DRIVER, SiteSettings
from asr_driver_azure._sizes import Size, sizes_of
from asrcore.driver import Capability, Failover, Inventory, Site, SiteStatus, Source, Target
from asrcore.errors import SiteUnreachable

if TYPE_CHECKING:
    from asr_driver_azure._failover import AzureFailover
    from asr_driver_azure._inventory import AzureInventory
    from asr_driver_azure._source import AzureSource
    from asr_driver_azure._target import AzureTarget

__all__ = ["AzureSite"]

_STORES = frozenset({Capability.TARGET})
_RUNS = _STORES | {Capability.FAILOVER, Capability.POWER, Capability.FENCE, Capability.SOURCE, Capability.TRACKING}
_LOOK_SECONDS = 5.0


class AzureSite(Site):
    """See `Site`. Thread-safe."""

    driver = DRIVER

    def __init__(
        self,
        name: str,
        settings: SiteSettings,
        clock: Callable[[], float] = time.time,
        heard: Callable[[Any], None] | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.clock = clock
        self.clients = Clients(settings, heard)
        self.calls = Calls(name)
        self._closed = False

    @cached_property
    def container(self) -> Container:
        """Where replicas are."""
        return Container(self.clients.blobs, self.settings.container, self.calls)

    @cached_property
    def arm(self) -> Arm:
        """Where machines are run."""
        settings = self.settings
        # Management takes far fewer requests than storage; waiting for it must hold up no data. It counts by kind of
        # request and by resource: who is told to wait for one disk's snapshots waits alone.
        calls = Calls(self.name, pacer=Pacer(requests=20, parallel=16), together=False)
        return Arm(self.clients, settings.subscription, settings.resource_group, calls)

    @cached_property
    def machines(self) -> Machines:
        """Those of the resource group."""
        return Machines(self)

    def sizes(self) -> list[Size]:
        """Machine sizes that the region offers, asked for once a connection."""
        return self._sizes

    @cached_property
    def _sizes(self) -> list[Size]:
        return sizes_of(self.arm.skus(self.settings.location))

    def make_container(self) -> None:
        """Make the container, if it is not there."""

        def make() -> None:
            try:
                self.container.client.create_container()
            except ResourceExistsError:
                return

        if not self.reach():
            self.container.run("making the container", make, write=True)

    def reach(self) -> bool:
        """Whether the container is there. Raises SiteUnreachable, AccessDenied."""
        if self._closed:
            raise SiteUnreachable(site=self.name, detail="the connection was closed")
        return self.container.run("looking at the container", self.container.client.exists, patience=_LOOK_SECONDS)

    def status(self) -> SiteStatus:
        """See `Site.status`. Tells what is stored, for it is what costs. Raises AccessDenied, too."""
        there = self.reach()
        details = {
            "replica kind": "page-blob: a snapshot per point",
            "container": self.container.where + ("" if there else " (made with the first replica)"),
        }
        if there:
            details["stored"] = self._target.stored()
        if self.settings.runs_machines:
            details["machines"] = f"{self.settings.resource_group} in {self.settings.location}"
        if self.calls.pacer.delays:
            details["busy answers"] = str(self.calls.pacer.delays)
        return SiteStatus("Azure", _RUNS if self.settings.runs_machines else _STORES, details)

    # -- roles

    @cached_property
    def _inventory(self) -> AzureInventory:
        from asr_driver_azure._inventory import AzureInventory  # noqa: PLC0415 - brings the management SDK, 1 s to load

        return AzureInventory(self)

    @cached_property
    def _source(self) -> AzureSource:
        from asr_driver_azure._source import AzureSource  # noqa: PLC0415

        return AzureSource(self)

    @cached_property
    def _target(self) -> AzureTarget:
        from asr_driver_azure._target import AzureTarget  # noqa: PLC0415

        return AzureTarget(self)

    @cached_property
    def _failover(self) -> AzureFailover:
        from asr_driver_azure._failover import AzureFailover  # noqa: PLC0415

        return AzureFailover(self)

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
        if not self.settings.runs_machines:
            raise self._unsupported(f"{operation}: its setting subscription is not set")

    def sweep(self) -> list[str]:
        """See `Site.sweep`."""
        from asr_driver_azure._probes import sweep_probes  # noqa: PLC0415
        from asr_driver_azure._sweep import sweep  # noqa: PLC0415

        return [*(sweep(self) if self.reach() else []), *sweep_probes(self)]

    def close(self) -> None:
        """See `Site.close`."""
        self._closed = True
        self.clients.close()
