"""A cycle, written straight into the page blobs.

The blobs are the journal; the head is their newest snapshot, which is immutable. The differences of a blob from the
head are known at any time: requested from Azure when a cycle opens, and updated by each call. So an interrupted cycle
resumes without sending again what was acknowledged, and what it does not cover in the end is restored from the head.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import attrs

from asr_driver_azure.blobs.container import Container, Known
from asr_driver_azure.blobs.pageblob import MOST, Fenced, PageBlob
from asr_driver_azure.blobs.ranges import RangeSet
from asr_driver_azure.blobs.record import DiskAt, Point, Record, Snapshot, cycle_index, description_of, lease_of
from asr_driver_azure.blobs.uploader import Uploader
from asrcore import codec
from asrcore.crashpoint import reach
from asrcore.driver import CycleSpec, CycleWriter, SealSpec, StoredPoint
from asrcore.errors import AsrError, SiteUnreachable, StaleEpoch, WrongState
from asrcore.model.extent import Extent, normalise, split, total

__all__ = ["AzureWriter", "OpenDisk", "begin_index", "read_index"]

_LINE = 3 * 1024 * 1024  # an append block holds 4 MiB


@attrs.define
class OpenDisk:
    """A disk of the cycle. `sequence`: what this writer's puts name. `head`: the disk in the head, if it is there.

    `dirty`: where the blob differs from the head. `torn`: the part of it that this cycle has not acknowledged.
    `closed`: its puts are refused.
    """

    blob: PageBlob
    size: int
    sequence: int
    head: PageBlob | None
    head_size: int
    dirty: RangeSet
    torn: RangeSet = attrs.field(factory=RangeSet)
    stored: RangeSet | None = None
    head_stored: RangeSet | None = None
    written: RangeSet = attrs.field(factory=RangeSet)
    closed: bool = False
    lock: threading.Lock = attrs.field(factory=threading.Lock)


def read_index(container: Container, replica_id: str, cycle_id: str) -> dict[str, list[Extent]]:
    """What a cycle has acknowledged, by disk."""
    found = container.read(cycle_index(replica_id, cycle_id))
    done: dict[str, list[Extent]] = {}
    for line in (found[0] if found else b"").splitlines():
        for disk_id, ranges in json.loads(line).items():
            done.setdefault(disk_id, []).extend(Extent(offset, length) for offset, length in ranges)
    return {disk_id: normalise(extents) for disk_id, extents in done.items()}


def begin_index(container: Container, replica_id: str, cycle_id: str) -> dict[str, list[Extent]]:
    """The index of a new cycle: nothing has been acknowledged."""
    container.begin(cycle_index(replica_id, cycle_id))
    return {}


class AzureWriter(CycleWriter):
    """See `CycleWriter`."""

    def __init__(
        self,
        container: Container,
        site: str,
        known: Known,
        spec: CycleSpec,
        disks: Mapping[str, OpenDisk],
        done: dict[str, list[Extent]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._container = container
        self._site = site
        self._id = known.record.replica_id
        self._known = known
        self._spec = spec
        self._disks = disks
        self._done = done
        self._clock = clock
        self._lease = lease_of(self._id, spec.epoch)
        self._uploader = Uploader(self._put, container.calls.pacer.parallel)
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._calls: dict[str, list[Extent]] = {}
        self._ended = ""
        self._sealed: StoredPoint | None = None
        self._gone: list[Point] = []

    # -- data

    def done(self, disk_id: str) -> list[Extent]:
        with self._lock:
            return normalise(self._done.get(disk_id, []))

    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        disk = self._checked(disk_id, offset, len(data))
        end = offset + len(data)
        with disk.lock:
            disk.dirty.add(offset, end)
            disk.torn.remove(offset, end)
            disk.written.add(offset, end)
            if disk.stored is not None:
                disk.stored.add(offset, end)
        self._uploader.write(disk_id, offset, data)
        self._note(disk_id, offset, len(data))

    def zero(self, disk_id: str, offset: int, length: int) -> None:
        disk = self._checked(disk_id, offset, length)
        end = offset + length
        self._uploader.forget(disk_id, offset, end)
        with disk.lock:
            # Only what holds data is cleared: a fresh blob needs no request, of a written one nothing is assumed.
            holds = self._stored(disk).within(offset, end)
            if disk.head is None or holds:
                disk.dirty.add(offset, end)
            disk.torn.remove(offset, end)
        if holds:
            self._fenced(lambda: self._clear(disk, holds[0].offset, holds[-1].end))
        self._note(disk_id, offset, length)

    def same(self, disk_id: str, offset: int, length: int) -> None:
        disk = self._checked(disk_id, offset, length)
        end = offset + length
        if disk.head is not None:
            self._uploader.forget(disk_id, offset, end)
            with disk.lock:
                differs = disk.dirty.within(offset, end)
            self._fenced(lambda: self._put_back(disk, differs))
        self._note(disk_id, offset, length)

    def _checked(self, disk_id: str, offset: int, length: int) -> OpenDisk:
        self._check_open()
        disk = self._disks[disk_id]
        if offset < 0 or offset + length > disk.size:
            raise ValueError(f"{offset}+{length} is not within disk {disk_id} of {disk.size} bytes")
        return disk

    def _check_open(self) -> None:
        if self._ended:
            raise self._wrong()

    def _wrong(self) -> WrongState:
        return WrongState(
            machine=self._id,
            event=f"write to cycle {self._spec.cycle_id}",
            state=self._ended or "not in that cycle",
            reason="It was sealed, discarded or closed.",
            possible="open a cycle",
        )

    def _note(self, disk_id: str, offset: int, length: int) -> None:
        with self._lock:
            self._calls.setdefault(disk_id, []).append(Extent(offset, length))

    def _stored(self, disk: OpenDisk) -> RangeSet:
        """Where the blob holds data, asked for once; the disk's lock is held."""
        if disk.stored is None:
            disk.stored = RangeSet(disk.blob.stored(disk.size))
            for extent in disk.written.extents():
                disk.stored.add(extent.offset, extent.end)
        return disk.stored

    def _put(self, disk_id: str, offset: int, data: memoryview) -> None:
        disk = self._disks[disk_id]
        self._fenced(lambda: disk.blob.put(offset, data, self._lease, disk.sequence))
        reach("azure.put")

    def _clear(self, disk: OpenDisk, start: int, end: int) -> None:
        disk.blob.clear(start, end - start, self._lease, disk.sequence)
        with disk.lock:
            if disk.stored is not None:
                disk.stored.remove(start, end)
        reach("azure.cleared")

    def _put_back(self, disk: OpenDisk, extents: list[Extent]) -> None:
        """Restore ranges of the blob from the head."""
        if extents and disk.head_stored is None:
            disk.head_stored = RangeSet(disk.head.stored(disk.head_size) if disk.head is not None else [])
        for extent in extents:
            kept = disk.head_stored.within(extent.offset, extent.end) if disk.head_stored is not None else []
            disk.blob.clear(extent.offset, extent.length, self._lease, disk.sequence)
            for piece in split(kept, MOST):
                assert disk.head is not None
                data = bytearray(piece.length)
                disk.head.read_into(piece.offset, memoryview(data))
                disk.blob.put(piece.offset, bytes(data), self._lease, disk.sequence)
            with disk.lock:
                if disk.stored is not None:
                    disk.stored.remove(extent.offset, extent.end)
                    for piece in kept:
                        disk.stored.add(piece.offset, piece.end)
                disk.dirty.remove(extent.offset, extent.end)
                disk.torn.remove(extent.offset, extent.end)
            reach("azure.put-back")

    def _fenced(self, call: Callable[[], object]) -> None:
        """Raises StaleEpoch where another owner has taken over, WrongState where it was this epoch itself."""
        try:
            call()
        except Fenced as problem:
            record = self._container.record(self._id, self._site)
            if record.epoch > self._spec.epoch:
                raise StaleEpoch(replica=self._id, epoch=self._spec.epoch, owner=record.epoch) from problem
            self._ended = "taken over by another writer"
            raise self._wrong() from problem

    # -- durability

    def flush(self) -> None:
        self._check_open()
        with self._flushing:
            self._acknowledge(self._drained())
        reach("azure.flushed")

    def _drained(self) -> dict[str, list[Extent]]:
        """What has arrived since the last time, by disk."""
        with self._lock:
            calls, self._calls = self._calls, {}
        self._uploader.drain()
        reach("azure.drained")
        return {disk_id: normalise(extents) for disk_id, extents in calls.items()}

    def _acknowledge(self, arrived: Mapping[str, list[Extent]]) -> None:
        for line in _lines(arrived):
            self._container.append(cycle_index(self._id, self._spec.cycle_id), line)
        with self._lock:
            for disk_id, extents in arrived.items():
                self._done[disk_id] = normalise([*self._done.get(disk_id, []), *extents])

    def seal(self, spec: SealSpec) -> StoredPoint:
        if self._sealed is not None and self._sealed.id == spec.point_id:
            return self._sealed
        self._check_open()
        with self._flushing, ThreadPoolExecutor(len(self._disks) + 2, thread_name_prefix="azure-seal") as pool:
            text = codec.dump(spec.description)
            described = pool.submit(self._container.write, description_of(self._id, spec.point_id), text)
            arrived = self._drained()
            # In parallel: after a kill the blobs show the same, and at most some of it is sent again.
            acknowledged = pool.submit(self._acknowledge, arrived)
            for disk in self._disks.values():
                self._fenced(partial(self._put_back, disk, disk.torn.extents()))
            # From here on puts of this or an earlier writer are refused: a late one would be in the next point's blob.
            at = dict(zip(self._disks, pool.map(self._close_blob, self._disks.values()), strict=True))
            reach("azure.closed")
            held = pool.submit(self._held, spec)
            taken = list(pool.map(self._snapshot, self._disks.values()))
            acknowledged.result()
            described.result()
            stored_bytes = held.result()
        reach("azure.described")
        disks = {
            disk_id: Snapshot(disk.blob.name, snapshot, disk.size)
            for (disk_id, disk), snapshot in zip(self._disks.items(), taken, strict=True)
        }
        stored = StoredPoint(
            id=spec.point_id,
            taken_at=spec.taken_at,
            sealed_at=self._clock(),
            consistency=spec.consistency,
            kept=spec.keep,
            pinned=False,
            disks={disk_id: disk.size for disk_id, disk in self._disks.items()},
            held=stored_bytes,
        )

        def commit(record: Record) -> Record:
            record.own(self._spec.epoch)
            if any(point.stored.id == spec.point_id for point in record.points):
                return record  # its answer was lost
            if record.pending is None or record.pending.cycle_id != self._spec.cycle_id:
                raise self._wrong()
            self._gone = [point for point in record.points[-1:] if _gives_way(record, point)]
            points = tuple(point for point in record.points if point not in self._gone)
            return attrs.evolve(record, points=(*points, Point(stored, disks)), disks=at, pending=None)

        record = self._container.change(self._id, self._site, commit, self._known).record
        self._sealed, self._ended = record.point(spec.point_id).stored, "sealed"
        reach("azure.sealed")
        return self._sealed

    def _held(self, spec: SealSpec) -> int | None:
        """What the blobs hold. That is what is billed, and no reason for a point to fail; for a point that is not kept,
        which is frequent, the last known value is enough."""
        head = self._known.record.head
        known = head.stored.held if head is not None else None
        if known is not None and not spec.keep:
            return known
        try:
            return sum(total(disk.blob.stored(disk.size)) for disk in self._disks.values())
        except AsrError:
            return known

    def _close_blob(self, disk: OpenDisk) -> DiskAt:
        def close() -> None:
            number, asked = disk.blob.number(self._lease)
            if number == disk.sequence + 1:
                return
            if asked > 1:  # perhaps only this writer, twice: the reopened cycle finds everything in place
                raise SiteUnreachable(site=self._site, detail=f"an answer was lost on closing {disk.blob.name}")
            raise Fenced("another writer has taken its number")  # and may have written since

        if not disk.closed:  # else by a seal that failed later
            self._fenced(close)
            disk.closed = True
        return DiskAt(disk.blob.name, disk.size, disk.sequence + 1)

    def _snapshot(self, disk: OpenDisk) -> str:
        taken: list[str] = []
        self._fenced(lambda: taken.append(disk.blob.snapshot_now(self._lease)))
        reach("azure.snapshotted")
        return taken[0]

    def _tidy(self) -> None:
        """The next `drop_points` deletes what a failure leaves here."""
        try:
            self._container.delete(cycle_index(self._id, self._spec.cycle_id))
            for point in self._gone:
                for disk in point.disks.values():
                    self._container.delete(disk.blob, disk.snapshot)
                self._container.delete(description_of(self._id, point.stored.id))
        except AsrError:
            return

    def discard(self) -> None:
        def forget(record: Record) -> Record:
            record.own(self._spec.epoch)
            if record.pending is None or record.pending.cycle_id != self._spec.cycle_id:
                return record
            return attrs.evolve(record, pending=None)

        self._uploader.close()
        record = self._container.change(self._id, self._site, forget).record
        self._ended = "discarded"
        reach("azure.discarded")
        self._container.delete(cycle_index(self._id, self._spec.cycle_id))
        for disk in self._disks.values():
            if disk.blob.name not in record.blobs:
                disk.blob.release([self._lease])
                self._container.delete(disk.blob.name)

    def close(self) -> None:
        self._ended = self._ended or "closed"
        self._uploader.close()
        if self._sealed is not None:
            self._tidy()


def _gives_way(record: Record, head: Point) -> bool:
    """Whether the next point takes the place of this head."""
    return not (head.stored.kept or head.stored.pinned or head.stored.id in record.tests.values())


def _lines(extents: Mapping[str, list[Extent]]) -> list[bytes]:
    lines = []
    for disk_id, items in extents.items():
        for start in range(0, len(items), _LINE // 32):
            ranges = [[item.offset, item.length] for item in items[start : start + _LINE // 32]]
            lines.append(json.dumps({disk_id: ranges}).encode() + b"\n")
    return lines
