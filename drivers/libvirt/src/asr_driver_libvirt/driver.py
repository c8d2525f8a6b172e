"""The driver itself: its name and settings, what its host needs, and how it connects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, ClassVar

from asr_driver_libvirt import doctor
from asr_driver_libvirt.settings import DRIVER, SETTINGS, SiteSettings
from asrcore.driver import Capability, Driver, DriverInfo
from asrcore.model.finding import Finding

if TYPE_CHECKING:
    from asr_driver_libvirt.site import LibvirtSite

__all__ = ["LibvirtDriver"]


class LibvirtDriver(Driver):
    """KVM/QEMU hosts under libvirt, as source and as target."""

    info: ClassVar[DriverInfo] = DriverInfo(
        name=DRIVER,
        title="libvirt/KVM hosts",
        version=metadata.version("asr-driver-libvirt"),
        api=(1, 0),
        capabilities=frozenset(
            {
                Capability.POWER,
                Capability.FENCE,
                Capability.SOURCE,
                Capability.TRACKING,
                Capability.TARGET,
                Capability.FAILOVER,
                Capability.SEED,
            }
        ),
        settings=SETTINGS,
    )

    def check_host(self) -> list[Finding]:
        """Programs and libraries of this host."""
        return doctor.findings()

    def adopt(self, name: str, settings: Mapping[str, str]) -> dict[str, str]:
        """This vault's tag and the replica directory's mark. Raises InvalidSetting, TargetReadOnly, TargetFull."""
        from asr_storage.files.errors import storage_errors  # noqa: PLC0415 - as below
        from asr_storage.replica.store import Layout  # noqa: PLC0415

        parsed = SiteSettings.parse(settings)
        recorded = {} if parsed.owner else {"owner": os.urandom(4).hex()}
        if parsed.replica_dir is None or parsed.replica_mark:
            return recorded
        with storage_errors(name, parsed.replica_dir, "marking the replica directory"):
            return {**recorded, "replica_mark": Layout(parsed.replica_dir, DRIVER).adopt()}

    def connect(self, name: str, settings: Mapping[str, str]) -> LibvirtSite:
        """Raises InvalidSetting, SiteUnreachable, AccessDenied."""
        from asr_driver_libvirt.site import LibvirtSite  # noqa: PLC0415 - libvirt, lxml and libnbd load with a site only

        site = LibvirtSite(name, SiteSettings.parse(settings))
        site.host.conn()
        return site
