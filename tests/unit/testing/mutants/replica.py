"""Replicas and targets that are broken."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterable
from typing import Any, cast

import attrs
from blake3 import blake3

from asrcore.driver import (
    DIGEST_BLOCK,
    DIGEST_SIZE,
    Capacity,
    CycleSpec,
    CycleWriter,
    Digest,
    DiskReader,
    Examination,
    Replica,
    ReplicaInfo,
    ReplicaSpec,
    SealSpec,
    StoredPoint,
)
from asrcore.errors import DriverFailed, TargetReadOnly
from asrcore.model.extent import Extent
from asrcore.model.finding import Finding
from asrcore.model.machine import Description
from asrcore.model.policy import Policy
from asrcore.model.watch import Watch
from asrcore.testing.memory._state import PointState, ReplicaState
from asrcore.testing.memory._target import MemoryReplica, MemoryTarget, MemoryWriter

from ._mutant import caught_by


@caught_by("test_a_stale_epoch_is_refused")
class EpochIsIgnored(MemoryReplica):
    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        return super().open_cycle(attrs.evolve(spec, epoch=max(spec.epoch, self.info().epoch)))


@caught_by("test_a_stale_epoch_is_refused")
class DropIgnoresTheEpoch(MemoryReplica):
    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        super().drop_points(point_ids, max(epoch, self.info().epoch))


@caught_by("test_a_stale_base_is_refused")
class BaseIsIgnored(MemoryReplica):
    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        return super().open_cycle(attrs.evolve(spec, base_point=self.info().head))


@caught_by("test_another_cycle_does_not_drop_the_pending_one")
class NewCycleDropsThePending(MemoryReplica):
    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        with self._session.change() as state:
            replica = state.replica(self._id)
            if replica.journal and replica.journal.cycle_id != spec.cycle_id:
                replica.journal = None
        return super().open_cycle(spec)


@caught_by(
    "test_a_cycle_is_invisible_until_it_is_sealed",
    "test_a_disk_may_go",
    "test_a_full_target_leaves_all_as_it_was",
    "test_a_head_that_is_not_kept_is_replaced",
    "test_a_kept_point_keeps_its_content",
    "test_a_mark_of_damage_changes_nothing_else",
    "test_a_pinned_head_is_not_replaced",
    "test_a_pinned_point_is_not_dropped",
    "test_a_point_holds_what_was_sent",
    "test_a_stale_base_is_refused",
    "test_a_stale_epoch_is_refused",
    "test_a_whole_point_is_found_whole",
    "test_closing_keeps_what_was_flushed",
    "test_damage_of_a_point_is_found",
    "test_discard_drops_the_cycle",
    "test_disks_may_grow_while_a_cycle_is_interrupted",
    "test_dropping_keeps_the_others",
    "test_same_leaves_the_content_and_counts_as_done",
    "test_the_last_call_counts",
    "test_zeroes_read_as_zeroes",
)
class PointIsSharedWithTheHead(MemoryReplica):
    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        writer: Any = super().open_cycle(spec)
        seal = writer.seal

        def sharing(seal_spec: SealSpec) -> StoredPoint:
            point: StoredPoint = seal(seal_spec)
            with self._session.change() as state:
                replica = state.replica(self._id)
                for older in replica.points[:-1]:
                    for disk_id in older.disks.keys() & replica.head.keys():
                        older.disks[disk_id] = replica.head[disk_id].snapshot()
                        older.disks[disk_id].resize(older.point.disks[disk_id])
            return point

        writer.seal = sharing
        return cast(CycleWriter, writer)


@caught_by("test_a_head_that_is_not_kept_is_replaced")
class UnkeptPointsStay(MemoryReplica):
    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        writer: Any = super().open_cycle(spec)
        seal = writer.seal
        writer.seal = lambda seal_spec: seal(attrs.evolve(seal_spec, keep=True))
        return cast(CycleWriter, writer)


@caught_by(
    "test_a_disk_may_grow",
    "test_a_pinned_point_is_not_dropped",
    "test_a_whole_point_is_found_whole",
    "test_dropping_keeps_the_others",
    "test_the_head_is_not_dropped",
)
class DropDamagesTheNeighbour(MemoryReplica):
    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        wanted = set(point_ids)
        before = [point.id for point in self.info().points]
        super().drop_points(wanted, epoch)
        with self._session.change() as state:
            replica = state.replica(self._id)
            for point in replica.points:
                at = before.index(point.point.id)
                if at and before[at - 1] in wanted:
                    _damage(point)


def _damage(point: PointState) -> None:
    for content in point.disks.values():
        content.write(0, bytes(byte ^ 0xFF for byte in content.read(0, 4096)))


@caught_by(
    "test_a_pinned_point_is_not_dropped",
    "test_the_head_is_not_dropped",
)
class HeadCanBeDropped(MemoryReplica):
    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        super().drop_points(point_ids, epoch)
        with self._session.change() as state:
            replica = state.replica(self._id)
            replica.points = [point for point in replica.points if point.point.id not in set(point_ids)]


@caught_by("test_a_pinned_point_is_not_dropped")
class PinsAreIgnored(MemoryReplica):
    def _is_held(self, replica: ReplicaState, point: PointState) -> bool:
        return replica.in_use(point.point.id)


@caught_by("test_each_point_has_its_description")
class DescriptionIsOfTheHead(MemoryReplica):
    def description(self, point_id: str) -> Description:
        super().description(point_id)
        return super().description(self.info().points[-1].id)


@caught_by(
    "test_compare_names_the_blocks_that_differ",
    "test_digests_are_of_the_head",
    "test_recorded_digests_are_those_of_the_head",
)
class DigestsPadTheLastBlock(MemoryReplica):
    def digests(self, disk_id: str, extent: Extent, digest: Digest = Digest.BLAKE3) -> bytes:
        with self.reader(disk_id) as reader:
            data = bytearray(extent.length)
            reader.read_into(extent.offset, memoryview(data))
        starts = range(0, len(data), DIGEST_BLOCK)
        blocks = (bytes(data[at : at + DIGEST_BLOCK]).ljust(DIGEST_BLOCK, b"\0") for at in starts)
        return b"".join(blake3(block).digest(DIGEST_SIZE) for block in blocks)


@caught_by("test_compare_names_the_blocks_that_differ")
class CompareGrowsTheLastBlock(MemoryReplica):
    def compare(self, disk_id: str, extent: Extent, ours: bytes, digest: Digest = Digest.BLAKE3) -> list[Extent]:
        found = super().compare(disk_id, extent, ours, digest)
        return [Extent(item.offset, -(-item.length // DIGEST_BLOCK) * DIGEST_BLOCK) for item in found]


@caught_by("test_after_a_loss_only_differences_travel", "test_compare_names_the_blocks_that_differ")
class CompareStopsAtTheFirst(MemoryReplica):
    def compare(self, disk_id: str, extent: Extent, ours: bytes, digest: Digest = Digest.BLAKE3) -> list[Extent]:
        return super().compare(disk_id, extent, ours, digest)[:1]


@caught_by("test_the_epoch_survives_the_engine")
class EpochIsForgottenByAKill(MemoryReplica):
    def raise_epoch(self, epoch: int) -> None:
        before = pickle.dumps(self._look(lambda replica: replica))
        super().raise_epoch(epoch)
        self._session.world.__dict__.setdefault("lost_at_kill", {})[self._id] = before


@caught_by("test_creating_again_changes_nothing")
class CreateStartsOver(MemoryTarget):
    def create_replica(self, spec: ReplicaSpec, watch: Watch) -> Replica:
        with self._session.change() as state:
            state.replicas.pop(spec.replica_id, None)
        return super().create_replica(spec, watch)


@caught_by("test_a_seed_is_the_first_content")
class SeedIsIgnored(MemoryTarget):
    def create_replica(self, spec: ReplicaSpec, watch: Watch) -> Replica:
        return super().create_replica(attrs.evolve(spec, seed_machine=None), watch)


@caught_by("test_a_stale_epoch_is_refused")
class DeleteIgnoresTheEpoch(MemoryTarget):
    def delete_replica(self, replica_id: str, epoch: int) -> None:
        super().delete_replica(replica_id, epoch + 1000)


@caught_by(
    "test_a_sealed_point_survives_the_engine",
    "test_seal_tells_the_point",
)
class SealTellsItsOwnTime(MemoryWriter):
    def seal(self, spec: SealSpec) -> StoredPoint:
        point = super().seal(spec)
        return attrs.evolve(point, taken_at=point.sealed_at)


@caught_by("test_several_threads_write")
class ThreadsLoseWrites(MemoryWriter):
    """Of two threads that write, the later one undoes what the earlier one wrote."""

    _seen: frozenset[int] = frozenset()

    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        me = threading.get_ident()
        if me not in self._seen and threading.current_thread() is not threading.main_thread():
            self._seen |= {me}
            self._calls.clear()
        super().write(disk_id, offset, data)


@caught_by("test_a_read_only_target_leaves_all_as_it_was")
class ReadOnlyIsJustAFailure(MemoryReplica):
    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        try:
            return super().open_cycle(spec)
        except TargetReadOnly as problem:
            raise DriverFailed(operation="open", site=self._session.site, detail=str(problem)) from problem


@caught_by(
    "test_allocated_covers_the_head",
    "test_zeroes_stay_thin",
)
class HeadIsAllocatedInPart(MemoryReplica):
    def allocated(self, disk_id: str) -> list[Extent]:
        return [item for item in super().allocated(disk_id) if not item.zero]


@caught_by("test_an_unknown_point_is_not_found")
class UnknownPointReadsTheHead(MemoryReplica):
    def reader(self, disk_id: str, point_id: str | None = None) -> DiskReader:
        known = point_id in {point.id for point in self.info().points}
        return super().reader(disk_id, point_id if known else None)


@caught_by("test_a_disk_may_come")
class NewDisksAreForgotten(MemoryReplica):
    def info(self) -> ReplicaInfo:
        info = super().info()
        first = info.points[0].disks if info.points else info.disks
        return attrs.evolve(info, disks={disk: size for disk, size in info.disks.items() if disk in first})


@caught_by("test_a_new_replica_is_empty")
class NewReplicaHasNoDisks(MemoryReplica):
    def info(self) -> ReplicaInfo:
        info = super().info()
        return info if info.points else attrs.evolve(info, disks={})


@caught_by("test_an_unknown_replica_is_not_found")
class UnknownReplicaIsEmpty(MemoryTarget):
    def replica(self, replica_id: str) -> Replica:
        if replica_id == "no-such-replica":
            replica_id = self.replicas()[0]
        return super().replica(replica_id)


@caught_by("test_a_deleted_replica_is_gone")
class DeletedReplicaStays(MemoryTarget):
    def delete_replica(self, replica_id: str, epoch: int) -> None:
        with self._session.look() as state:
            if replica_id in state.replicas:
                state.replicas[replica_id].own(epoch)


@caught_by("test_damage_of_a_point_is_found")
class NothingIsDamaged(MemoryReplica):
    def examine(
        self, point_id: str, *, start: int | None = None, limit: int | None = None, watch: Watch | None = None
    ) -> Examination:
        return attrs.evolve(super().examine(point_id, start=start, limit=limit, watch=watch), damage=())


@caught_by("test_damage_of_a_point_is_found", "test_an_examination_may_be_divided")
class ExaminationEndsAfterTheFirstPart(MemoryReplica):
    def examine(
        self, point_id: str, *, start: int | None = None, limit: int | None = None, watch: Watch | None = None
    ) -> Examination:
        return attrs.evolve(super().examine(point_id, start=start, limit=limit, watch=watch), end=None)


@caught_by("test_a_whole_point_is_found_whole", "test_damage_of_a_point_is_found")
class EarlierPointsAreComparedWithTheHead(MemoryReplica):
    def examine(
        self, point_id: str, *, start: int | None = None, limit: int | None = None, watch: Watch | None = None
    ) -> Examination:
        found = super().examine(point_id, start=start, limit=limit, watch=watch)
        if point_id == self.info().head:
            return found
        return attrs.evolve(found, damage=("disk vda: it is not the head",))


@caught_by("test_a_mark_of_damage_changes_nothing_else")
class DamageDeletesThePoint(MemoryReplica):
    def mark_damaged(self, point_id: str, damaged: str, epoch: int | None = None) -> None:
        with self._session.change() as state:
            points = state.replica(self._id).points
            points[:] = [item for item in points if item.point.id != point_id]


@caught_by("test_recorded_digests_are_those_of_the_head")
class OldDigestsAreAnswered(MemoryReplica):
    def from_records(self) -> Replica:
        replica = type(self)(self._session, self._id)
        first = self.info().points[0].id
        read = replica.reader
        replica.reader = lambda disk_id, point_id=None: read(disk_id, point_id or first)  # type: ignore[method-assign]
        return replica


@caught_by("test_capacity_makes_sense")
class CapacityIsNegative(MemoryTarget):
    def capacity(self) -> Capacity:
        return Capacity(super().capacity().total, -1)


@caught_by("test_findings_are_findings")
class TargetFindingsAreText(MemoryTarget):
    def findings(self, description: Description, policy: Policy) -> list[Finding]:
        return ["the target is small"]  # type: ignore[list-item]
