"""What all work needs: the vault, connected sites, the clock, plug-ins, and the locks of machines."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from asrcore.model.policy import Policy
from asrcore.model.protection import Site
from asrcore.replication.aging import Aging
from asrcore.replication.locks import MachineLocks
from asrcore.replication.throttle import Throttle
from asrcore.vault import Vault

if TYPE_CHECKING:
    from asrcore import driver
    from asrcore.plugins import Plugins

__all__ = ["Context", "host_uptime"]

_log = logging.getLogger(__name__)


def host_uptime() -> float:
    """Seconds since this host started, those that it was suspended included where the platform counts them: they have
    passed for recovery points, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Context:
    """Shared by everything that an engine runs. `clock` gives seconds since the epoch; `elapsed` counts seconds from an
    arbitrary beginning and is never set: by it everything is waited for.

    `plugins`: by default the installed ones, loaded when they are first needed.
    """

    def __init__(
        self,
        vault: Vault,
        plugins: Plugins | None = None,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = host_uptime,
    ) -> None:
        self.vault = vault
        self.clock = clock
        self.elapsed = elapsed
        self.aging = Aging(vault, lambda: (self.clock(), self.elapsed()))
        self.locks = MachineLocks()
        # Quarantines under way, by machine: the site and machine, and whether it is to be started again if the machine
        # was given back before the quarantine arrived.
        self.fencing: dict[str, tuple[tuple[str, str], bool]] = {}
        self.found_at_target: dict[str, tuple[object, float]] = {}  # see `agreement`: what was found, and since when
        self._plugins = plugins
        self._loading = threading.Lock()
        self._lock = threading.Lock()
        self._sites: dict[str, tuple[Site, driver.Site]] = {}
        self._connecting: dict[str, threading.Lock] = {}
        self._throttles: dict[str, Throttle] = {}

    @property
    def plugins(self) -> Plugins:
        """The plug-ins in use, drivers among them."""
        from asrcore import plugins  # noqa: PLC0415 - looking at a vault needs no driver, and not what drivers import

        with self._loading:
            if self._plugins is None:
                self._plugins = plugins.load()
            return self._plugins

    def site(self, name: str) -> driver.Site:
        """The connected site; connects at first use and when its settings were changed, by any process.

        Raises what `Driver.connect` raises, NotFound.
        """
        record = self.vault.site(name)
        with self._lock:
            known = self._sites.get(name)
            if known is not None and known[0] == record:
                return known[1]
            connecting = self._connecting.setdefault(name, threading.Lock())
        with connecting:  # a site that does not answer must not block the others
            with self._lock:
                known = self._sites.get(name)
            if known is not None and known[0] == record:
                return known[1]
            site = self.plugins.connect(record.driver, name, record.settings)
            with self._lock:
                self._sites[name] = (record, site)
        if known is not None:
            known[1].close()
        return site

    def throttle(self, policy: Policy) -> Throttle:
        """What all machines of a policy send through, with the policy's rules as they are now."""
        with self._lock:
            throttle = self._throttles.setdefault(policy.name, Throttle(self.clock))
            throttle.rules = policy.bandwidth
        return throttle

    def forget_site(self, name: str) -> None:
        """Close the connection, if there is one; the next use connects again."""
        with self._lock:
            known = self._sites.pop(name, None)
        if known is not None:
            known[1].close()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            sites = [site for _, site in self._sites.values()]
            self._sites.clear()
        for site in sites:
            try:
                site.close()
            except Exception as problem:  # noqa: BLE001 - the others are closed all the same
                _log.warning("closing site %s: %s", site.name, problem)
