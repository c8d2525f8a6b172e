"""Copying for tests: a frozen view into a replica, either of them into a scratch file, and comparisons.

Written to be simple, not fast; the engine's data path is in `asrcore.replication`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence

import attrs

from asrcore.driver import (
    DIGEST_BLOCK,
    DIGEST_SIZE,
    CycleSpec,
    CycleWriter,
    Digest,
    DiskReader,
    DiskView,
    FrozenView,
    Replica,
    SealSpec,
    StoredPoint,
    Tracking,
    digests_of,
)
from asrcore.model.extent import Extent, split, subtract
from asrcore.units import MiB

__all__ = [
    "Scratch",
    "Sent",
    "delta_copy",
    "differences",
    "fingerprint",
    "full_copy",
    "is_gapless",
    "reads_zero",
    "replica_fingerprint",
    "verify",
]


@attrs.frozen
class Sent:
    """What a copy did, in bytes: `data` written, `zeroed` as zero ranges, `same` compared equal."""

    point: StoredPoint
    data: int
    zeroed: int
    same: int


def full_copy(view: FrozenView, machine_id: str, replica: Replica, point_id: str, *, keep: bool = True) -> Sent:
    """Send all that is allocated and seal a point."""
    plan = {disk_id: disk.allocated() for disk_id, disk in view.machines[machine_id].disks.items()}
    return _copy(view, machine_id, replica, point_id, plan, keep)


def delta_copy(view: FrozenView, machine_id: str, replica: Replica, point_id: str, *, keep: bool = True) -> Sent:
    """Send what the view reports as changed and seal a point; compare where it has no report."""
    at_target = replica.info().disks
    plan: dict[str, list[Extent] | None] = {}
    for disk_id, disk in view.machines[machine_id].disks.items():
        if disk_id not in at_target or disk.tracking is Tracking.NEW:
            plan[disk_id] = disk.allocated()
        elif disk.tracking is Tracking.CHANGED:
            plan[disk_id] = disk.changed()
        else:
            plan[disk_id] = None
    return _copy(view, machine_id, replica, point_id, plan, keep)


def _copy(
    view: FrozenView,
    machine_id: str,
    replica: Replica,
    point_id: str,
    plan: dict[str, list[Extent] | None] | dict[str, list[Extent]],
    keep: bool,
) -> Sent:
    machine = view.machines[machine_id]
    info = replica.info()
    sizes = {disk_id: disk.disk.size for disk_id, disk in machine.disks.items()}
    counts = {"data": 0, "zeroed": 0, "same": 0}
    with replica.open_cycle(CycleSpec(f"cycle-{point_id}", info.epoch, info.head, sizes)) as writer:
        for disk_id, planned in plan.items():
            disk = machine.disks[disk_id]
            extents = planned
            if extents is None:
                size = min(info.disks[disk_id], disk.disk.size) // DIGEST_BLOCK * DIGEST_BLOCK
                different = _compare(disk, replica, size, writer, counts)
                extents = different + subtract(disk.allocated(), [Extent(0, size)])
            _send(disk, writer, extents, counts)
        writer.flush()
        while rounds := {disk: again for disk, again in view.settle().get(machine_id, {}).items() if again}:
            for disk_id, again in rounds.items():
                _send(machine.disks[disk_id], writer, again, counts)
            writer.flush()
        view.confirm()
        spec = SealSpec(point_id, view.taken_at, machine.consistency, keep, machine.description)
        return Sent(writer.seal(spec), **counts)


def _compare(disk: DiskView, replica: Replica, size: int, writer: CycleWriter, counts: dict[str, int]) -> list[Extent]:
    different = []
    for piece in split([Extent(0, size)], MiB):
        found = replica.compare(disk.disk.id, piece, disk.digests(piece), disk.digest)
        for equal in subtract([piece], found):
            writer.same(disk.disk.id, equal.offset, equal.length)
            counts["same"] += equal.length
        different += found
    return different


def _send(disk: DiskView, writer: CycleWriter, extents: Iterable[Extent], counts: dict[str, int]) -> None:
    buffer = bytearray(MiB)
    with disk.reader() as reader:
        for extent in extents:
            if extent.zero:
                writer.zero(disk.disk.id, extent.offset, extent.length)
                counts["zeroed"] += extent.length
                continue
            for piece in split([extent], MiB):
                data = memoryview(buffer)[: piece.length]
                reader.read_into(piece.offset, data)
                writer.write(disk.disk.id, piece.offset, data)
                counts["data"] += piece.length


# -- comparisons ---------------------------------------------------------------------------------------------------


def fingerprint(disk: DiskView, digest: Digest = Digest.BLAKE3) -> bytes:
    """Digests of a frozen disk, every byte read (the driver's own zeroes and digests are not trusted)."""
    with disk.reader() as reader:
        return digests_of(reader, Extent(0, disk.disk.size), digest)


def replica_fingerprint(replica: Replica, disk_id: str, size: int, point_id: str | None = None) -> bytes:
    """The same of a disk of a point, by default the head."""
    with replica.reader(disk_id, point_id) as reader:
        return digests_of(reader, Extent(0, size))


def differences(left: bytes, right: bytes) -> list[int]:
    """Offsets, in bytes, of the blocks whose digests differ; -1 if there are not as many."""
    if len(left) != len(right):
        return [-1]
    return [
        at // DIGEST_SIZE * DIGEST_BLOCK
        for at in range(0, len(left), DIGEST_SIZE)
        if left[at : at + DIGEST_SIZE] != right[at : at + DIGEST_SIZE]
    ]


def verify(view: FrozenView, machine_id: str, replica: Replica, point_id: str | None = None) -> None:
    """Assert that a point, by default the head, equals the frozen machine: disks, sizes, every byte.

    Where the view's disks are not `whole`, the machine must not have written since the view settled.
    """
    disks = view.machines[machine_id].disks
    points = replica.info().points
    point = points[-1] if point_id is None else next(item for item in points if item.id == point_id)
    assert dict(point.disks) == {disk_id: disk.disk.size for disk_id, disk in disks.items()}
    for disk_id, disk in disks.items():
        theirs = replica_fingerprint(replica, disk_id, disk.disk.size, point_id)
        assert differences(fingerprint(disk), theirs) == [], f"disk {disk_id} differs at these offsets"


def is_gapless(extents: Sequence[Extent], size: int) -> bool:
    """Whether the extents are sorted and cover a disk of `size` bytes without gap or overlap."""
    ends = [0, *(item.end for item in extents)]
    return [item.offset for item in extents] == ends[:-1] and ends[-1] == size


def reads_zero(reader: DiskReader, extents: Iterable[Extent]) -> bool:
    """Whether every byte of the extents reads as zero."""
    buffer = bytearray(MiB)
    for piece in split(extents, MiB):
        data = memoryview(buffer)[: piece.length]
        reader.read_into(piece.offset, data)
        if any(data):
            return False
    return True


class Scratch(DiskReader):
    """A disk in a sparse temporary file, to which a delta can be applied."""

    def __init__(self, size: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.resize(size)

    @classmethod
    def of(cls, disk: DiskView) -> Scratch:
        """A copy of a frozen disk, every byte read."""
        scratch = cls(disk.disk.size)
        scratch.update(disk, [Extent(0, disk.disk.size)])
        return scratch

    def resize(self, size: int) -> None:
        """Grow with zeroes, or cut."""
        self.size = size
        self._file.truncate(size)

    def update(self, disk: DiskView, extents: Iterable[Extent]) -> None:
        """Copy these extents of a frozen disk; `zero` extents are trusted, not read."""
        buffer = bytearray(MiB)
        with disk.reader() as reader:
            for piece in split(extents, MiB):
                data = memoryview(buffer)[: piece.length]
                if piece.zero:
                    data[:] = bytes(piece.length)
                else:
                    reader.read_into(piece.offset, data)
                self._file.seek(piece.offset)
                self._file.write(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._file.seek(offset)
        self._file.readinto(buffer)

    def fingerprint(self) -> bytes:
        """As `fingerprint` of a view."""
        return digests_of(self, Extent(0, self.size))

    def close(self) -> None:
        self._file.close()
