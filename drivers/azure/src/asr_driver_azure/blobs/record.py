"""What is durably known of a replica: one small blob, changed as a whole under its ETag. Its change is every commit.

replicas/ID/replica.json              the record: epoch, points, the open cycle, tests, promotion
replicas/ID/disks/DISK-CYCLE.vhd      a page blob; its snapshots are what points name
replicas/ID/cycles/CYCLE.index        append blob: what of the open cycle has been acknowledged
replicas/ID/points/POINT.json         description of the machine at a point
machines/MACHINE.json                 the description that a promoted machine was made from
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from urllib.parse import quote

import attrs

from asrcore.driver import StoredPoint
from asrcore.errors import InvalidValue, PointNotFound, StaleEpoch

__all__ = [
    "FORMAT",
    "REPLICAS",
    "DiskAt",
    "Pending",
    "Point",
    "Promotion",
    "Record",
    "Snapshot",
    "checked_id",
    "cycle_index",
    "description_of",
    "disk_blob",
    "lease_of",
    "prefix_of",
    "record_blob",
]

FORMAT = 1
REPLICAS = "replicas/"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LEASES = uuid.UUID("5f0d6f2e-7d0c-4f29-9a3e-64f9bb5f3a10")


@attrs.frozen
class DiskAt:
    """A disk's page blob. `size`: bytes of the disk. `sequence`: the blob's sequence number when it was last equal to
    the head; None before the first point."""

    blob: str
    size: int
    sequence: int | None = None


@attrs.frozen
class Snapshot:
    """A disk of a point: the blob and the time that names its snapshot; `size` in bytes."""

    blob: str
    snapshot: str
    size: int


@attrs.frozen
class Point:
    """A sealed point and its snapshots by disk."""

    stored: StoredPoint
    disks: Mapping[str, Snapshot]


@attrs.frozen
class Pending:
    """The open cycle, and the disks that it writes to."""

    cycle_id: str
    disks: Mapping[str, DiskAt]


@attrs.frozen
class Promotion:
    """A failover that is not committed: the point, the machine's id, and the Azure names of the machine made for it
    and of the one that was put aside (empty: none)."""

    point_id: str
    machine_id: str
    machine: str
    aside: str = ""
    committing: bool = False


@attrs.frozen
class Record:
    """`disks`: those of the head. `leases`: epochs that a disk's lease may stand at; more than one only while a change
    of ownership is under way. `tests`: point by test id. `deleting`: it is being deleted and is ignored."""

    format: int
    replica_id: str
    name: str
    epoch: int
    disks: Mapping[str, DiskAt]
    leases: tuple[int, ...]
    points: tuple[Point, ...] = ()
    pending: Pending | None = None
    tests: Mapping[str, str] = attrs.field(factory=dict)
    promotion: Promotion | None = None
    deleting: bool = False

    @property
    def head(self) -> Point | None:
        """The newest point."""
        return self.points[-1] if self.points else None

    @property
    def head_id(self) -> str | None:
        """Its id."""
        return self.points[-1].stored.id if self.points else None

    def point(self, point_id: str) -> Point:
        """Raises PointNotFound."""
        for point in self.points:
            if point.stored.id == point_id:
                return point
        raise PointNotFound(machine=self.name, point=point_id)

    def own(self, epoch: int) -> None:
        """Raises StaleEpoch for an older one."""
        if epoch < self.epoch:
            raise StaleEpoch(replica=self.replica_id, epoch=epoch, owner=self.epoch)

    @property
    def snapshots(self) -> set[tuple[str, str]]:
        """(blob, snapshot) of all points."""
        return {(disk.blob, disk.snapshot) for point in self.points for disk in point.disks.values()}

    @property
    def blobs(self) -> set[str]:
        """Page blobs that the head, a point or the open cycle needs."""
        used = {disk.blob for disk in self.disks.values()} | {blob for blob, _ in self.snapshots}
        return used | ({disk.blob for disk in self.pending.disks.values()} if self.pending else set())


def checked_id(what: str, value: str) -> str:
    """The value, fit to be part of a blob's name. Raises InvalidValue."""
    if not _ID.fullmatch(value):
        raise InvalidValue(what=what, value=value, wanted="letters, digits, `.`, `_` and `-`, at most 128")
    return value


def prefix_of(replica_id: str) -> str:
    """What the names of all of a replica's blobs begin with."""
    return f"{REPLICAS}{checked_id('replica id', replica_id)}/"


def record_blob(replica_id: str) -> str:
    """Of the record."""
    return prefix_of(replica_id) + "replica.json"


def disk_blob(replica_id: str, disk_id: str, cycle_id: str) -> str:
    """Of a disk that came with a cycle (or with the replica: then `first`)."""
    return f"{prefix_of(replica_id)}disks/{quote(disk_id, safe='')}-{checked_id('cycle id', cycle_id)}.vhd"


def cycle_index(replica_id: str, cycle_id: str) -> str:
    """Of what a cycle has brought so far."""
    return f"{prefix_of(replica_id)}cycles/{checked_id('cycle id', cycle_id)}.index"


def description_of(replica_id: str, point_id: str) -> str:
    """Of a point's description."""
    return f"{prefix_of(replica_id)}points/{checked_id('point id', point_id)}.json"


def lease_of(replica_id: str, epoch: int) -> str:
    """The lease that the owner at this epoch holds on every disk. It follows from the epoch, so a restarted engine has
    it; an older owner is kept out because a lease is only changed from an epoch that the record names as its holder."""
    return str(uuid.uuid5(_LEASES, f"{replica_id}/{epoch}"))
