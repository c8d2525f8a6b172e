"""The master target: serves a site to engines elsewhere, for as long as it runs."""

from __future__ import annotations

from collections.abc import Collection

from asrcore.driver import Closing, Site
from asrcore.remote.server import SiteServer
from asrcore.wire.carrier import Address, Limits
from asrcore.wire.listener import Listener
from asrcore.wire.tls import Identity, Role

__all__ = ["ENGINES", "MasterTarget"]

ENGINES = frozenset({Role.PROCESS_SERVER, Role.CONFIG_SERVER})
"""Components that run an engine: they may use a served site."""


class MasterTarget(Closing):
    """Serves a connected site from construction until `close`. The caller still owns the site."""

    def __init__(
        self,
        site: Site,
        address: Address,
        identity: Identity,
        *,
        roles: Collection[Role] = ENGINES,
        limits: Limits | None = None,
    ) -> None:
        """Raises CannotListen, IdentityUnusable."""
        self.component = identity.component()
        self._server = SiteServer(site)
        self._listener = Listener(address, identity, roles, self._server, limits=limits, tidy=self._server.tidy)
        self.address = self._listener.address
        """Where it listens; with the port that was chosen for port 0."""
        self._listener.start()

    def close(self) -> None:
        """End all connections and make what has arrived durable; close what was open."""
        self._listener.close()
        self._server.close()
