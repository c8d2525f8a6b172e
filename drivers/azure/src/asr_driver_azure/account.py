"""What all roles of a site stand on: one storage account and, where machines are run, one resource group."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

from azure.core.exceptions import ResourceExistsError

from asr_driver_azure.blobs.container import Container
from asr_driver_azure.cloud.arm import Arm
from asr_driver_azure.cloud.calls import Calls
from asr_driver_azure.cloud.clients import Clients
from asr_driver_azure.cloud.pacer import PARALLEL, Pacer
from asr_driver_azure.cloud.sizes import Size, sizes_of
from asr_driver_azure.settings import DRIVER, SiteSettings
from asrcore.driver import Closing
from asrcore.errors import SiteUnreachable

__all__ = ["AzureAccount"]

_LOOK_SECONDS = 5.0


class AzureAccount(Closing):
    """`name` is the site's. Thread-safe."""

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
        self._readers = ThreadPoolExecutor(PARALLEL, thread_name_prefix="azure-read")
        self._closed = False

    @cached_property
    def container(self) -> Container:
        """Where replicas are."""
        return Container(self.clients.blobs, self.settings.container, self.calls)

    @cached_property
    def arm(self) -> Arm:
        """Where machines are run."""
        settings = self.settings
        # Management allows far fewer requests than storage; waiting for it must not delay data. It counts by kind of
        # request and by resource: a wait for one disk's snapshots delays nothing else.
        calls = Calls(self.name, pacer=Pacer(requests=20, parallel=16), together=False)
        return Arm(self.clients, settings.subscription, settings.resource_group, calls)

    def sizes(self) -> list[Size]:
        """Machine sizes that the region offers, requested once per connection."""
        return self._sizes

    @cached_property
    def _sizes(self) -> list[Size]:
        return sizes_of(self.arm.skus(self.settings.location))

    def make_container(self) -> None:
        """Create the container, if it does not exist."""

        def make() -> None:
            try:
                self.container.client.create_container()
            except ResourceExistsError:
                return

        if not self.reach():
            self.container.run("creating the container", make, write=True)

    def reach(self) -> bool:
        """Whether the container exists. Raises SiteUnreachable, AccessDenied."""
        if self._closed:
            raise SiteUnreachable(site=self.name, detail="the connection was closed")
        return self.container.run("reading the container", self.container.client.exists, patience=_LOOK_SECONDS)

    def begin(self, read: Callable[[], None]) -> Future[None]:
        """Read in another thread: all readers together have as many as requests may be in flight. Raises
        SiteUnreachable."""
        try:
            return self._readers.submit(read)
        except RuntimeError as problem:
            raise SiteUnreachable(site=self.name, detail="the connection was closed") from problem

    def close(self) -> None:
        """Close the connections; calls after it raise SiteUnreachable."""
        self._closed = True
        self._readers.shutdown(wait=False)
        self.clients.close()
