"""The driver itself: its name and settings, and how it connects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, ClassVar

from asr_driver_physical.settings import CAPABILITIES, DRIVER, SETTINGS, SiteSettings
from asrcore.driver import Driver, DriverInfo

if TYPE_CHECKING:
    from asr_driver_physical.site import PhysicalSite

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

    def adopt(self, name: str, settings: Mapping[str, str]) -> dict[str, str]:
        """This vault's tag, noted in the identity directory. Raises InvalidSetting."""
        from asr_driver_physical.servers.identity import Identity  # noqa: PLC0415 - as below

        parsed = SiteSettings.parse(settings)
        if parsed.owner:
            return {}
        owner = os.urandom(4).hex()
        Identity(parsed.identity).claim(owner)
        return {"owner": owner}

    def connect(self, name: str, settings: Mapping[str, str]) -> PhysicalSite:
        """Raises InvalidSetting, SiteUnreachable."""
        from asr_driver_physical.site import PhysicalSite  # noqa: PLC0415 - what a site needs loads with a site only

        return PhysicalSite(name, SiteSettings.parse(settings))
