"""Replica directories on real file systems, and the expected content of a replica."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest

from asr_driver_libvirt.failover.failover import LibvirtFailover
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.site import LibvirtSite
from asr_driver_libvirt.target.target import LibvirtTarget
from asr_storage.replica.store import ReplicaKind
from asrcore.driver import CycleSpec, Replica, ReplicaSpec, SealSpec, StoredPoint, page_buffer
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from tests.lab import mounted

KIB, MIB = 1024, 1024 * 1024
FILE_SYSTEM = {ReplicaKind.REFLINK: "xfs", ReplicaKind.CHAIN: "ext4"}


def run(*command: str | Path) -> None:
    """Run a command with a time limit; its output is in the error."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


@pytest.fixture(scope="session")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[ReplicaKind, Path]]:
    """A file system of either kind, large enough for all tests."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    directory = tmp_path_factory.mktemp("replicas")
    with mounted(directory, "xfs", 1024 * MIB) as xfs, mounted(directory, "ext4", 512 * MIB) as ext4:
        yield {ReplicaKind.REFLINK: xfs, ReplicaKind.CHAIN: ext4}


@pytest.fixture(params=list(ReplicaKind), ids=lambda kind: kind.value)
def kind(request: pytest.FixtureRequest) -> ReplicaKind:
    """Both kinds in turn."""
    result: ReplicaKind = request.param
    return result


_numbers = iter(range(1, 1_000_000))


@pytest.fixture
def replica_dir(file_systems: dict[ReplicaKind, Path], kind: ReplicaKind) -> Iterator[Path]:
    """An empty replica directory of that kind."""
    directory = file_systems[kind] / f"test{next(_numbers)}"
    directory.mkdir()
    yield directory
    run("rm", "-rf", directory)


@contextlib.contextmanager
def small_file_system(directory: Path, kind: ReplicaKind) -> Iterator[Path]:
    """A small file system on which replicas are of that kind, all of it a replica directory."""
    sizes = {ReplicaKind.REFLINK: 320 * MIB, ReplicaKind.CHAIN: 64 * MIB}  # mkfs.xfs refuses less than 300 MiB
    with mounted(directory, FILE_SYSTEM[kind], sizes[kind]) as mount:
        yield mount


@pytest.fixture
def small(tmp_path: Path, kind: ReplicaKind) -> Iterator[Path]:
    """A small file system of that kind."""
    with small_file_system(tmp_path, kind) as mount:
        yield mount


def fill(directory: Path, leave: int) -> Path:
    """Fill the file system except for this many bytes."""
    path = directory / "ballast"
    step = 4 * MIB
    with path.open("wb") as file:
        length = 0
        while step >= 4096:
            status = os.statvfs(directory)
            step = min(step, (status.f_bavail * status.f_frsize - leave) // 4096 * 4096)
            try:
                if step:
                    os.posix_fallocate(file.fileno(), length, step)
                    length += step
            except OSError as problem:
                if problem.errno != errno.ENOSPC:
                    raise
                step //= 2  # the file system reserves some space
    return path


def site_at(replica_dir: Path) -> LibvirtSite:
    """A site that is not connected: the target role needs no libvirt for its work on files."""
    return LibvirtSite("b", SiteSettings.parse({"uri": "qemu:///system", "replica_dir": str(replica_dir)}))


def target_at(replica_dir: Path) -> LibvirtTarget:
    """The target role alone, with access to its internals."""
    host = LibvirtHost("b", SiteSettings.parse({"uri": "qemu:///system", "replica_dir": str(replica_dir)}))
    return LibvirtTarget(host, LibvirtFailover(host))


def machine(disks: dict[str, int]) -> Description:
    """A described machine with these disks."""
    described = tuple(Disk(disk_id, size) for disk_id, size in disks.items())
    return Description(Machine("5f1c", "web", 1, 64 * MIB, Firmware.BIOS, described), "libvirt")


@attrs.define
class Bench:
    """A replica under test with its expected content."""

    target: LibvirtTarget
    replica: Replica
    disks: dict[str, int]
    head: dict[str, bytearray] = attrs.field(factory=dict)
    points: dict[str, dict[str, bytes]] = attrs.field(factory=dict)
    number: int = 0

    @classmethod
    def make(cls, replica_dir: Path, disks: dict[str, int], replica_id: str = "r1") -> Bench:
        """A new replica."""
        target = target_at(replica_dir)
        spec = ReplicaSpec(replica_id, "web", 1, machine(disks))
        replica = target.create_replica(spec, Watch())
        return cls(target, replica, dict(disks), {disk_id: bytearray(size) for disk_id, size in disks.items()})

    def spec(self, cycle_id: str | None = None) -> CycleSpec:
        """The specification of a cycle on the present head."""
        self.number += cycle_id is None
        info = self.replica.info()
        return CycleSpec(cycle_id or f"c{self.number}", info.epoch, info.head, self.disks)

    def seal_spec(self, *, keep: bool, point_id: str | None = None) -> SealSpec:
        """The specification of the present cycle's seal."""
        description = machine(self.disks)
        return SealSpec(
            f"p{self.number}" if point_id is None else point_id,
            float(self.number),
            Consistency.CRASH,
            keep,
            description,
        )

    def cycle(self, writes: list[tuple[str, int, bytes]], *, keep: bool = True) -> StoredPoint:
        """A whole cycle; empty bytes would do nothing, so zeroes are given as bytes of zeroes."""
        with self.replica.open_cycle(self.spec()) as writer:
            for disk_id, offset, data in writes:
                if any(data):
                    writer.write(disk_id, offset, memoryview(data))
                else:
                    writer.zero(disk_id, offset, len(data))
                self.head[disk_id][offset : offset + len(data)] = data
            point = writer.seal(self.seal_spec(keep=keep))
        self.sealed(point)
        return point

    def sealed(self, point: StoredPoint) -> None:
        """Record a point."""
        infos = {stored.id for stored in self.replica.info().points}
        self.points = {name: content for name, content in self.points.items() if name in infos}
        self.points[point.id] = {disk_id: bytes(self.head[disk_id]) for disk_id in point.disks}

    def check(self) -> None:
        """Check that all points and the head have the expected content, byte by byte."""
        assert [point.id for point in self.replica.info().points] == list(self.points)
        for point_id, disks in self.points.items():
            for disk_id, content in disks.items():
                assert read(self.replica, disk_id, len(content), point_id) == content, (point_id, disk_id)
        if self.points:
            for disk_id, content in list(self.points.values())[-1].items():
                assert read(self.replica, disk_id, len(content), None) == content, ("head", disk_id)


def read(replica: Replica, disk_id: str, size: int, point_id: str | None = None) -> bytes:
    """Read a whole disk as comparisons do."""
    with replica.reader(disk_id, point_id) as reader, page_buffer(size) as buffer:
        reader.read_into(0, buffer)
        return bytes(buffer)


@pytest.fixture
def bench() -> Callable[..., Bench]:
    """Makes replicas under test."""
    return Bench.make


@pytest.fixture(scope="session")
def tools() -> ModuleType:
    """This module, because tests cannot import their neighbours by name."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def drive() -> Any:
    """The module drive.py."""
    spec = importlib.util.spec_from_file_location("drive", Path(__file__).with_name("drive.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
