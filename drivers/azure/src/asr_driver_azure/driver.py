"""The driver itself: its name and settings, and how it connects."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from asr_driver_azure.settings import DRIVER, SETTINGS, SiteSettings
from asrcore.driver import Capability, Check, Driver, DriverInfo
from asrcore.model.finding import Finding, Severity

if TYPE_CHECKING:
    from asr_driver_azure.site import AzureSite

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

    def check_host(self) -> list[Finding]:
        """See `Driver.check_host`."""
        from asr_driver_azure.repair import rootfs  # noqa: PLC0415 - `asr` starts sooner

        missing = rootfs.missing()
        if not missing:
            return []
        return [
            Finding(
                "azure-no-repair",
                Severity.WARNING,
                f"{', '.join(missing)} not installed on this host",
                "These programs prepare a Linux system for Azure on the disk of the new machine.",
                f"apt-get install {' '.join(sorted(set(missing.values())))}; or set `repair=off` at the site.",
            )
        ]

    def adopt(self, name: str, settings: Mapping[str, str]) -> dict[str, str]:
        """This vault's tag on snapshots. Raises InvalidSetting."""
        return {} if SiteSettings.parse(settings).owner else {"owner": os.urandom(4).hex()}

    def connect(self, name: str, settings: Mapping[str, str]) -> AzureSite:
        """Raises InvalidSetting, SiteUnreachable, AccessDenied."""
        from asr_driver_azure.site import AzureSite  # noqa: PLC0415 - Azure's SDK takes a second to load

        site = AzureSite(name, SiteSettings.parse(settings))
        site.account.reach()
        return site

    def check(self, settings: Mapping[str, str], record: Path | None = None) -> Generator[Check]:
        """See `Driver.check`."""
        from asr_driver_azure.check.check import run  # noqa: PLC0415 - brings the management SDK, 1 s to load

        return run(SiteSettings.parse(settings), record)
