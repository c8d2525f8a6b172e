"""The site itself: which roles the other side offers, and the connections to it."""

from __future__ import annotations

import math
import time

import attrs

from asrcore.driver import Capability, Failover, Inventory, Site, SiteStatus, Source, Target
from asrcore.remote.calls import CLOCK
from asrcore.remote.client.peer import DialledLinks, Peer
from asrcore.remote.client.source import RemoteInventory, RemoteSource
from asrcore.remote.client.target import RemoteFailover, RemoteTarget

__all__ = ["RemoteSite"]


class RemoteSite(Site):
    """See `Site`. The roles are queried again with each `status`."""

    def __init__(self, name: str, links: DialledLinks) -> None:
        """The site closes the links."""
        self.name = name
        self.driver = "remote"
        self._links = links
        self._peer = Peer(name, links)
        self._capabilities: frozenset[Capability] | None = None

    def status(self) -> SiteStatus:
        """See `Site.status`: of the other side's driver, and who serves it."""
        asked = time.time()
        status: SiteStatus = self._peer.plain("site.status")
        answered = time.time()
        self._capabilities = status.capabilities
        channel = self._links.channel()
        served = {"served by": f"{channel.component} at {channel.peer}"}
        if (reported := channel.about.get("version")) is not None:
            served["served by version"] = str(reported)
        details = {**status.details, **served}
        skew = _skew(details.pop(CLOCK, ""), (asked + answered) / 2)
        return attrs.evolve(status, details=details, skew=skew)

    def _need(self, capability: Capability, operation: str) -> None:
        known = self._capabilities or self.status().capabilities
        if capability not in known:
            raise self._unsupported(operation)

    @property
    def inventory(self) -> Inventory:
        """See `Site.inventory`."""
        return RemoteInventory(self._peer)

    @property
    def source(self) -> Source:
        """See `Site.source`."""
        self._need(Capability.SOURCE, "be a source")
        return RemoteSource(self._peer)

    @property
    def target(self) -> Target:
        """See `Site.target`."""
        self._need(Capability.TARGET, "be a target")
        return RemoteTarget(self._peer)

    @property
    def failover(self) -> Failover:
        """See `Site.failover`."""
        self._need(Capability.FAILOVER, "run replicas")
        return RemoteFailover(self._peer)

    def close(self) -> None:
        """See `Site.close`."""
        self._links.close()


def _skew(reported: str, now: float) -> float | None:
    """Seconds by which the other side's clock is ahead; None from a peer that does not report its time."""
    try:
        there = float(reported)
    except ValueError:
        return None
    return there - now if math.isfinite(there) else None
