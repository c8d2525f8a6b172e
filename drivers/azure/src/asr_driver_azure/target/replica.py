"""A replica: page blobs, their snapshots as points, and a record that says which are valid."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import attrs

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs.pageblob import Fenced, PageBlob, Properties
from asr_driver_azure.blobs.ranges import RangeSet
from asr_driver_azure.blobs.reading import fill_around, read_together
from asr_driver_azure.blobs.record import (
    DiskAt,
    Pending,
    Record,
    Snapshot,
    description_of,
    disk_blob,
    lease_of,
    prefix_of,
)
from asr_driver_azure.cloud.errors import LeaseHeld
from asr_driver_azure.target.writer import AzureWriter, OpenDisk, begin_index, read_index
from asrcore import codec
from asrcore.crashpoint import reach
from asrcore.driver import CycleSpec, CycleWriter, DiskReader, Promoted, Replica, ReplicaInfo
from asrcore.errors import InvalidValue, MachineBusy, ReplicaDamaged, ReplicaPromoted, StaleBase, StaleEpoch
from asrcore.model.extent import Extent, subtract
from asrcore.model.machine import Description
from asrcore.model.watch import Watch

__all__ = ["KIND", "AzureReplica", "BlobReader", "checked_size"]

KIND = "page-blob"


def checked_size(disk_id: str, size: int) -> int:
    """The size in bytes. Raises InvalidValue for one that no page blob can have."""
    if size <= 0 or size % 512:
        raise InvalidValue(what=f"size of disk {disk_id}", value=size, wanted="a positive multiple of 512 bytes")
    return size


class BlobReader(DiskReader):
    """Reads a snapshot (or a blob without one): what is not stored is not requested."""

    def __init__(self, account: AzureAccount, blob: PageBlob, size: int) -> None:
        self._account = account
        self._blob = blob
        self._size = size

    @functools.cached_property
    def _stored(self) -> RangeSet:
        return RangeSet(self._blob.stored(self._size))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read_each([(offset, buffer)])

    def read_each(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        wanted = [part for offset, buffer in reads if (part := fill_around(self._stored, offset, buffer))]
        read_together(self._account.begin, wanted, self._blob.read_into)


class AzureReplica(Replica):
    """See `Replica`."""

    def __init__(self, account: AzureAccount, replica_id: str) -> None:
        self._account = account
        self._container = account.container
        self._id = replica_id

    def record(self) -> Record:
        """As durable now. Raises ReplicaNotFound, ReplicaDamaged."""
        return self._container.record(self._id, self._account.name)

    def info(self) -> ReplicaInfo:
        record = self.record()
        promotion = record.promotion
        return ReplicaInfo(
            replica_id=self._id,
            epoch=record.epoch,
            disks={disk_id: disk.size for disk_id, disk in record.disks.items()},
            points=tuple(point.stored for point in record.points),
            pending=record.pending.cycle_id if record.pending else None,
            kind=KIND,
            promoted=None if promotion is None else Promoted(promotion.point_id, promotion.machine_id),
        )

    # -- ownership

    def raise_epoch(self, epoch: int) -> None:
        def own(record: Record) -> Record:
            record.own(epoch)
            leases = record.leases if epoch in record.leases else (*record.leases, epoch)
            return attrs.evolve(record, epoch=epoch, leases=leases)

        record = self._container.change(self._id, self._account.name, own).record
        reach("azure.epoch.recorded")
        if record.leases == (epoch,):
            return
        pending = record.pending.disks if record.pending else {}
        for disk in {disk.blob: disk for disk in (*record.disks.values(), *pending.values())}.values():
            self._lease(record, disk.blob, epoch)
            reach("azure.epoch.leased")
        self._container.change(self._id, self._account.name, lambda record: _leased(record, epoch))
        reach("azure.epoch.raised")

    def _lease(self, record: Record, blob: str, epoch: int) -> PageBlob:
        """The blob, leased to this epoch. Raises StaleEpoch, LeaseHeld."""
        former = [lease_of(self._id, item) for item in reversed(record.leases) if item < epoch]
        page = self._container.page_blob(blob)
        if not page.take(lease_of(self._id, epoch), former):
            self.record().own(epoch)
            raise LeaseHeld(blob=blob, replica=self._id)
        return page

    # -- cycles

    def create_blobs(self, record: Record) -> None:
        """Create the blobs of a new replica; existing ones are kept."""
        for disk in record.disks.values():
            self._opened_blob(record, disk, record.epoch, None)
            reach("azure.blob.created")

    def _opened_blob(self, record: Record, disk: DiskAt, epoch: int, looked: Properties | None) -> tuple[PageBlob, int]:
        """The blob, there and leased, fit for the disk; and a sequence number that no other writer has. `looked`: what
        its properties were a moment ago."""
        page = self._container.page_blob(disk.blob)
        known = looked or page.properties()
        if known is None:
            if any(disk.blob == blob for blob, _ in record.snapshots):
                raise ReplicaDamaged(replica=self._id, detail=f"blob {disk.blob} does not exist")
            page.create(disk.size)
            known = page.properties()
        if known is None:
            raise ReplicaDamaged(replica=self._id, detail=f"blob {disk.blob} was deleted right after it was created")
        lease = lease_of(self._id, epoch)
        try:
            sequence = self._numbered(record, page, epoch)
            if sequence != known.sequence + 1:  # another writer came between and may have changed its length
                known = page.properties() or known
            page.fit(disk.size, lease, known)
        except Fenced as problem:
            self.record().own(epoch)
            raise StaleEpoch(replica=self._id, epoch=epoch, owner=self.record().epoch) from problem
        return page, sequence

    def _numbered(self, record: Record, page: PageBlob, epoch: int) -> int:
        """The blob's next sequence number. It nearly always has this epoch's lease, so that is seen first."""
        lease = lease_of(self._id, epoch)
        try:
            return page.number(lease)[0]
        except Fenced:
            return self._lease(record, page.name, epoch).number(lease)[0]

    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        for disk_id, size in spec.disks.items():
            checked_size(disk_id, size)

        resumed = False

        def admit(record: Record) -> Record:
            nonlocal resumed
            record.own(spec.epoch)
            if record.promotion is not None:
                raise ReplicaPromoted(replica=self._id, machine=record.name)
            if spec.base_point != record.head_id:
                raise StaleBase(replica=self._id, head=record.head_id, base=spec.base_point)
            if record.pending is not None and record.pending.cycle_id != spec.cycle_id:
                raise MachineBusy(machine=record.name, work=f"cycle {record.pending.cycle_id}")
            resumed = record.pending is not None
            return attrs.evolve(record, pending=Pending(spec.cycle_id, self._disks_of(record, spec)))

        before = self._container.load(self._id)
        expected = self._disks_of(before.record, spec) if before else {}
        with ThreadPoolExecutor(len(spec.disks) + 1, thread_name_prefix="azure-open") as pool:
            looked = {
                disk.blob: pool.submit(self._container.page_blob(disk.blob).properties) for disk in expected.values()
            }
            known = self._container.change(self._id, self._account.name, admit, before)
            assert known.record.pending is not None
            reach("azure.cycle.recorded")
            wanted = known.record.pending.disks
            index = pool.submit(read_index if resumed else begin_index, self._container, self._id, spec.cycle_id)

            def open_disk(disk_id: str) -> OpenDisk:
                blob = wanted[disk_id].blob
                properties = looked[blob].result() if blob in looked else None
                return self._open_disk(known.record, disk_id, wanted[disk_id], spec, properties)

            disks = dict(zip(wanted, pool.map(open_disk, wanted), strict=True))
            done = index.result()
        for disk_id, disk in disks.items():
            disk.torn = RangeSet(subtract(disk.dirty.extents(), done.get(disk_id, [])))
        reach("azure.cycle.opened")
        return AzureWriter(self._container, self._account.name, known, spec, disks, done, self._account.clock)

    def _disks_of(self, record: Record, spec: CycleSpec) -> dict[str, DiskAt]:
        known = dict(record.pending.disks) if record.pending else {}
        known |= record.disks
        return {
            disk_id: attrs.evolve(known[disk_id], size=size)
            if disk_id in known
            else DiskAt(disk_blob(self._id, disk_id, spec.cycle_id), size)
            for disk_id, size in spec.disks.items()
        }

    def _open_disk(
        self, record: Record, disk_id: str, disk: DiskAt, spec: CycleSpec, looked: Properties | None
    ) -> OpenDisk:
        page, sequence = self._opened_blob(record, disk, spec.epoch, looked)
        at = record.head.disks.get(disk_id) if record.head else None
        dirty: list[Extent] = []
        if at is None:
            head = None
        else:
            head = self._container.page_blob(at.blob, at.snapshot)
            if sequence - 1 != disk.sequence:  # it was opened since it was equal to the head
                dirty = page.changed(at.snapshot, disk.size)
        return OpenDisk(
            blob=page,
            size=disk.size,
            sequence=sequence,
            head=head,
            head_size=at.size if at else 0,
            dirty=RangeSet(dirty),
        )

    # -- points

    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        wanted = set(point_ids)
        before = self._container.listed(prefix_of(self._id), snapshots=True)

        def drop(record: Record) -> Record:
            record.own(epoch)
            keep = {record.head_id, *record.tests.values()}
            points = tuple(
                point
                for point in record.points
                if point.stored.id not in wanted or point.stored.id in keep or point.stored.pinned
            )
            return attrs.evolve(record, points=points)

        record = self._container.change(self._id, self._account.name, drop).record
        reach("azure.points.unrecorded")
        # What a cycle has created and not yet recorded would look left over: left-overs are deleted only without a
        # cycle.
        if record.pending is not None:
            return
        described = {description_of(self._id, point.stored.id) for point in record.points}
        for item in sorted(before, key=lambda item: not item.snapshot):
            if watch is not None:
                watch.check()
            if item.snapshot:
                left = (item.name, item.snapshot) not in record.snapshots
            else:
                used = record.blobs | described
                left = item.name not in used and not item.name.endswith("/replica.json")
            if left:
                if item.is_disk and not item.snapshot:
                    page = self._container.page_blob(item.name)
                    page.release([lease_of(self._id, former) for former in record.leases])
                self._container.delete(item.name, item.snapshot)
        reach("azure.points.dropped")

    def pin(self, point_id: str, pinned: bool) -> None:
        def pin(record: Record) -> Record:
            point = record.point(point_id)
            changed = attrs.evolve(point, stored=attrs.evolve(point.stored, pinned=pinned))
            return attrs.evolve(record, points=tuple(changed if item is point else item for item in record.points))

        self._container.change(self._id, self._account.name, pin)

    def description(self, point_id: str) -> Description:
        self.record().point(point_id)
        found = self._container.read(description_of(self._id, point_id))
        if found is None:
            raise ReplicaDamaged(replica=self._id, detail=f"the description of point {point_id} does not exist")
        try:
            return codec.load(Description, found[0])
        except ValueError as problem:
            raise ReplicaDamaged(replica=self._id, detail=f"the description of {point_id}: {problem}") from problem

    def _snapshot(self, disk_id: str, point_id: str | None) -> tuple[PageBlob, int]:
        """The blob to read for a disk of a point, by default the head, and the disk's size."""
        record = self.record()
        point = record.head if point_id is None else record.point(point_id)
        disks: dict[str, Snapshot | DiskAt] = dict(point.disks) if point else dict(record.disks)
        if disk_id not in disks:
            raise InvalidValue(what="disk", value=disk_id, wanted=f"one of {', '.join(disks) or 'none'}")
        disk = disks[disk_id]
        return self._container.page_blob(disk.blob, disk.snapshot if isinstance(disk, Snapshot) else ""), disk.size

    def allocated(self, disk_id: str) -> list[Extent]:
        blob, size = self._snapshot(disk_id, None)
        data = blob.stored(size)
        holes = (Extent(item.offset, item.length, zero=True) for item in subtract([Extent(0, size)], data))
        return sorted([*data, *holes])

    def reader(self, disk_id: str, point_id: str | None = None) -> DiskReader:
        return BlobReader(self._account, *self._snapshot(disk_id, point_id))


def _leased(record: Record, epoch: int) -> Record:
    return attrs.evolve(record, leases=(epoch,)) if record.epoch == epoch else record
