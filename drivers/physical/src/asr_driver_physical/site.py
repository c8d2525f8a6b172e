"""A connected site: its servers, and the roles that stand on them."""

from __future__ import annotations

from datetime import UTC, datetime

from asr_driver_physical.inventory import PhysicalInventory
from asr_driver_physical.servers.readiness import certificate_finding
from asr_driver_physical.servers.servers import Servers
from asr_driver_physical.settings import CAPABILITIES, DRIVER, SiteSettings
from asr_driver_physical.source.source import PhysicalSource
from asrcore.driver import Inventory, Site, SiteStatus, Source
from asrcore.units import format_size

__all__ = ["PhysicalSite"]


class PhysicalSite(Site):
    """Listens for the servers, or uses the process of this host that does."""

    driver = DRIVER

    def __init__(self, name: str, settings: SiteSettings) -> None:
        """Raises InvalidSetting, SiteUnreachable."""
        self.name = name
        self.settings = settings
        self.servers = Servers(name, settings)
        self._inventory = PhysicalInventory(self.servers)
        self._source = PhysicalSource(self.servers)

    def close(self) -> None:
        """Views are kept in the spool, servers reconnect."""
        self.servers.close()

    def status(self) -> SiteStatus:
        """The enrolled servers."""
        connected = self.servers.gateway.connected()
        servers = self.servers.identity.servers()
        details = {
            "listens": f"{self.settings.host}:{self.settings.port}",
            "servers": str(len(servers)),
            "connected": ", ".join(sorted(connected)) or "none",
            "spool": f"{self.settings.spool}, at most {format_size(self.settings.spool_limit)}",
        }
        ending = [record for record in servers if certificate_finding(record.ends)]
        if ending:
            details["certificates"] = "to be renewed by push: " + ", ".join(
                f"{record.name} (ends {datetime.fromtimestamp(record.ends, UTC):%Y-%m-%d})" for record in ending
            )
        return SiteStatus(f"{len(connected)} of {len(servers)} servers connected", CAPABILITIES, details)

    @property
    def inventory(self) -> Inventory:
        return self._inventory

    @property
    def source(self) -> Source:
        return self._source
