"""One libvirt site: a host, and the roles that stand on it."""

from __future__ import annotations

import contextlib

from asr_driver_libvirt.failover.failover import LibvirtFailover
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.inventory import LibvirtInventory
from asr_driver_libvirt.settings import DRIVER, SiteSettings
from asr_driver_libvirt.source.source import LibvirtSource
from asr_driver_libvirt.target.target import LibvirtTarget
from asrcore.driver import Capability, Failover, Inventory, Site, SiteStatus, Source, Target
from asrcore.errors import AsrError

__all__ = ["LibvirtSite"]


class LibvirtSite(Site):
    """A libvirt host as source and, where `replica_dir` is set, as target."""

    driver = DRIVER

    def __init__(self, name: str, settings: SiteSettings) -> None:
        self.name = name
        self.host = LibvirtHost(name, settings)
        self._inventory = LibvirtInventory(self.host)
        self._source = LibvirtSource(self.host)
        self._failover: LibvirtFailover | None = None
        self._target: LibvirtTarget | None = None
        if settings.replica_dir is not None:
            self._failover = LibvirtFailover(self.host)
            self._target = LibvirtTarget(self.host, self._failover)

    def status(self) -> SiteStatus:
        """Versions of the host and the replica kind. Raises SiteUnreachable."""
        with self.host.guard("asking for the host's versions"):
            conn = self.host.conn()
            lib, hypervisor, hostname = conn.getLibVersion(), conn.getVersion(), conn.getHostname()
        capabilities = {Capability.POWER, Capability.FENCE, Capability.SOURCE, Capability.TRACKING}
        details = {"host": hostname, "libvirt": _version(lib), "qemu": _version(hypervisor)}
        if not self.host.settings.owner:
            details["vault tag"] = "not recorded, so another vault's checkpoints are not recognised: `asr site update`"
        if self._target is not None:
            capabilities |= {Capability.TARGET, Capability.FAILOVER, Capability.SEED}
            details["replica directory"] = str(self._target.layout.path)
            if not self.host.settings.replica_mark:
                details["replica mark"] = "not recorded, so a missing mount is not noticed"
            with contextlib.suppress(AsrError):
                details |= self._target.details()
        return SiteStatus(f"libvirt {_version(lib)}", frozenset(capabilities), details)

    def close(self) -> None:
        """Close the connection; views that are open end."""
        self._source.close()
        self.host.close()

    @property
    def inventory(self) -> Inventory:
        """Domains and their power."""
        return self._inventory

    @property
    def source(self) -> Source:
        """Checkpoints and pull-mode backups."""
        return self._source

    @property
    def target(self) -> Target:
        """Replicas in `replica_dir`. Raises UnsupportedOperation where the setting is missing."""
        if self._target is None:
            raise self._unsupported("be a target: its setting replica_dir is not set")
        return self._target

    @property
    def failover(self) -> Failover:
        """Machines created from recovery points. Raises UnsupportedOperation where `replica_dir` is not set."""
        if self._failover is None:
            raise self._unsupported("run replicas: its setting replica_dir is not set")
        return self._failover


def _version(number: int) -> str:
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"
