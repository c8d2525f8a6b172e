"""The driver itself: who it is, and how it connects."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import ClassVar

from asr_driver_physical._settings import DRIVER, SETTINGS, SiteSettings
from asr_driver_physical._site import CAPABILITIES, PhysicalSite
from asrcore.driver import Driver, DriverInfo

__all__ = ["PhysicalDriver"]


class PhysicalDriver(Driver):
    """Linux servers with the mobility service, as a source."""

    info: ClassVar[DriverInfo] = DriverInfo(
        name=DRIVER,
        title="physical Linux servers, by an agent",
        version=metadata.version("asr-driver-physical"),
        api=(1, 0),
        capabilities=CAPABILITIES,
        settings=SETTINGS,
    )

    def connect(self, name: str, settings: Mapping[str, str]) -> PhysicalSite:
        """Raises InvalidSetting, SiteUnreachable."""
        return PhysicalSite(name, SiteSettings.parse(settings))
