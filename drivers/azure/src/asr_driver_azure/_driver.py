"""The driver itself: who it is, and how it connects."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import ClassVar

from asr_driver_azure._settings import DRIVER, SETTINGS, SiteSettings
from asr_driver_azure._site import AzureSite
from asrcore.driver import Capability, Driver, DriverInfo

__all__ = ["AzureDriver"]


class AzureDriver(Driver):
    """Microsoft Azure, as target and, for failback, as source."""

    info: ClassVar[DriverInfo] = DriverInfo(
        name=DRIVER,
        title="Microsoft Azure",
        version=metadata.version("asr-driver-azure"),
        api=(1, 0),
        capabilities=frozenset(
            {
                Capability.POWER,
                Capability.FENCE,
                Capability.SOURCE,
                Capability.TRACKING,
                Capability.TARGET,
                Capability.FAILOVER,
            }
        ),
        settings=SETTINGS,
    )

    def connect(self, name: str, settings: Mapping[str, str]) -> AzureSite:
        """Raises InvalidSetting, SiteUnreachable, AccessDenied."""
        site = AzureSite(name, SiteSettings.parse(settings))
        site.status()
        return site
