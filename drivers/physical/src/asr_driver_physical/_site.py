"""A connected site: the process server's side of its servers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import attrs

from asr_driver_physical._hub import Gateway
from asr_driver_physical._identity import Identity, ServerRecord
from asr_driver_physical._inventory import PhysicalInventory
from asr_driver_physical._readiness import certificate_finding
from asr_driver_physical._settings import DRIVER, SiteSettings
from asr_driver_physical._source import PhysicalSource
from asr_driver_physical._view import Spool
from asrcore.driver import Capability, Inventory, Site, SiteStatus, Source
from asrcore.errors import InvalidSetting, MachineNotFound
from asrcore.units import format_size

__all__ = ["CAPABILITIES", "PhysicalSite"]

CAPABILITIES = frozenset({Capability.FENCE, Capability.SOURCE, Capability.TRACKING})


class PhysicalSite(Site):
    """Listens for the servers, or asks the process of this host that does."""

    driver = DRIVER

    def __init__(self, name: str, settings: SiteSettings) -> None:
        """Raises InvalidSetting, SiteUnreachable."""
        self.name = name
        self.settings = settings
        try:
            settings.spool.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.identity = self._identity()
            self.gateway = Gateway(name, settings, self.identity)
        except OSError as problem:
            raise InvalidSetting(setting="spool", driver=DRIVER, problem=str(problem)) from problem

    def _identity(self) -> Identity:
        """The site's; never another one in the place of that which its servers know. Raises InvalidSetting."""
        noted = self.settings.spool / "authority"
        known = noted.read_text() if noted.exists() else ""
        path = self.settings.identity
        if not known or (path / "ca.pem").exists():
            identity = Identity(path)
            if known in ("", identity.fingerprint):
                if not known:
                    noted.write_text(identity.fingerprint)
                return identity
        problem = (
            f"{path} does not hold the identity that the site's servers were enrolled with: copy that here. To begin "
            f"anew, remove {noted} and push each server again"
        )
        raise InvalidSetting(setting="identity", driver=DRIVER, problem=problem)

    def close(self) -> None:
        """Views stay in the spool, servers dial in again."""
        self.gateway.close()

    def status(self) -> SiteStatus:
        """Which servers there are."""
        connected = self.gateway.connected()
        servers = self.identity.servers()
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
        return PhysicalInventory(self)

    @property
    def source(self) -> Source:
        return PhysicalSource(self)

    def server(self, machine_id: str) -> ServerRecord:
        """The enrolled server of that id. Raises MachineNotFound."""
        for record in self.identity.servers():
            if record.facts["machine"]["id"] == machine_id:
                return record
        raise MachineNotFound(site=self.name, machine=machine_id)

    def spool(self, server: str) -> Spool:
        """Where a server's view is kept."""
        return Spool(self.settings.spool, server, self.settings.spool_limit)

    def note_facts(self, server: str, facts: Mapping[str, Any]) -> None:
        """Keep what readiness found, for a server that is not connected one day."""
        self.identity.change(server, lambda record: attrs.evolve(record, facts=dict(facts)))
