"""A replica and the writer of its cycles: the order of durable steps, the same for both kinds of images.

A cycle's content goes to the journal. The commit record is the durable instant of the point: `seal` returns then. These
steps follow, each repeatable, until the journal is deleted: open_heads, apply, the record, free. `_replay` does them
when the writer is closed, or in the next operation on the replica, also after a crash.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import attrs

from asr_storage.files.errors import storage_errors
from asr_storage.replica.blocks import Blocks
from asr_storage.replica.chain import ChainImages
from asr_storage.replica.digests import PointDigests, unknown_runs
from asr_storage.replica.examine import (
    damage_of_files,
    examine_content,
    forget_cached,
    is_damage,
    sample_content,
)
from asr_storage.replica.journal import Commit, Cycle, Journal
from asr_storage.replica.recorded import RecordedDigests
from asr_storage.replica.reflink import ReflinkImages
from asr_storage.replica.store import FORMAT, Home, Images, Point, Record, ReplicaKind, Shared, checked_id
from asr_storage.replica.writer import FileCycleWriter
from asrcore.crashpoint import reach
from asrcore.driver import (
    DIGEST_BLOCK,
    DIGEST_SIZE,
    CycleSpec,
    CycleWriter,
    Digest,
    DiskReader,
    Examination,
    Replica,
    ReplicaInfo,
    digests_of,
    examination_parts,
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
)
from asrcore.model.extent import Extent
from asrcore.model.machine import Description
from asrcore.model.watch import Watch

__all__ = ["FileReplica", "checked_disks"]

_log = logging.getLogger(__name__)

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
        self.clock = clock
        self._digests = RecordedDigests(home)

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
            keeps_digests=True,
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
            self.shared.recorded = None
            reach("target.seal.done")
        record = self.images(record).free(record, self.home.save)
        journal.remove()
        reach("target.seal.swept")
        return record

    def _apply(self, record: Record, journal: Journal, commit: Commit) -> Record:
        with self.shared.learning:
            (key, learned), self.shared.learned = self.shared.learned, (None, {})
        if learned and record.head is not None and key == (record.head.stored.id, record.digests):
            self._digests.learn(record, record.head.stored.id, learned)
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
        record = self._digests.record(record, commit.point.id, journal)
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
            merged = self._digests.merge(record)
            if merged is not record:
                record = merged
                self.home.save(record)
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
        return self.digests_at(disk_id, extent, None, digest)

    def digests_at(self, disk_id: str, extent: Extent, point_id: str | None, digest: Digest = Digest.BLAKE3) -> bytes:
        """The same for any point; None: the head. Raises PointNotFound."""
        if extent.offset % DIGEST_BLOCK:
            raise InvalidValue(what="offset", value=extent.offset, wanted=f"a multiple of {DIGEST_BLOCK}")
        stored = self.stored_blocks(disk_id, extent, point_id)
        result = bytearray()
        zero = zero_digest(digest)
        with self.reader(disk_id, point_id) as reader:
            at = extent.offset
            for start, end in stored:
                result += zero * ((start - at) // DIGEST_BLOCK)
                result += digests_of(reader, Extent(start, end - start), digest)
                at = end
        result += zero * ((extent.end - at) // DIGEST_BLOCK)
        return bytes(result)

    def stable_digests(self, disk_id: str, extent: Extent, point_id: str) -> bytes:
        """Of a point, as `digests_at`. If images are written meanwhile (a cycle is applied, layers are merged), what
        was read may be of another point: it is read again."""
        with self.errors("examining a recovery point"):
            self.shared.hold()
        try:
            while True:
                generation = self.shared.gate.generation
                found = self.digests_at(disk_id, extent, point_id)
                if generation == self.shared.gate.generation:
                    return found
        finally:
            self.shared.release()

    def stored_blocks(self, disk_id: str, extent: Extent, point_id: str | None) -> list[tuple[int, int]]:
        """Runs of whole blocks within the extent that hold data, and its short last block."""
        runs: list[tuple[int, int]] = []
        with self.errors("reading a replica's allocation"):
            record = self._current()
            self._size(record, disk_id, point_id)
            found = self.images(record).allocated(self._image(disk_id, point_id), extent)
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

    # -- damage

    def examine(
        self, point_id: str, *, start: int | None = None, limit: int | None = None, watch: Watch | None = None
    ) -> Examination:
        """See Replica."""
        watch = watch or Watch()
        with self.working("examining a recovery point") as record:
            point = self._point(record, point_id)
            damage = self._damage_of_files(record, point, tables=not start)  # in the first part of several
            digests = self._digests.of(record, point)
        if damage:
            return Examination(tuple(damage))
        with self.errors("examining a recovery point"):
            self.shared.hold()  # so that what serves the reads runs until the end
        try:
            if start is None:
                return sample_content(self, point, digests)
            layers = self._digests.begins(point_id)
            forget_cached(self.home.path, record, point, examination_parts(point.stored.disks, start, limit)[0], layers)
            found, learned = examine_content(self, point, digests, start, limit, watch)
        finally:
            self.shared.release()
        last = found.end is None or bool(found.damage)
        learned = self._digests.collect(point_id, learned, (found.end or start) - start, last=last)
        if learned:
            with self.working("recording digests") as record:
                self._digests.learn(record, point_id, learned)
        return found

    def _damage_of_files(self, record: Record, point: Point, *, tables: bool) -> list[str]:
        damage = []
        try:
            self.home.description(point.stored.id)
        except ReplicaDamaged as problem:
            damage.append(str(problem))
        except OSError as problem:
            if not is_damage(problem):
                raise
            missing = isinstance(problem, FileNotFoundError)
            damage.append("its description is missing" if missing else f"its description: {problem.strerror}")
        return damage + damage_of_files(self.home.path, record, point, tables=tables)

    def mark_damaged(self, point_id: str, damaged: str, epoch: int | None = None) -> None:
        """See Replica."""
        with self.working("marking a recovery point") as record:
            if epoch is not None:
                self.check_epoch(record, epoch)
            point = self._point(record, point_id)
            if point.stored.damaged == damaged:
                return
            changed = attrs.evolve(point, stored=attrs.evolve(point.stored, damaged=damaged))
            points = tuple(changed if item is point else item for item in record.points)
            self.home.save(attrs.evolve(record, points=points))

    def from_records(self) -> Replica:
        """See Replica. The same where no digests are recorded, or the head is known to be damaged."""
        with self.errors("reading a replica"):
            record = self._current()
            head = record.head
            if head is None or head.stored.damaged or head.stored.id not in record.digests:
                return self
            key = (head.stored.id, record.digests)
            self.shared.hold()
            try:
                kept = self.shared.recorded
                if kept is None or kept[0] != key:
                    # A served replica is opened by each call; a cycle holds it meanwhile.
                    kept = self.shared.recorded = (key, self._digests.of(record, head))
                return _FromRecords(self, key, kept[1])
            finally:
                self.shared.release()


class _FromRecords(FileReplica):
    """Digests of the head as it was when this was made, without reading where they are recorded."""

    hashes_at_target = True

    def __init__(self, replica: FileReplica, key: object, tables: Mapping[str, PointDigests]) -> None:
        super().__init__(replica.site, replica.home, replica.clock)
        self._key, self._tables = key, tables

    def digests(self, disk_id: str, extent: Extent, digest: Digest = Digest.BLAKE3) -> bytes:
        if digest is not Digest.BLAKE3 or disk_id not in self._tables:
            return super().digests(disk_id, extent, digest)
        result = self._tables[disk_id].look_up(extent)
        unknown = unknown_runs(result)
        if not unknown:
            return bytes(result)
        first, last = unknown[0][0], unknown[-1][1]  # in one read, also what is known between: each costs a connection
        offset, behind = extent.offset + first * DIGEST_BLOCK, extent.offset + last * DIGEST_BLOCK
        read = memoryview(super().digests(disk_id, Extent(offset, min(extent.end, behind) - offset), digest))
        with self.shared.learning:
            if self.shared.learned[0] != self._key:
                self.shared.learned = (self._key, {})
            blocks = self.shared.learned[1].setdefault(disk_id, Blocks(self._tables[disk_id].size))
            for start, end in unknown:
                found = read[(start - first) * DIGEST_SIZE : (end - first) * DIGEST_SIZE]
                result[start * DIGEST_SIZE : end * DIGEST_SIZE] = found
                blocks.known(extent.offset + start * DIGEST_BLOCK, found)
        return bytes(result)


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
