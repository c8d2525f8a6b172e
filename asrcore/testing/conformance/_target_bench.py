"""A replica that the kit fills without a source, with the content that every point must have."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

import attrs
import pytest

from asrcore.driver import (
    CycleSpec,
    CycleWriter,
    DiskReader,
    Replica,
    ReplicaSpec,
    SealSpec,
    StoredPoint,
    Target,
    digests_of,
)
from asrcore.model.extent import Extent
from asrcore.model.machine import Artifact, Description, Disk, Firmware, Machine, Nic
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.testing.conformance._base import new_id, target_of
from asrcore.testing.conformance.copying import differences, replica_fingerprint
from asrcore.testing.conformance.rig import ConformanceRig
from asrcore.units import KiB, MiB

__all__ = ["Call", "Data", "Same", "TargetBench", "Zero", "noise"]

_random = random.Random(20261123)
_pool = _random.randbytes(8 * MiB)


def noise(length: int) -> bytes:
    """Bytes without zero blocks that do not compress; at most 4 MiB."""
    start = _random.randrange(len(_pool) - length)
    return _pool[start : start + length]


@attrs.frozen
class Call:
    """A call of a writer."""

    disk: str
    offset: int


@attrs.frozen
class Data(Call):
    """A `write`."""

    data: bytes = attrs.field(repr=lambda data: f"<{len(data)} bytes>")


@attrs.frozen
class Zero(Call):
    """A `zero`."""

    length: int


@attrs.frozen
class Same(Call):
    """A `same`."""

    length: int


class TargetBench:
    """One replica. `head`: content of its disks as the calls should have made it. `expected`: for each sealed point,
    digests of that by disk."""

    def __init__(self, rig: ConformanceRig, *, seed_machine: str | None = None) -> None:
        self.rig = rig
        self.id = new_id("replica")
        self.epoch = 1
        self.sizes = dict(rig.disk_sizes)
        self.first, self.second = self.sizes
        self.expected: dict[str, dict[str, bytes]] = {}
        self.descriptions: dict[str, Description] = {}
        self.head = {disk_id: bytes(size) for disk_id, size in self.sizes.items()}
        self.spec = ReplicaSpec(self.id, "conformance", 1, self.description("created"), seed_machine)
        self.target.create_replica(self.spec, Watch())

    @property
    def target(self) -> Target:
        """Of the connection of now."""
        return target_of(self.rig).target

    @property
    def replica(self) -> Replica:
        """Of the connection of now."""
        return self.target.replica(self.id)

    @property
    def points(self) -> list[str]:
        """Ids of the points, oldest first."""
        return [point.id for point in self.replica.info().points]

    def description(self, note: str, sizes: Mapping[str, int] | None = None) -> Description:
        """Of a machine with these disks; each note makes a different one, in neutral values and artifacts."""
        disks = tuple(Disk(disk_id, size) for disk_id, size in (sizes or self.sizes).items())
        nics = (Nic("52:54:00:00:00:01", "lan"),)
        machine = Machine(self.id, f"conformance {note}", 1, 64 * MiB, Firmware.BIOS, disks, nics)
        return Description(machine, "conformance", (Artifact("note", note.encode() + bytes(range(256))),))

    def cycle_spec(self, cycle_id: str, sizes: Mapping[str, int] | None = None) -> CycleSpec:
        """On top of what the replica has."""
        return CycleSpec(cycle_id, self.epoch, self.replica.info().head, dict(sizes or self.sizes))

    def open(self, cycle_id: str, sizes: Mapping[str, int] | None = None) -> CycleWriter:
        """A writer for the cycle."""
        return self.replica.open_cycle(self.cycle_spec(cycle_id, sizes))

    def seal_spec(self, point_id: str, *, keep: bool = True, sizes: Mapping[str, int] | None = None) -> SealSpec:
        """Of a point whose values differ from those of all others."""
        number = len(self.descriptions) + 1
        description = self.description(point_id, sizes)
        return SealSpec(point_id, 1000.0 + number, Consistency.FILESYSTEM, keep, description)

    def send(self, writer: CycleWriter, calls: Iterable[Call]) -> None:
        """Make the calls."""
        for call in calls:
            match call:
                case Data(disk, offset, data):
                    writer.write(disk, offset, memoryview(data))
                case Zero(disk, offset, length):
                    writer.zero(disk, offset, length)
                case Same(disk, offset, length):
                    writer.same(disk, offset, length)

    def content_after(self, calls: Iterable[Call], sizes: Mapping[str, int] | None = None) -> dict[str, bytes]:
        """Content of the disks once the calls are applied to the head: for each byte the last call counts."""
        result = {}
        for disk_id, size in (sizes or self.sizes).items():
            base = self.head.get(disk_id, b"").ljust(size, b"\0")[:size]
            mine = [call for call in calls if call.disk == disk_id]
            content = bytearray(base)
            for call in mine:
                match call:
                    case Data(_, offset, data):
                        content[offset : offset + len(data)] = data
                    case Zero(_, offset, length):
                        content[offset : offset + length] = bytes(length)
                    case Same(_, offset, length):
                        content[offset : offset + length] = base[offset : offset + length]
            result[disk_id] = bytes(content) if mine else base
        return result

    def seal(
        self,
        writer: CycleWriter,
        point_id: str,
        calls: Iterable[Call],
        *,
        keep: bool = True,
        sizes: Mapping[str, int] | None = None,
    ) -> StoredPoint:
        """Seal a cycle to which these calls were made, in this or an earlier session."""
        spec = self.seal_spec(point_id, keep=keep, sizes=sizes)
        point = writer.seal(spec)
        if keep and not point.kept and self.expected:
            pytest.skip(f"the target holds no more than {len(self.expected)} kept points")
        self.head = self.content_after(calls, sizes)
        self.expected[point_id] = {
            disk_id: digests_of(_Bytes(content), Extent(0, len(content))) for disk_id, content in self.head.items()
        }
        self.descriptions[point_id] = spec.description
        return point

    def cycle(
        self,
        point_id: str,
        *calls: Call,
        keep: bool = True,
        sizes: Mapping[str, int] | None = None,
    ) -> StoredPoint:
        """A whole cycle."""
        with self.open(f"cycle-{point_id}", sizes) as writer:
            self.send(writer, calls)
            return self.seal(writer, point_id, calls, keep=keep, sizes=sizes)

    def first_points(self, *point_ids: str) -> None:
        """A kept point for each id; each changes both disks, in part where the one before it did."""
        for index, point_id in enumerate(point_ids):
            self.cycle(
                point_id,
                Data(self.first, index * 128 * KiB, noise(256 * KiB)),
                Data(self.first, 2 * MiB, noise(4 * KiB)),
                Data(self.second, 512 * KiB, noise(64 * KiB)),
            )

    def check(self, *point_ids: str) -> None:
        """Assert that points, by default all that the replica has, hold what was sent, byte for byte."""
        for point_id in point_ids or self.points:
            self._compare(point_id, self.expected[point_id], point_id)

    def check_head(self) -> None:
        """Assert that the head, read without naming a point, is the newest point."""
        self._compare("head", {disk_id: self.digests(disk_id) for disk_id in self.head}, None)

    def _compare(self, name: str, expected: Mapping[str, bytes], point_id: str | None) -> None:
        replica = self.replica
        info = replica.info()
        sizes = info.disks if point_id is None else next(item.disks for item in info.points if item.id == point_id)
        assert sizes.keys() == expected.keys()
        for disk_id, digests in expected.items():
            wrong = differences(replica_fingerprint(replica, disk_id, sizes[disk_id], point_id), digests)
            assert wrong == [], f"{name}, disk {disk_id}: not what was sent, at these offsets"

    def digests(self, disk_id: str, extent: Extent | None = None) -> bytes:
        """What the digests of the head must be, in an extent or in all of the disk."""
        content = self.head[disk_id]
        return digests_of(_Bytes(content), extent or Extent(0, len(content)))

    def close(self) -> None:
        """Delete the replica."""
        if self.id in self.target.replicas():
            self.target.delete_replica(self.id, max(self.epoch, self.replica.info().epoch))


class _Bytes(DiskReader):
    """A reader of bytes, for `digests_of`."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._content[offset : offset + len(buffer)]
