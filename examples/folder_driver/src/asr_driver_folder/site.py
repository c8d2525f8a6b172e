"""The driver, and its connection to one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from asr_driver_folder.failover import FolderFailover
from asr_driver_folder.inventory import FolderInventory
from asr_driver_folder.place import Place
from asr_driver_folder.source import FolderSource
from asr_driver_folder.target import FolderTarget
from asrcore.driver import API, Capability, Driver, DriverInfo, Setting, Site, SiteStatus
from asrcore.errors import InvalidSetting

__all__ = ["FolderDriver", "FolderSite"]


class FolderDriver(Driver):
    """See `Driver`. GROUPS is not offered: a view is of one machine."""

    info = DriverInfo(
        name="folder",
        title="Disk images in folders",
        version="0.1.0",
        api=API,
        capabilities=frozenset(Capability) - {Capability.GROUPS},
        settings=(Setting("path", "folder with a subfolder for each machine", required=True),),
    )

    def connect(self, name: str, settings: Mapping[str, str]) -> FolderSite:
        if not settings.get("path"):
            raise InvalidSetting(driver="folder", setting="path", problem="is required")
        site = FolderSite(Place(name, Path(settings["path"])))
        site.status()
        return site


class FolderSite(Site):
    """See `Site`. The roles are made when they are asked for; nothing is held that would have to be closed."""

    driver = "folder"

    def __init__(self, place: Place) -> None:
        self.name = place.name
        self._place = place

    def status(self) -> SiteStatus:
        self._place.check()
        return SiteStatus(FolderDriver.info.version, FolderDriver.info.capabilities, {"folder": str(self._place.path)})

    @property
    def inventory(self) -> FolderInventory:
        return FolderInventory(self._place)

    @property
    def source(self) -> FolderSource:
        return FolderSource(self.inventory)

    @property
    def target(self) -> FolderTarget:
        return FolderTarget(self.inventory)

    @property
    def failover(self) -> FolderFailover:
        return FolderFailover(self.target)
