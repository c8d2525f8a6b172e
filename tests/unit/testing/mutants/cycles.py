"""Writers of cycles that are broken."""

from __future__ import annotations

import pickle

import attrs

from asrcore.driver import (
    SealSpec,
    StoredPoint,
)
from asrcore.errors import TargetFull
from asrcore.model.extent import Extent, subtract
from asrcore.testing.memory._content import Content
from asrcore.testing.memory._target import MemoryWriter

from ._mutant import caught_by


@caught_by(
    "test_a_cycle_is_invisible_until_it_is_sealed",
    "test_a_killed_cycle_leaves_the_point_whole",
    "test_discard_drops_the_cycle",
    "test_the_last_call_counts",
)
class CycleIsVisibleOnceFlushed(MemoryWriter):
    def flush(self) -> None:
        super().flush()
        with self._session.change() as state:
            replica = state.replica(self._id)
            for disk_id, log in self._journal(replica).logs.items():
                log.apply(replica.head.setdefault(disk_id, Content(self._spec.disks[disk_id])))


@caught_by(
    "test_a_mark_of_damage_changes_nothing_else",
    "test_a_sealed_point_survives_the_engine",
    "test_dropping_keeps_the_others",
    "test_each_point_has_its_description",
)
class SealIsNotDurable(MemoryWriter):
    def seal(self, spec: SealSpec) -> StoredPoint:
        with self._session.look() as state:
            before = pickle.dumps(state.replica(self._id))
        point = super().seal(spec)
        self._session.world.__dict__.setdefault("lost_at_kill", {}).setdefault(self._id, before)
        return point

    def flush(self) -> None:
        self._session.world.__dict__.get("lost_at_kill", {}).pop(self._id, None)
        super().flush()


@caught_by("test_sealing_again_returns_the_point")
class SealTwiceMakesTwo(MemoryWriter):
    def seal(self, spec: SealSpec) -> StoredPoint:
        with self._session.change() as state:
            replica = state.replica(self._id)
            if replica.head_point == spec.point_id:
                replica.points.append(replica.points[-1])
        return super().seal(spec)


@caught_by(
    "test_a_cycle_is_invisible_until_it_is_sealed",
    "test_a_kept_point_keeps_its_content",
    "test_the_last_call_counts",
    "test_zeroes_read_as_zeroes",
    "test_zeroes_stay_thin",
)
class ZeroesAreIgnored(MemoryWriter):
    def zero(self, disk_id: str, offset: int, length: int) -> None:
        self.same(disk_id, offset, length)


@caught_by("test_zeroes_stay_thin")
class ZeroesAreStored(MemoryWriter):
    def zero(self, disk_id: str, offset: int, length: int) -> None:
        self.write(disk_id, offset, memoryview(bytes(length)))


@caught_by(
    "test_flushed_data_is_done_after_a_kill",
    "test_same_leaves_the_content_and_counts_as_done",
    "test_the_last_call_counts",
)
class SameDoesNotCount(MemoryWriter):
    def same(self, disk_id: str, offset: int, length: int) -> None:
        pass


@caught_by("test_the_last_call_counts")
class SameKeepsEarlierData(MemoryWriter):
    def same(self, disk_id: str, offset: int, length: int) -> None:
        with self._session.look() as state:
            log = state.replica(self._id).journal.logs.get(disk_id)  # type: ignore[union-attr]
            written = log.data if log else []
        for item in subtract([Extent(offset, length)], written):
            super().same(disk_id, item.offset, item.length)


@caught_by(
    "test_a_full_target_leaves_all_as_it_was",
    "test_an_interrupted_copy_goes_on",
    "test_another_cycle_does_not_drop_the_pending_one",
    "test_closing_keeps_what_was_flushed",
    "test_flushed_data_is_done_after_a_kill",
    "test_same_leaves_the_content_and_counts_as_done",
)
class DoneForgets(MemoryWriter):
    def done(self, disk_id: str) -> list[Extent]:
        return []


@caught_by("test_done_tells_only_what_is_durable")
class DoneTellsTooMuch(MemoryWriter):
    def done(self, disk_id: str) -> list[Extent]:
        return sorted([*super().done(disk_id), *(call.extent for call in self._calls if call.disk_id == disk_id)])


@caught_by(
    "test_a_full_target_leaves_all_as_it_was",
    "test_another_cycle_does_not_drop_the_pending_one",
    "test_closing_keeps_what_was_flushed",
    "test_disks_may_grow_while_a_cycle_is_interrupted",
    "test_the_last_call_counts",
)
class CloseDropsTheCycle(MemoryWriter):
    def close(self) -> None:
        with self._session.world.change() as state:
            replica = state.replicas.get(self._id)
            if replica and replica.journal and not replica.journal.commit and not self._closed:
                replica.journal = None
        super().close()


@caught_by("test_a_full_target_leaves_all_as_it_was")
class ErrorDropsTheCycle(MemoryWriter):
    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        try:
            super().write(disk_id, offset, data)
        except TargetFull:
            self.discard()
            raise


@caught_by("test_a_writer_of_the_time_before_cannot_seal")
class OpenWriterIgnoresTheEpoch(MemoryWriter):
    def seal(self, spec: SealSpec) -> StoredPoint:
        with self._session.look() as state:
            self._spec = attrs.evolve(self._spec, epoch=state.replica(self._id).epoch)
        return super().seal(spec)
