"""The enrolled servers of a site: who they are, how they are reached, what is kept of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from asr_driver_physical.servers.hub import Gateway
from asr_driver_physical.servers.identity import Identity, ServerRecord
from asr_driver_physical.servers.machine import check_same
from asr_driver_physical.servers.reports import facts_of
from asr_driver_physical.servers.spool import Spool
from asr_driver_physical.settings import DRIVER, SiteSettings
from asrcore.errors import InvalidSetting, MachineNotFound

__all__ = ["Servers"]


class Servers:
    """What the roles of a site stand on. `name` is the site's."""

    driver = DRIVER

    def __init__(self, name: str, settings: SiteSettings) -> None:
        """Raises InvalidSetting, SiteUnreachable."""
        self.name = name
        self.settings = settings
        try:
            settings.spool.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.identity = self._identity()
            self.identity.claim(settings.owner)
            self.gateway = Gateway(name, settings, self.identity)
        except OSError as problem:
            raise InvalidSetting(setting="spool", driver=DRIVER, problem=str(problem)) from problem

    def close(self) -> None:
        """Views are kept in the spool, servers reconnect."""
        self.gateway.close()

    def _identity(self) -> Identity:
        """The site's identity; never a different one from the one that its servers know. Raises InvalidSetting."""
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
            f"{path} does not hold the identity that the site's servers were enrolled with: copy that here. To start "
            f"again, delete {noted} and push each server again"
        )
        raise InvalidSetting(setting="identity", driver=DRIVER, problem=problem)

    def server(self, machine_id: str) -> ServerRecord:
        """The enrolled server of that id. Raises MachineNotFound, RecordDamaged."""
        records, damaged = self.identity.records()
        for record in records:
            if record.machine_id == machine_id:
                return record
        if damaged:  # it may be this one: "not found" would mean that it needs no quarantine
            raise damaged[0]
        raise MachineNotFound(site=self.name, machine=machine_id)

    def spool(self, server: str) -> Spool:
        """Where a server's view is kept."""
        return Spool(self.settings.spool, server, self.settings.spool_limit)

    def note_facts(self, server: ServerRecord, reported: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the facts from readiness, for when the server is not connected. Raises OddReport, OtherServer."""
        facts = facts_of(server.name, reported)
        check_same(server, facts["machine"])
        self.identity.change(server.name, lambda record: attrs.evolve(record, facts=facts))
        return facts
