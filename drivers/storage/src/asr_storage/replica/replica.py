"""A replica and the writer of its cycles: the order of durable steps, the same for both kinds of images.

A cycle's content goes to the journal. The commit record is the durable instant of the point: `seal` returns then. These
steps follow, each repeatable, until the journal is deleted: open_heads, apply, the record, free. `_replay` does them
when the writer is closed, or in the next operation on the replica, also after a crash.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import attrs

from asr_storage.files.errors import missing_space, storage_errors
from asr_storage.replica.chain import ChainImages
from asr_storage.replica.journal import Commit, Cycle, Journal, Kind
from asr_storage.replica.reflink import ReflinkImages
from asr_storage.replica.store import FORMAT, MAX_LAYERS, Home, Images, Point, Record, ReplicaKind, Shared, checked_id
from asrcore.crashpoint import reach
from asrcore.driver import (
    DIGEST_BLOCK,
    CycleSpec,
    CycleWriter,
    Digest,
    DiskReader,
    Replica,
    ReplicaInfo,
    SealSpec,
    StoredPoint,
    digests_of,
    zero_digest,
)
from asrcore.errors import (
    AsrError,
    InvalidValue,
    MachineBusy,
    PointNotFound,
    ReplicaDamaged,
    ReplicaNotFound,
    ReplicaPromoted,
    StaleBase,
    StaleEpoch,
    TargetFull,
)
from asrcore.model.extent import Extent
from asrcore.model.machine import Description
from asrcore.model.watch import Watch
from asrcore.units import MiB

__all__ = ["FileReplica", "checked_disks"]

_log = logging.getLogger(__name__)

# Left free at a seal for metadata: applying what is committed must not fail for lack of space.
_RESERVE = 8 * MiB
_MAX_DISK_ID = 64


def checked_disks(disks: Mapping[str, int]) -> dict[str, int]:
    """The same, fit for files. Raises InvalidValue."""
    for disk_id, size in disks.items():
        if not disk_id or len(disk_id) > _MAX_DISK_ID or not disk_id.isprintable():
            raise InvalidValue(what="disk id", value=disk_id, wanted=f"1 to {_MAX_DISK_ID} printable characters")
        if size < 0:
            raise InvalidValue(what=f"size of disk {disk_id}", value=size, wanted="0 or more bytes")
    return dict(disks)


class FileReplica(Replica):
    """A replica in a directory of this host. Safe to use from several threads; nothing is cached."""

    def __init__(self, site: str, home: Home, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives `sealed_at`, in seconds since the epoch."""
        self.site = site
        self.home = home
        self.replica_id = home.replica_id
        self.shared = Shared.of(home)
        self._clock = clock

    # -- helpers for this package

    @contextlib.contextmanager
    def errors(self, operation: str, wanted: int = 0) -> Iterator[None]:
        """Translate what goes wrong in the replica's directory."""
        try:
            with storage_errors(self.site, self.home.path, operation, wanted):
                yield
        except ValueError as problem:
            raise ReplicaDamaged(replica=self.replica_id, detail=str(problem)) from problem
        except AsrError as problem:
            if not isinstance(problem.__cause__, FileNotFoundError):
                raise
            if not self.home.path.exists():
                raise ReplicaNotFound(site=self.site, replica=self.replica_id) from problem
            raise ReplicaDamaged(replica=self.replica_id, detail=str(problem.__cause__)) from problem

    @contextlib.contextmanager
    def working(self, operation: str) -> Iterator[Record]:
        """Exclusive work on a replica without a half-applied cycle; yields its record."""
        with self.errors(operation), self.shared.working():
            yield self._replay()

    def images(self, record: Record) -> Images:
        """The images, of the replica's kind."""
        kind = ReflinkImages if record.kind is ReplicaKind.REFLINK else ChainImages
        return kind(self.home, self.shared)

    def check_epoch(self, record: Record, epoch: int) -> None:
        """Raises StaleEpoch."""
        if epoch < record.epoch:
            raise StaleEpoch(replica=self.replica_id, epoch=epoch, owner=record.epoch)

    # -- state

    def info(self) -> ReplicaInfo:
        """See Replica. Does not wait for other work unless a sealed cycle is to be applied."""
        with self.errors("reading a replica"):
            record = self._current()
            pending, promoted = Journal.pending(self.home.path), self.home.promoted()
        return ReplicaInfo(
            replica_id=record.replica_id,
            epoch=record.epoch,
            disks=dict(record.disks),
            points=tuple(point.stored for point in record.points),
            pending=pending.id if pending else None,
            kind=record.kind.value,
            promoted=promoted,
        )

    def _current(self) -> Record:
        """The record, without waiting for other work unless a sealed cycle is to be applied."""
        if Journal.is_committed(self.home.path):
            with self.shared.working():
                return self._replay()
        return self.home.load()

    def raise_epoch(self, epoch: int) -> None:
        """See Replica."""
        with self.working("taking ownership of a replica") as record:
            self.check_epoch(record, epoch)
            if epoch > record.epoch:
                self.home.save(attrs.evolve(record, epoch=epoch))

    def description(self, point_id: str) -> Description:
        """See Replica. Raises PointNotFound."""
        with self.errors("reading a point"):
            self._point(self._current(), point_id)
            return self.home.description(point_id)

    def _point(self, record: Record, point_id: str) -> Point:
        point = record.point(point_id)
        if point is None:
            raise PointNotFound(machine=record.name, point=point_id)
        return point

    # -- cycles

    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        """See Replica. Raises MachineBusy while another cycle is pending or another writer is open."""
        disks = checked_disks(spec.disks)
        checked_id("cycle id", spec.cycle_id)
        with self.working("opening a cycle") as found:
            record = found
            self.check_epoch(record, spec.epoch)
            if self.home.promotion.exists():
                raise ReplicaPromoted(replica=self.replica_id, machine=record.name)
            head = record.head.stored.id if record.head else None
            if head != spec.base_point:
                raise StaleBase(replica=self.replica_id, head=head or "nothing", base=spec.base_point or "nothing")
            if self.shared.writer() is not None:
                raise MachineBusy(machine=record.name, work=f"another writer of replica {self.replica_id}")
            pending = Journal.load(self.home.path)
            if pending is not None and pending.cycle.id != spec.cycle_id:
                raise MachineBusy(machine=record.name, work=f"the interrupted cycle {pending.cycle.id}")
            if spec.epoch > record.epoch:
                record = attrs.evolve(record, epoch=spec.epoch)
                self.home.save(record)
            if record.head is None:
                record = self.images(record).open_heads(record, disks)
                record = attrs.evolve(record, disks={**record.disks, **disks})
                self.home.save(record)
            direct = record.head is None
            files = {disk_id: record.heads[disk_id] for disk_id in disks} if direct else {}
            if pending is None:
                cycle = Cycle(spec.cycle_id, spec.epoch, spec.base_point, disks, tuple(disks), direct, files)
                journal = Journal.create(self.home.path, cycle)
            else:
                journal = pending
                journal.resize(disks, spec.epoch, files)
            self.home.fill_reserve()
            headroom = self.images(record).headroom(record)
            reach("target.cycle.opened")
            self.shared.hold()
            beside = partial(self._preserve_ahead, record) if self.images(record).to_preserve(record) else None
            writer = FileCycleWriter(self, journal, headroom, beside)
            self.shared.writer = weakref.ref(writer)
            return writer

    def _preserve_ahead(self, record: Record) -> None:
        try:
            self.images(record).preserve_ahead(record)
        except OSError as problem:  # repeated, and reported, when the cycle is applied
            _log.info("%s: %s", record.name, problem)

    def _replay(self) -> Record:
        """Finish what a commit record began; the record as it is then."""
        record = self.home.load()
        if not Journal.is_committed(self.home.path):
            return record
        journal = Journal.load(self.home.path)
        commit = journal.committed if journal else None
        if journal is None or commit is None:  # a commit record alone: what it refers to is missing
            raise ReplicaDamaged(replica=self.replica_id, detail="the journal of a sealed cycle is incomplete")
        head = record.head
        if head is None or head.stored.id != commit.point.id:
            record = self._apply(record, journal, commit)
            reach("target.seal.done")
        record = self.images(record).free(record, self.home.save)
        journal.remove()
        reach("target.seal.swept")
        return record

    def _apply(self, record: Record, journal: Journal, commit: Commit) -> Record:
        images = self.images(record)
        disks = commit.point.disks
        with self.shared.writing_images():
            if not journal.cycle.direct:
                record = images.open_heads(record, disks)
                self.home.save(record)
            for disk_id in disks:
                if not journal.cycle.direct:
                    images.apply(record.heads[disk_id], journal.changes(disk_id), journal.data_path(disk_id))
                reach("target.seal.disk-applied")
            reach("target.seal.applied")
            heads = {disk_id: record.heads[disk_id] for disk_id in disks}
            self.home.describe(commit.point.id, commit.seal.description)
        older = tuple(point for point in record.points if point.stored.kept)
        points = (*older, Point(commit.point, heads))
        record = attrs.evolve(record, format=FORMAT, disks=dict(disks), heads=heads, points=points)
        self.home.save(record)
        return record

    # -- points

    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        """See Replica. Also merges what earlier calls had to leave because a test used it, and deletes left-overs."""
        wanted = set(point_ids)
        with self.working("dropping recovery points") as found:
            record = found
            self.check_epoch(record, epoch)
            reach("target.drop.begin")
            head = record.points[-1:]
            left = tuple(point for point in record.points[:-1] if point.stored.id not in wanted or point.stored.pinned)
            if len(left) + len(head) < len(record.points):
                record = attrs.evolve(record, points=left + head)
                self.home.save(record)
            reach("target.drop.recorded")
            images = self.images(record)
            record = images.free(record, self.home.save, watch)
            tidied = images.tidy(record, watch)
            if tidied is not record:
                self.home.save(tidied)
                reach("target.drop.tidied")
                images.free(tidied, self.home.save, watch)
            self.home.fill_reserve()
            reach("target.drop.done")

    def pin(self, point_id: str, pinned: bool) -> None:
        """See Replica. A newest point that was not kept becomes a kept one: else the next seal would replace it."""
        with self.working("pinning a recovery point") as record:
            point = self._point(record, point_id)
            if point.stored.pinned == pinned:
                return
            kept = point.stored.kept or pinned
            changed = attrs.evolve(point, stored=attrs.evolve(point.stored, pinned=pinned, kept=kept))
            points = tuple(changed if item is point else item for item in record.points)
            self.home.save(attrs.evolve(record, format=FORMAT, points=points))

    # -- reading

    def allocated(self, disk_id: str) -> list[Extent]:
        """See Replica."""
        with self.working("reading a replica's allocation") as record:
            size = self._size(record, disk_id)
            return self.images(record).allocated(record.heads[disk_id], Extent(0, size))

    def reader(self, disk_id: str, point_id: str | None = None) -> DiskReader:
        """See Replica. Raises PointNotFound; InvalidValue for a disk that is not in it."""
        with self.errors("opening a replica's disk"):
            record = self._current()
            size = self._size(record, disk_id, point_id)
            inner = self.images(record).reader(lambda: self._image(disk_id, point_id), self.replica_id)
        return _ReplicaReader(self, inner, size)

    def _image(self, disk_id: str, point_id: str | None) -> str:
        record = self.home.load()
        if point_id is None:
            return record.heads[disk_id]
        return self._point(record, point_id).images[disk_id]

    def _size(self, record: Record, disk_id: str, point_id: str | None = None) -> int:
        disks = record.disks if point_id is None else self._point(record, point_id).stored.disks
        if disk_id not in disks:
            raise InvalidValue(what="disk", value=disk_id, wanted=f"one of {', '.join(disks) or 'none'}")
        return disks[disk_id]

    def digests(self, disk_id: str, extent: Extent, digest: Digest = Digest.BLAKE3) -> bytes:
        """See Replica. What is not stored is answered without reading."""
        if extent.offset % DIGEST_BLOCK:
            raise InvalidValue(what="offset", value=extent.offset, wanted=f"a multiple of {DIGEST_BLOCK}")
        stored = self._stored_blocks(disk_id, extent)
        result = bytearray()
        zero = zero_digest(digest)
        with self.reader(disk_id) as reader:
            at = extent.offset
            for start, end in stored:
                result += zero * ((start - at) // DIGEST_BLOCK)
                result += digests_of(reader, Extent(start, end - start), digest)
                at = end
        result += zero * ((extent.end - at) // DIGEST_BLOCK)
        return bytes(result)

    def _stored_blocks(self, disk_id: str, extent: Extent) -> list[tuple[int, int]]:
        """Runs of whole blocks within the extent that hold data, and its short last block."""
        runs: list[tuple[int, int]] = []
        with self.errors("reading a replica's allocation"):
            record = self._current()
            self._size(record, disk_id)
            found = self.images(record).allocated(record.heads[disk_id], extent)
        ranges = [(item.offset, item.end) for item in found if not item.zero]
        if extent.length % DIGEST_BLOCK:
            tail = extent.end - extent.length % DIGEST_BLOCK
            ranges = [*ranges, (tail, extent.end)]
        for first, last in ranges:
            start = max(extent.offset, first // DIGEST_BLOCK * DIGEST_BLOCK)
            end = min(extent.end, -(-last // DIGEST_BLOCK) * DIGEST_BLOCK)
            if runs and start <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
            elif start < end:
                runs.append((start, end))
        return runs


class _ReplicaReader(DiskReader):
    """Reads within a disk's size; keeps other processes out while it is open."""

    def __init__(self, replica: FileReplica, inner: DiskReader, size: int) -> None:
        self._open = False
        with replica.errors("reading a replica"):
            replica.shared.hold()
        self._replica, self._inner, self._size = replica, inner, size
        self._open = True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self._size:
            wanted = f"within the disk's {self._size} bytes"
            raise InvalidValue(what="range", value=f"{offset}+{len(buffer)}", wanted=wanted)
        with self._replica.errors("reading a replica"):
            self._inner.read_into(offset, buffer)

    def close(self) -> None:
        if self._open:
            self._open = False
            try:
                self._inner.close()
            finally:
                self._replica.shared.release()

    def __del__(self) -> None:
        self.close()


class FileCycleWriter(CycleWriter):
    """Writes a cycle to its journal; the replica is closed to other processes until `close`."""

    def __init__(
        self, replica: FileReplica, journal: Journal, headroom: int, beside: Callable[[], None] | None
    ) -> None:
        """Takes over one `hold` of the replica. `headroom`: bytes to be left free. `beside` is called on a separate
        thread while data arrives."""
        self._headroom = headroom
        self._replica = replica
        self._journal = journal
        self._disks = dict(journal.cycle.disks)
        self._sealed: StoredPoint | None = None
        self._beside = threading.Thread(target=beside, name="clones", daemon=True) if beside else None
        if self._beside is not None:
            self._beside.start()
        self._open = True

    @property
    def id(self) -> str:
        """Of the cycle."""
        return self._journal.cycle.id

    def _check(self, disk_id: str, offset: int, length: int) -> None:
        self._check_open()
        size = self._disks.get(disk_id)
        if size is None:
            raise InvalidValue(what="disk", value=disk_id, wanted=f"one of {', '.join(self._disks)}")
        if offset < 0 or length < 0 or offset + length > size:
            raise InvalidValue(what="range", value=f"{offset}+{length}", wanted=f"within the disk's {size} bytes")

    def _check_open(self) -> None:
        if not self._open or self._sealed is not None:
            raise InvalidValue(what="cycle", value=self.id, wanted="open")

    def done(self, disk_id: str) -> list[Extent]:
        return self._journal.done(disk_id)

    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        data = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        self._check(disk_id, offset, len(data))
        with self._replica.errors("writing a cycle", wanted=len(data)):
            if self._headroom:
                self._check_free(len(data) + self._headroom)
            self._journal.write(disk_id, offset, data)

    def zero(self, disk_id: str, offset: int, length: int) -> None:
        self._check(disk_id, offset, length)
        with self._replica.errors("writing a cycle"):
            self._journal.note(disk_id, offset, length, Kind.ZERO)

    def same(self, disk_id: str, offset: int, length: int) -> None:
        self._check(disk_id, offset, length)
        with self._replica.errors("writing a cycle"):
            self._journal.note(disk_id, offset, length, Kind.SAME)

    def flush(self) -> None:
        self._check_open()
        with self._replica.errors("flushing a cycle"):
            self._replica.check_epoch(self._replica.home.load(), self._journal.cycle.epoch)
            self._journal.flush()
            reach("target.flush")

    def seal(self, spec: SealSpec) -> StoredPoint:
        """See CycleWriter. When space is missing nothing is committed and the cycle stays open.

        What is committed is applied when the writer is closed, or by an earlier operation on the replica.
        The point is not kept, and is recorded as such, where the chain has its maximum length (`MAX_LAYERS`).
        """
        if self._sealed is not None and self._sealed.id == spec.point_id:
            return self._sealed
        self._check_open()
        checked_id("point id", spec.point_id)
        replica, journal = self._replica, self._journal
        with replica.working("sealing a cycle") as record:
            already = record.point(spec.point_id)
            if already is not None:
                self._sealed = already.stored
                return self._sealed
            replica.check_epoch(record, journal.cycle.epoch)
            journal.flush()
            self._check_space(record)
            reach("target.seal.begin")
            point = StoredPoint(
                id=spec.point_id,
                taken_at=spec.taken_at,
                sealed_at=replica._clock(),
                consistency=spec.consistency,
                kept=spec.keep and replica.images(record).layer_count(record) < MAX_LAYERS,
                pinned=False,
                disks=dict(self._disks),
            )
            journal.commit(Commit(point, spec))
            reach("target.seal.commit")
            journal.close()
            self._sealed = point
        return point

    def _check_space(self, record: Record) -> None:
        images = self._replica.images(record)
        changes = [] if self._journal.cycle.direct else [c for d in self._disks for c in self._journal.changes(d)]
        self._check_free(images.cost(record, changes) + max(self._headroom, _RESERVE))

    def _check_free(self, wanted: int) -> None:
        path = self._replica.home.path
        status = os.statvfs(path)
        if status.f_bavail * status.f_frsize < wanted:
            raise TargetFull(where=str(path), detail=missing_space(path, wanted))

    def _wait_beside(self) -> None:
        if self._beside is not None:
            self._beside.join()

    def discard(self) -> None:
        """See CycleWriter."""
        self._check_open()
        with self._replica.working("discarding a cycle") as record:
            self._replica.check_epoch(record, self._journal.cycle.epoch)
            self._journal.remove()
        self.close()

    def close(self) -> None:
        """Also applies what was sealed."""
        if self._open:
            self._let_go()
            if self._sealed is not None:
                self._apply()

    def _let_go(self) -> None:
        if self._open:
            self._open = False
            self._wait_beside()
            try:
                self._journal.close()
            finally:
                self._replica.shared.writer = lambda: None
                self._replica.shared.release()

    def _apply(self) -> None:
        try:
            with self._replica.working("applying a sealed cycle"):
                pass
        except AsrError as problem:  # the point exists; the next operation reports the problem
            _log.warning("%s: the next operation applies the sealed cycle: %s", self._replica.replica_id, problem)

    def __del__(self) -> None:
        self._let_go()
