"""Process servers and the machines assigned to them, as the planner sees them."""

from __future__ import annotations

import attrs

__all__ = ["AT_TARGET", "ENGINE", "Placement", "Server"]

ENGINE = "engine"
"""Name of the server that has a whole vault: the process of `asr run`."""
AT_TARGET = frozenset({"failover-unplanned", "failover-commit"})
"""Kinds of jobs that can be done without the source's site."""


@attrs.frozen
class Server:
    """A process server that is registered in the vault.

    `session` is new each time the server starts: it does not own what an earlier process of that name owned.
    `sites`: those it can reach; None: all. `alive`: it was heard of within its lease. `silent`: seconds since then, by
    the database's clock. `version`: of its software, empty if unknown.
    """

    name: str
    session: str
    host: str
    sites: frozenset[str] | None
    alive: bool
    silent: float
    version: str = ""

    def reaches(self, *sites: str) -> bool:
        """Whether it can work between these sites."""
        return self.sites is None or self.sites.issuperset(sites)


@attrs.frozen
class Placement:
    """A protected machine and who works on it. `session`: of the server it is assigned to, None for a new machine.
    `busy`: a cycle or a job of it is under way. `target_suffices`: that job can be done without the source's site."""

    machine: str
    source_site: str
    target_site: str
    session: str | None
    busy: bool
    target_suffices: bool = False
