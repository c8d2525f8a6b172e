"""The driver and its site: settings, connection, and which roles are offered."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from asrcore.driver import (
    API,
    Capability,
    Driver,
    DriverInfo,
    Failover,
    Inventory,
    Setting,
    Site,
    SiteStatus,
    Source,
    Target,
)
from asrcore.errors import AccessDenied, InvalidSetting
from asrcore.testing.memory._failover import MemoryFailover
from asrcore.testing.memory._inventory import MemoryInventory
from asrcore.testing.memory._session import Session
from asrcore.testing.memory._source import MemorySource
from asrcore.testing.memory._target import MemoryTarget
from asrcore.testing.memory.world import MemoryWorld

__all__ = ["MemoryDriver", "MemorySite"]


class MemoryDriver(Driver):
    """Sites are worlds of this process, or of a directory."""

    info = DriverInfo(
        name="memory",
        title="Machines in memory, for tests",
        version=version("asrcore"),
        api=API,
        capabilities=frozenset(Capability),
        settings=(
            Setting("world", "name of the MemoryWorld", required=True),
            Setting("path", "directory that keeps the world, so that several processes see it"),
            Setting("key", "key of the world, if it needs one", secret=True),
        ),
    )

    def connect(self, name: str, settings: Mapping[str, str]) -> MemorySite:
        """See `Driver.connect`."""
        wanted = settings.get("world", "")
        if not wanted:
            raise InvalidSetting(driver="memory", setting="world", problem="it is required")
        world = MemoryWorld.find(wanted)
        if world is None and settings.get("path"):
            world = MemoryWorld(wanted, path=settings["path"])
        if world is None:
            raise InvalidSetting(driver="memory", setting="world", problem=f"there is no world {wanted!r}")
        session = Session(world, name)
        with session.look() as state:
            if state.key and settings.get("key", "") != state.key:
                raise AccessDenied(site=name, detail="the key does not fit")
        return self.site(session)

    def site(self, session: Session) -> MemorySite:
        """A connected site. A variant of the driver gives its own roles here."""
        return MemorySite(session)


class MemorySite(Site):
    """A connection to a world. The roles are separate classes; a variant of the driver replaces some."""

    inventory_type = MemoryInventory
    source_type = MemorySource
    target_type = MemoryTarget
    failover_type = MemoryFailover

    def __init__(self, session: Session) -> None:
        self.name = session.site
        self.driver = "memory"
        self.session = session

    def status(self) -> SiteStatus:
        """See `Site.status`."""
        with self.session.look() as state:
            details = {"world": state.name, "machines": str(len(state.machines))}
            return SiteStatus("1", state.capabilities, details)

    @property
    def inventory(self) -> Inventory:
        """See `Site.inventory`."""
        return self.inventory_type(self.session)

    @property
    def source(self) -> Source:
        """See `Site.source`."""
        self.session.need(Capability.SOURCE, "be a source")
        return self.source_type(self.session)

    @property
    def target(self) -> Target:
        """See `Site.target`."""
        self.session.need(Capability.TARGET, "be a target")
        return self.target_type(self.session)

    @property
    def failover(self) -> Failover:
        """See `Site.failover`."""
        self.session.need(Capability.FAILOVER, "run replicas")
        return self.failover_type(self.session)

    def close(self) -> None:
        """See `Site.close`."""
        self.session.closed = True
