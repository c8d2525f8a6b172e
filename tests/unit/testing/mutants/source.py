"""Sources that are broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, cast

import attrs

from asrcore.driver import (
    DiskView,
    FrozenView,
    Tracking,
    ViewRequest,
)
from asrcore.errors import DriverFailed, MachineNotFound
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from asrcore.testing.memory._source import MemorySource
from asrcore.testing.memory._state import ViewState, WorldState
from asrcore.units import MiB

from ._mutant import caught_by


class _ViewMutant(MemorySource):
    """Modifies each disk of a view."""

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        view = super().open_view(requests, consistency=consistency, freeze_limit=freeze_limit)
        for machine_id, machine in view.machines.items():
            for disk in machine.disks.values():
                self.spoil(machine_id, disk)
        return view

    def spoil(self, machine_id: str, disk: DiskView) -> None:
        raise NotImplementedError


class _MachineMutant(MemorySource):
    """Modifies each machine of a view."""

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        view = super().open_view(requests, consistency=consistency, freeze_limit=freeze_limit)
        for machine in view.machines.values():
            self.spoil_machine(machine)
        return view

    def spoil_machine(self, machine: Any) -> None:
        raise NotImplementedError


def _replace(disk: DiskView, method: str, function: Callable[..., object]) -> None:
    setattr(disk, method, function)


@caught_by("test_a_machine_that_runs_is_not_halted")
class RunningMachineIsHalted(_MachineMutant):
    def spoil_machine(self, machine: Any) -> None:
        machine.halted = "it was paused once"


@caught_by(
    "test_a_grown_disk_has_its_new_size",
    "test_a_kept_mark_is_kept",
    "test_a_left_over_view_does_not_disturb_the_next",
    "test_a_mark_outlives_a_view_that_led_to_nothing",
    "test_a_mark_outlives_the_engine",
    "test_a_view_found_again_tells_the_same_changes",
    "test_changes_are_complete",
    "test_changes_while_a_view_is_open_belong_to_the_next",
    "test_deltas_are_equal",
    "test_discarded_data_is_told_as_zeroes",
    "test_tracking_starts_again_after_a_loss",
    "test_what_changed_while_it_was_read_is_read_again",
)
class DeltaMissesItsLastExtent(_ViewMutant):
    def spoil(self, machine_id: str, disk: DiskView) -> None:
        changed = disk.changed
        _replace(disk, "changed", lambda: changed()[:-1])


@caught_by("test_changes_are_not_everything")
class DeltaIsEverything(_ViewMutant):
    def spoil(self, machine_id: str, disk: DiskView) -> None:
        _replace(disk, "changed", disk.allocated)


@caught_by("test_discarded_data_is_told_as_zeroes")
class DiscardsAreNotTold(_ViewMutant):
    def spoil(self, machine_id: str, disk: DiskView) -> None:
        changed = disk.changed
        _replace(disk, "changed", lambda: [item for item in changed() if not item.zero])


@caught_by(
    "test_a_full_copy_is_equal",
    "test_after_a_loss_only_differences_travel",
    "test_allocated_tells_zeroes_truly",
    "test_deltas_are_equal",
)
class ZeroesAreGuessed(_ViewMutant):
    def spoil(self, machine_id: str, disk: DiskView) -> None:
        allocated = disk.allocated
        _replace(disk, "allocated", lambda: [attrs.evolve(item, zero=True) for item in allocated()])


@caught_by(
    "test_a_view_found_again_tells_the_same_changes",
    "test_a_view_is_found_again_by_its_id",
    "test_a_view_is_frozen_while_the_machine_writes",
    "test_deltas_are_equal",
    "test_what_changed_while_it_was_read_is_read_again",
)
class ViewIsNotFrozen(_ViewMutant):
    def spoil(self, machine_id: str, disk: Any) -> None:
        with self._session.look() as state:
            live = state.machine(machine_id).disks[disk.disk.id].content
        disk.frozen = attrs.evolve(disk.frozen, content=live)


@caught_by(
    "test_a_lost_mark_is_told",
    "test_a_released_mark_is_never_guessed",
    "test_after_a_loss_only_differences_travel",
    "test_an_unknown_mark_is_lost",
)
class LostMarkIsAnsweredByADelta(_ViewMutant):
    def spoil(self, machine_id: str, disk: DiskView) -> None:
        if disk.tracking is Tracking.LOST:
            disk.tracking = Tracking.CHANGED
            _replace(disk, "changed", list)


@caught_by(
    "test_a_replaced_disk_is_new",
    "test_an_added_disk_is_new",
)
class ReplacedDiskKeepsItsDelta(_ViewMutant):
    def spoil(self, machine_id: str, disk: DiskView) -> None:
        if disk.tracking is Tracking.NEW:
            disk.tracking = Tracking.CHANGED
            _replace(disk, "changed", list)


@caught_by(
    "test_a_view_found_again_tells_the_same_changes",
    "test_changes_while_a_view_is_open_belong_to_the_next",
    "test_deltas_are_equal",
    "test_what_changed_while_it_was_read_is_read_again",
)
class ChangesOfTheViewAreForgotten(MemorySource):
    """Tracking for the new mark starts when the view is closed, not when it is opened."""

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        view: Any = super().open_view(requests, consistency=consistency, freeze_limit=freeze_limit)
        close = view.close

        def forgetting() -> None:
            close()
            with self._session.world.change() as state:
                for machine_id, machine in view.machines.items():
                    mark = state.machine(machine_id).marks.get(machine.mark.token if machine.mark else "")
                    for dirty in (mark or {}).values():
                        if dirty.blocks is not None:
                            dirty.blocks = set()

        view.close = forgetting
        return cast(FrozenView, view)


@caught_by(
    "test_a_stopped_machine_is_offline",
    "test_consistency_is_what_was_obtained",
)
class ConsistencyIsAsAsked(MemorySource):
    def _freeze_one(
        self, state: WorldState, request: ViewRequest, asked: Consistency, taken_at: float, barrier: int
    ) -> ViewState:
        view = super()._freeze_one(state, request, asked, taken_at, barrier)
        machine = state.machine(request.machine_id)
        view = attrs.evolve(view, consistency=asked)
        machine.views[request.view_id] = view
        return view


@caught_by("test_a_stopped_machine_is_offline")
class StoppedMachineIsNotOffline(MemorySource):
    def _freeze_one(
        self, state: WorldState, request: ViewRequest, asked: Consistency, taken_at: float, barrier: int
    ) -> ViewState:
        view = super()._freeze_one(state, request, asked, taken_at, barrier)
        machine = state.machine(request.machine_id)
        if machine.power is PowerState.OFF:
            view = attrs.evolve(view, consistency=Consistency.CRASH)
        machine.views[request.view_id] = view
        return view


@caught_by("test_a_group_is_frozen_at_one_barrier")
class GroupHasNoBarrier(MemorySource):
    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        views: list[Any] = []
        for request in requests:
            views.append(super().open_view([request], consistency=consistency, freeze_limit=freeze_limit))
            if len(requests) > 1:
                time.sleep(1)
        first = views[0]
        first.machines = {
            request.machine_id: view.machines[request.machine_id] for request, view in zip(requests, views, strict=True)
        }
        return cast(FrozenView, first)


@caught_by("test_a_view_is_found_again_by_its_id")
class ViewIsNotFoundAgain(MemorySource):
    def _still_frozen(self, state: WorldState, requests: Sequence[ViewRequest]) -> None:
        return None


@caught_by(
    "test_a_kept_mark_is_kept",
    "test_a_left_over_view_does_not_disturb_the_next",
)
class KeepMarksReleasesTheKept(MemorySource):
    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        super().keep_marks(machine_id, keep[1:])


@caught_by("test_with_nothing_to_keep_nothing_is_left")
class KeepMarksReleasesNothing(MemorySource):
    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        pass


@caught_by("test_a_view_that_ended_early_is_told")
class EarlyEndOfAViewIsNotTold(_ViewMutant):
    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        view: Any = super().open_view(requests, consistency=consistency, freeze_limit=freeze_limit)
        view.check = lambda state, machine_id: None
        return cast(FrozenView, view)

    def spoil(self, machine_id: str, disk: DiskView) -> None:
        pass


@caught_by("test_the_machine_is_fit")
class FindingsAreErrors(MemorySource):
    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        return [Finding("unfit", Severity.ERROR, "unfit", "", "")]


@caught_by("test_a_view_has_all_disks")
class ViewLacksADisk(_MachineMutant):
    def spoil_machine(self, machine: Any) -> None:
        machine.disks.pop("vdb", None)


@caught_by("test_a_removed_disk_is_gone")
class RemovedDiskStaysInTheDescription(_MachineMutant):
    def spoil_machine(self, machine: Any) -> None:
        known = self._session.world.__dict__.setdefault("known_disks", {})
        known.update({disk.id: disk for disk in machine.description.machine.disks})
        described = attrs.evolve(machine.description.machine, disks=tuple(known.values()))
        machine.description = attrs.evolve(machine.description, machine=described)


@caught_by(
    "test_a_grown_disk_has_its_new_size",
    "test_allocated_covers_the_disk",
)
class AllocatedHasGaps(_ViewMutant):
    def spoil(self, machine_id: str, disk: DiskView) -> None:
        allocated = disk.allocated
        _replace(disk, "allocated", lambda: [item for item in allocated() if not item.zero])


@caught_by("test_a_view_equals_the_machine")
class SomeBlocksReadAsZeroes(_ViewMutant):
    """Always the same wrong content, so that only a comparison with the machine detects it."""

    def spoil(self, machine_id: str, disk: Any) -> None:
        content = disk.frozen.content.snapshot()
        content.zero(100 * 1024, 4096)
        disk.frozen = attrs.evolve(disk.frozen, content=content)


@caught_by(
    "test_after_a_loss_only_differences_travel",
    "test_digests_are_of_the_content",
)
class SourceDigestsAreOfSomethingElse(_ViewMutant):
    def spoil(self, machine_id: str, disk: DiskView) -> None:
        digests = disk.digests
        _replace(disk, "digests", lambda extent: digests(extent)[::-1])


@caught_by("test_several_readers_at_once")
class ReadersShareABuffer(_ViewMutant):
    """A reader waits until another one has come between, so that the conflict does not depend on timing."""

    def spoil(self, machine_id: str, disk: Any) -> None:
        frozen = disk._view
        if "read_into" in vars(frozen):
            return
        read_into, shared, turn, reads, alone = frozen.read_into, bytearray(MiB), threading.Condition(), count(), False
        last = -1

        def read_by_way_of_shared(machine_id: str, content: Any, offset: int, buffer: memoryview) -> None:
            nonlocal last, alone
            with turn:
                read_into(machine_id, content, offset, memoryview(shared)[: len(buffer)])
                last = mine = next(reads)
                turn.notify_all()
                if not alone and threading.current_thread() is not threading.main_thread():
                    alone = not turn.wait_for(lambda: last != mine, timeout=5)
            buffer[:] = shared[: len(buffer)]

        frozen.read_into = read_by_way_of_shared


@caught_by("test_without_a_mark_nothing_is_known")
class NothingIsKnownToHaveChanged(_ViewMutant):
    def spoil(self, machine_id: str, disk: DiskView) -> None:
        if disk.tracking is Tracking.NONE:
            disk.tracking = Tracking.CHANGED
            _replace(disk, "changed", list)


@caught_by("test_a_view_of_a_missing_machine")
class MissingMachineIsAnEmptyView(MemorySource):
    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        try:
            return super().open_view(requests, consistency=consistency, freeze_limit=freeze_limit)
        except MachineNotFound as problem:
            raise DriverFailed(operation="freeze", site=self._session.site, detail=str(problem)) from problem


@caught_by(
    "test_a_view_found_again_tells_the_same_changes",
    "test_deltas_are_equal",
    "test_what_changed_while_it_was_read_is_read_again",
    holds_still=False,
)
class SettlingTellsNothing(MemorySource):
    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        view: Any = super().open_view(requests, consistency=consistency, freeze_limit=freeze_limit)
        settle = view.settle
        view.settle = lambda: {machine_id: {} for machine_id in settle()}
        return cast(FrozenView, view)
