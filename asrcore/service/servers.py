"""Process servers and master targets as people and programs see them: health, version, last seen, machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs

from asrcore.driver import SiteStatus
from asrcore.errors import AsrError
from asrcore.model.server import ENGINE
from asrcore.units import format_time
from asrcore.vault import Vault
from asrcore.wire.tls import Role

__all__ = ["ServerStatus", "master_targets", "process_servers"]

_REMOTE = "remote"
"""The driver whose sites are served by master targets."""
_ASKED_AT_ONCE = 8


@attrs.frozen
class ServerStatus:
    """A process server, a master target or the engine: the process that has the whole vault.

    `where`: its host, or the address that it is reached at. `seen_at`: seconds since the epoch; of a master target that
    does not answer, when a point was last sealed there; None: never. `sites`: those that it serves or can reach, None:
    all. `machines`: how many it is responsible for. `error`: why it is not up, an error of the catalogue.
    """

    role: str
    name: str
    where: str
    up: bool
    version: str
    seen_at: float | None
    sites: tuple[str, ...] | None
    machines: int
    error: AsrError | None = None

    def document(self) -> dict[str, Any]:
        """For `asr server list --json`."""
        return {
            "role": self.role,
            "server": self.name,
            "where": self.where,
            "up": self.up,
            "version": self.version,
            "seen_at": self.seen_at,
            "seen": None if self.seen_at is None else format_time(self.seen_at),
            "sites": None if self.sites is None else list(self.sites),
            "machines": self.machines,
            "error": None if self.error is None else self.error.as_dict(),
        }


def process_servers(vault: Vault, now: float) -> list[ServerStatus]:
    """Those that are registered, by name; without any the engine that works on the vault, if one does."""
    assigned = Counter(vault.assigned().values())
    found = [
        ServerStatus(
            role=ENGINE if server.name == ENGINE else Role.PROCESS_SERVER.value,
            name="" if server.name == ENGINE else server.name,
            where=server.host,
            up=server.alive,
            version=server.version,
            seen_at=now - server.silent,
            sites=None if server.sites is None else tuple(sorted(server.sites)),
            machines=assigned[server.session],
        )
        for server in vault.servers()
    ]
    holder = vault.engine_holder()
    if not found and holder is not None:
        machines = len(vault.protections())
        found.append(ServerStatus(ENGINE, "", holder, True, "", now, None, machines))
    return found


def master_targets(vault: Vault, contact: Callable[[str], SiteStatus], now: float) -> list[ServerStatus]:
    """One for each site of driver `remote`, by the site's name. Queries them all in parallel, with `contact`."""
    sites = [site for site in vault.sites() if site.driver == _REMOTE]
    cycles = vault.last_cycles()
    sealed: dict[str, float] = {}
    carried: Counter[str] = Counter()
    for protection in vault.protections():
        carried[protection.target_site] += 1
        if (cycle := cycles.get(protection.id)) is not None:
            sealed[protection.target_site] = max(cycle.sealed_at, sealed.get(protection.target_site, 0.0))

    def ask(name: str) -> SiteStatus | AsrError:
        try:
            return contact(name)
        except AsrError as problem:
            return problem

    with ThreadPoolExecutor(_ASKED_AT_ONCE, "ask-master-targets") as pool:
        answers = list(pool.map(ask, [site.name for site in sites]))
    result = []
    for site, answer in zip(sites, answers, strict=True):
        error = answer if isinstance(answer, AsrError) else None
        result.append(
            ServerStatus(
                role=site.settings.get("role") or Role.MASTER_TARGET.value,
                name=site.settings.get("peer") or site.name,
                where=site.settings["address"],
                up=error is None,
                version="" if isinstance(answer, AsrError) else _version(answer),
                seen_at=now if error is None else sealed.get(site.name),
                sites=(site.name,),
                machines=carried[site.name],
                error=error,
            )
        )
    return result


def _version(answer: SiteStatus) -> str:
    """Of the process that serves it; else of what it serves."""
    return answer.details.get("served by version", answer.version)
