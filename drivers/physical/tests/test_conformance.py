"""The conformance kit on a server of loop devices with its real agent; replicas in the memory driver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from asr_driver_physical.driver import PhysicalDriver
from asrcore.driver import Site
from asrcore.model.point import Consistency
from asrcore.testing.conformance import (
    ConformanceRig,
    ReplicationConformance,
    SiteConformance,
    SourceConformance,
    TrackingConformance,
)
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.units import MiB
from drivers.physical.tests.rig import LoopServer

pytestmark = pytest.mark.system


class LoopRig(ConformanceRig):
    """The server is the source, a world of the memory driver the target.

    It does not support `discard`: the content of a discarded range depends on the disk, so it is read.
    """

    consistency = Consistency.FILESYSTEM

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.driver = PhysicalDriver()
        self.server = LoopServer(root, size=12 * MiB)
        self.shared.callback(self.server.close)
        self.server.start()
        self.machine_id = self.server.machine_id
        self._away = MemoryWorld(f"away-{root.name}")
        self._target: Site = MemoryDriver().connect("away", {"world": self._away.name})
        self._changes = 0

    @property
    def source_site(self) -> Site:
        return self.server.site

    @property
    def target_site(self) -> Site:
        return self._target

    def restart(self) -> None:
        # A killed process loses its lock, port and connections, but not its spool.
        self.server.site.servers.gateway.close()
        self._away.crash()
        self.server.site = self.server.connect()
        self._target = MemoryDriver().connect("away", {"world": self._away.name})

    def change(self, machine_id: str) -> None:
        self._changes += 1
        for disk_id in self.server.loops:
            self.server.write(disk_id, f"change{self._changes % 3}", 9_000 + 512 * self._changes)

    def still(self, machine_id: str) -> AbstractContextManager[None]:
        return nullcontext()  # it writes in `change` only

    def sha256(self, machine_id: str, disk_id: str) -> str:
        return self.server.sha256(disk_id)

    def lose_tracking(self, machine_id: str) -> None:
        self.server.lose_tracking()

    def leftovers(self, machine_id: str) -> list[str]:
        spool = self.server.site.settings.spool
        found = [str(path.relative_to(spool)) for path in spool.glob("*/*")]
        return found + [path.name for path in Path(self.server.pins).glob("*")]

    def add_disk(self, machine_id: str) -> str:
        self.server.add_disk("vdc", 8 * MiB)
        return "vdc"

    def replace_disk(self, machine_id: str, disk_id: str) -> None:
        self.server.remove_disk(disk_id)
        self.server.add_disk(disk_id, 8 * MiB)
        self.server.write(disk_id, "other", 50_000)

    def grow_disk(self, machine_id: str, disk_id: str) -> None:
        self.server.grow_disk(disk_id, 10 * MiB)

    def remove_disk(self, machine_id: str, disk_id: str) -> None:
        self.server.remove_disk(disk_id)

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"vda": 12 * MiB, "vdb": 12 * MiB}


class TestPhysical(SiteConformance, SourceConformance, TrackingConformance, ReplicationConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopRig]:
        with LoopRig(tmp_path_factory.mktemp("physical")) as rig:
            yield rig
