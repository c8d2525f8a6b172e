"""The kit's rig for a site that stores replicas and runs no machines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

from asr_driver_azure.driver import AzureDriver
from asr_driver_azure.site import AzureSite
from asrcore.driver import Closing, Site
from asrcore.testing.conformance import ConformanceRig
from asrcore.testing.conformance.memory_rig import MemoryRig
from drivers.azure.tests.peers.storage import Storage


class TargetRig(ConformanceRig):
    """The source is the memory driver's."""

    machine_id = "web"

    def __init__(
        self, storage: Storage, driver: AzureDriver | None = None, more: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.driver = self._driver = driver or AzureDriver()
        self.storage = storage
        self.settings = storage.settings() | dict(more or {})
        self._sites: list[AzureSite] = []
        self.memory = MemoryRig(f"azure-{self.settings['container']}")
        self.change = self.memory.change  # type: ignore[method-assign]
        self.still = self.memory.still  # type: ignore[method-assign]
        self.lose_tracking = self.memory.lose_tracking  # type: ignore[method-assign]
        self._connect()

    def _connect(self) -> None:
        self._site: AzureSite = self._driver.connect("azure", self.settings)
        self._sites.append(self._site)

    def close(self) -> None:
        super().close()
        for site in self._sites:  # including the sockets of killed engines
            site.close()

    @property
    def source_site(self) -> Site:
        return self.memory.source_site

    @property
    def target_site(self) -> AzureSite:
        return self._site

    def restart(self) -> None:
        self.memory.restart()
        self._connect()

    def abandon(self, handle: Closing) -> None:
        handle.close()  # its threads end; the data they have gathered are lost, as when the process dies

    def read_only_target(self) -> AbstractContextManager[None]:
        return self.storage.switched("read_only")

    def unreachable_target(self) -> AbstractContextManager[None]:
        return self.storage.switched("cut")
