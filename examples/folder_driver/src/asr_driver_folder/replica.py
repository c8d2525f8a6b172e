"""A replica, and the cycles that write it.

    replica.json        the record: epoch, points, the pending cycle. What it does not name does not exist.
    created/            the disks as they were made, before the first point
    points/ID/          the disks of a point
    cycles/ID/          the pending cycle: what was sent, at the place where it belongs on the disk

A seal builds the disks of the new point from the head's and the cycle's, moves them to `points`, and replaces the
record: that is the commit.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import attrs

from asr_driver_folder import files
from asr_driver_folder.place import Place
from asrcore.crashpoint import reach
from asrcore.driver import CycleSpec, CycleWriter, DiskReader, Promoted, Replica, ReplicaInfo, SealSpec, StoredPoint
from asrcore.errors import (
    MachineBusy,
    PointNotFound,
    ReplicaDamaged,
    ReplicaNotFound,
    ReplicaPromoted,
    StaleBase,
    StaleEpoch,
    WrongCycle,
)
from asrcore.model.extent import Extent, subtract, union
from asrcore.model.machine import Description
from asrcore.model.watch import Watch

__all__ = ["FolderReplica", "FolderWriter", "Record"]


@attrs.frozen
class Log:
    """What a cycle has brought for a disk: ranges of each kind of call. For each byte the last call counts."""

    data: list[Extent] = attrs.field(factory=list)
    zero: list[Extent] = attrs.field(factory=list)
    same: list[Extent] = attrs.field(factory=list)

    def put(self, kind: str, extent: Extent) -> Log:
        """The log with one call more. (For thousands of calls a driver gathers them first.)"""
        others = {name: subtract(getattr(self, name), [extent]) for name in ("data", "zero", "same")}
        return Log(**others | {kind: union(getattr(self, kind), [extent])})


@attrs.define
class Cycle:
    """The pending cycle."""

    id: str
    disks: dict[str, int]
    logs: dict[str, Log]


@attrs.frozen
class Point:
    """A sealed point, and the machine as it was then."""

    stored: StoredPoint
    description: Description


@attrs.define
class Record:
    """What `replica.json` holds. `disks`: sizes of the head's. `promoted`: the point of an uncommitted failover."""

    name: str
    epoch: int
    disks: dict[str, int]
    points: list[Point] = attrs.field(factory=list)
    cycle: Cycle | None = None
    promoted: str | None = None

    @property
    def head(self) -> str | None:
        return self.points[-1].stored.id if self.points else None

    def point(self, point_id: str) -> Point:
        """Raises PointNotFound."""
        for point in self.points:
            if point.stored.id == point_id:
                return point
        raise PointNotFound(machine=self.name, point=point_id)


class FolderReplica(Replica):
    """See `Replica`."""

    def __init__(self, place: Place, replica_id: str) -> None:
        self.place, self.id, self.path = place, replica_id, place.ours("replicas", replica_id)
        self.record()

    def record(self) -> Record:
        """As durable now. Raises ReplicaNotFound."""
        record = files.load(Record, self.path / "replica.json")
        if record is None:
            raise ReplicaNotFound(site=self.place.name, replica=self.id)
        return record

    @contextmanager
    def change(self, epoch: int | None = None) -> Iterator[Record]:
        """The record, to be changed: by one at a time, of all processes, and all of it or nothing.

        Who names an epoch owns the replica from then on. Raises StaleEpoch for one of the time before.
        """
        self.record()
        with self.place.writing(self.path), (self.path / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            record = self.record()
            if epoch is not None and epoch < record.epoch:
                raise StaleEpoch(replica=record.name, epoch=epoch, owner=record.epoch)
            record.epoch = epoch or record.epoch
            yield record
            files.save(self.path / "replica.json", record)
            named = {point.stored.id for point in record.points} | ({record.cycle.id} if record.cycle else set())
            for folder in (*self.path.glob("points/*"), *self.path.glob("cycles/*")):
                if folder.name not in named:
                    shutil.rmtree(folder, ignore_errors=True)

    def disks(self, point_id: str | None = None) -> Path:
        """The folder with the disks of a point, by default the head. Raises PointNotFound."""
        record = self.record()
        wanted = point_id or record.head
        return self.path / "points" / record.point(wanted).stored.id if wanted else self.path / "created"

    def info(self) -> ReplicaInfo:
        record = self.record()
        points = tuple(point.stored for point in record.points)
        pending = record.cycle.id if record.cycle else None
        promoted = None
        if record.promoted is not None:
            promoted = Promoted(record.promoted, record.point(record.promoted).description.machine.id)
        return ReplicaInfo(self.id, record.epoch, record.disks, points, pending, kind="folder", promoted=promoted)

    def raise_epoch(self, epoch: int) -> None:
        with self.change(epoch):
            pass

    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        with self.change(spec.epoch) as record:
            if record.promoted is not None:
                raise ReplicaPromoted(replica=self.id, machine=record.name)
            if spec.base_point != record.head:
                raise StaleBase(replica=record.name, head=record.head, base=spec.base_point)
            if record.cycle is not None and record.cycle.id != spec.cycle_id:
                raise MachineBusy(machine=record.name, work=f"cycle {record.cycle.id}")
            logs = record.cycle.logs if record.cycle else {}
            record.cycle = Cycle(spec.cycle_id, dict(spec.disks), logs)  # disks may have come or grown meanwhile
        return FolderWriter(self, spec, logs)

    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        with self.change(epoch) as record:
            dropped = set(point_ids) - {record.head, record.promoted}
            record.points = [p for p in record.points if p.stored.pinned or p.stored.id not in dropped]

    def pin(self, point_id: str, pinned: bool) -> None:
        with self.change() as record:
            at = record.points.index(point := record.point(point_id))
            record.points[at] = attrs.evolve(point, stored=attrs.evolve(point.stored, pinned=pinned))

    def description(self, point_id: str) -> Description:
        return self.record().point(point_id).description

    def allocated(self, disk_id: str) -> list[Extent]:
        return files.allocated(self.disks() / f"{disk_id}.raw", self.record().disks[disk_id])

    def reader(self, disk_id: str, point_id: str | None = None) -> DiskReader:
        image = self.disks(point_id) / f"{disk_id}.raw"
        return files.FileReader(image, lambda detail: ReplicaDamaged(replica=self.id, detail=detail))


class FolderWriter(CycleWriter):
    """See `CycleWriter`. `durable` is what the record says of the cycle, `logs` what was called so far."""

    def __init__(self, replica: FolderReplica, spec: CycleSpec, logs: dict[str, Log]) -> None:
        self._replica, self._spec, self._folder = replica, spec, replica.path / "cycles" / spec.cycle_id
        self._lock = threading.Lock()
        self._durable, self._logs = logs, dict(logs)
        with self._writing():
            self._folder.mkdir(exist_ok=True)
            mode = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._images = {disk: os.open(self._folder / f"{disk}.raw", mode, 0o600) for disk in spec.disks}

    def _writing(self) -> AbstractContextManager[None]:
        return self._replica.place.writing(self._folder)

    def done(self, disk_id: str) -> list[Extent]:
        log = self._durable.get(disk_id, Log())
        return union(log.data, log.zero, log.same)

    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        with self._writing():
            written = 0
            while written < len(data):
                written += os.pwrite(self._images[disk_id], data[written:], offset + written)
        self._put("data", disk_id, Extent(offset, len(data)))

    def zero(self, disk_id: str, offset: int, length: int) -> None:
        self._put("zero", disk_id, Extent(offset, length))

    def same(self, disk_id: str, offset: int, length: int) -> None:
        self._put("same", disk_id, Extent(offset, length))

    def _put(self, kind: str, disk_id: str, extent: Extent) -> None:
        with self._lock:
            self._logs[disk_id] = self._logs.get(disk_id, Log()).put(kind, extent)

    def flush(self) -> None:
        with self._lock:
            logs = dict(self._logs)  # what is in here now is in the files; others may write on
        with self._writing():
            for image in self._images.values():
                os.fsync(image)
            files.sync(self._folder)
        reach("folder.cycle-written")
        with self._replica.change(self._spec.epoch) as record:
            self._pending(record).logs = logs
        self._durable = logs
        reach("folder.cycle-flushed")

    def _pending(self, record: Record) -> Cycle:
        if record.cycle is None or record.cycle.id != self._spec.cycle_id:
            raise WrongCycle(cycle=self._spec.cycle_id, machine=record.name, detail="it was sealed or discarded")
        return record.cycle

    def seal(self, spec: SealSpec) -> StoredPoint:
        for point in self._replica.info().points:
            if point.id == spec.point_id:
                return point
        self.flush()
        with self._writing():
            made = self._build()
        reach("folder.point-built")
        disks, kept = dict(self._spec.disks), spec.keep
        with self._replica.change(self._spec.epoch) as record:
            self._pending(record)
            self._replica.place.move(made, self._replica.path / "points" / spec.point_id)
            reach("folder.point-placed")
            if record.points and not (record.points[-1].stored.kept or record.points[-1].stored.pinned):
                record.points.pop()  # it was the latest state only
            stored = StoredPoint(spec.point_id, spec.taken_at, time.time(), spec.consistency, kept, False, disks)
            record.points.append(Point(stored, spec.description))
            record.disks, record.cycle = disks, None
        reach("folder.sealed")
        return stored

    def _build(self) -> Path:
        """The disks of the point: what the cycle brought, and for the rest the head's."""
        made, head = self._folder / "point", self._replica.disks()
        shutil.rmtree(made, ignore_errors=True)  # of a seal that was killed
        made.mkdir()
        for disk_id, size in self._spec.disks.items():
            log, former = self._durable.get(disk_id, Log()), head / f"{disk_id}.raw"
            rest = subtract(files.data(former), [*log.data, *log.zero]) if former.exists() else []
            parts = [(self._folder / f"{disk_id}.raw", log.data), (former, rest)]
            files.build(made / f"{disk_id}.raw", size, *(part for part in parts if part[1]))
        files.sync(made)
        return made

    def discard(self) -> None:
        with self._replica.change(self._spec.epoch) as record:
            if record.cycle is not None and record.cycle.id == self._spec.cycle_id:
                record.cycle = None

    def close(self) -> None:
        while self._images:
            os.close(self._images.popitem()[1])
