"""The parts of the conformance kit that concern a target, on both kinds of replicas.

The kit for all roles runs inside a lab site; this one only needs a libvirt that answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asr_driver_libvirt.driver import LibvirtDriver
from asr_driver_libvirt.site import LibvirtSite
from asr_storage.replica.replica import FileReplica
from asr_storage.replica.store import ReplicaKind
from asrcore.driver import Closing, Site
from asrcore.testing.conformance import ConformanceRig, CycleConformance, PointConformance
from asrcore.units import MiB
from tests.lab import Lab

pytestmark = [pytest.mark.system]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("drv-target-kit") as made:
        yield made


class TargetRig(ConformanceRig):
    """A small file system of one kind; site b's libvirt answers."""

    driver = LibvirtDriver()
    machine_id = "none"

    def __init__(self, uri: str, mount: Path, tools: Any) -> None:
        super().__init__()
        self._settings = {"uri": uri, "replica_dir": str(mount)}
        self._mount, self._tools = mount, tools
        self._site = LibvirtDriver().connect("b", self._settings)

    @property
    def source_site(self) -> Site | None:
        return None

    @property
    def target_site(self) -> LibvirtSite:
        return self._site

    def restart(self) -> None:
        self._site = LibvirtDriver().connect("b", self._settings)

    def abandon(self, handle: Closing) -> None:
        handle.close()  # flushes nothing: the lock is released, as when the process dies

    @contextlib.contextmanager
    def full_target(self) -> Iterator[None]:
        ballast = self._tools.fill(self._mount, MiB)
        try:
            yield
        finally:
            ballast.unlink()

    def damage_point(self, replica_id: str, point_id: str, disk_id: str, offset: int) -> None:
        replica = self.target_site.target.replica(replica_id)
        assert isinstance(replica, FileReplica)
        point = replica.home.load().point(point_id)
        assert point is not None
        image = replica.home.path / point.images[disk_id]
        assert image.suffix == ".raw"  # a clone, or the base of a chain
        with image.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 0x20]))

    @contextlib.contextmanager
    def read_only_target(self) -> Iterator[None]:
        self._tools.run("mount", "-o", "remount,ro", self._mount)
        try:
            yield
        finally:
            self._tools.run("mount", "-o", "remount,rw", self._mount)


def rig_of(kind: ReplicaKind, lab: Lab, directory: Path, tools: Any) -> Iterator[TargetRig]:
    with tools.small_file_system(directory, kind) as mount, TargetRig(lab.uri("b"), mount, tools) as rig:
        yield rig


class TestReflink(CycleConformance, PointConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, lab: Lab, tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[ConformanceRig]:
        yield from rig_of(ReplicaKind.REFLINK, lab, tmp_path_factory.mktemp("kit"), tools)


class TestChain(CycleConformance, PointConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, lab: Lab, tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[ConformanceRig]:
        yield from rig_of(ReplicaKind.CHAIN, lab, tmp_path_factory.mktemp("kit"), tools)
