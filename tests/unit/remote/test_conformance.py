"""The conformance kit over the wire: both sites are served by separate processes, and killed with the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asrcore.remote import RemoteDriver
from asrcore.testing.conformance import DriverConformance
from asrcore.testing.conformance.memory_rig import MemoryRig
from asrcore.testing.memory import MemoryWorld
from tests.certificates import Authority
from tests.unit.remote.serving import Served


class RemoteRig(MemoryRig):
    """The rig of the memory driver, whose worlds are directories, with the wire between them and the engine."""

    def __init__(self, directory: Path, name: str, *, holds_still: bool = True) -> None:
        self._directory = directory
        authority = Authority()
        self._serving = authority.issue(directory / "target", "master-target")
        self._engine = authority.issue(directory / "engine", "process-server")
        self._served: list[Served] = []
        super().__init__(name, holds_still=holds_still)

    def make_world(self, name: str) -> MemoryWorld:
        return MemoryWorld(name, path=self._directory / name)

    def _connect(self) -> None:
        for served in self._served:
            served.kill()
        if self._served:
            for served in self._served:
                served.start()
        else:
            self._served = [
                Served(world.name, self._directory / world.name, self._serving) for world in (self.home, self.away)
            ]
        self._remote = RemoteDriver()
        sites = [
            self._remote.connect(name, {"address": served.address, "identity": str(self._engine)})
            for name, served in zip(("home", "away"), self._served, strict=True)
        ]
        self._source, self._target = sites
        self.driver = self._remote

    def close(self) -> None:
        super().close()
        for site in (self._source, self._target):
            site.close()
        for served in self._served:
            assert served.stop() == 0


class TestRemoteDriver(DriverConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteRig]:
        with RemoteRig(tmp_path_factory.mktemp("remote"), "remote") as rig:
            yield rig


class TestRemoteDriverWithoutSnapshots(DriverConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteRig]:
        with RemoteRig(tmp_path_factory.mktemp("live"), "remote-live", holds_still=False) as rig:
            yield rig
