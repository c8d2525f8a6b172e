"""Frozen views and change tracking in a memory world.

Every mark collects the blocks that change from its view's instant on. A view takes a snapshot of each disk and,
for each mark, of what it has collected, so that what `changed` says belongs to the very instant that is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asrcore.crashpoint import reach
from asrcore.driver import (
    Capability,
    DiskReader,
    DiskView,
    FrozenView,
    MachineView,
    Source,
    Tracking,
    ViewRequest,
)
from asrcore.errors import SiteUnreachable, UnsupportedOperation, ViewLost
from asrcore.model.extent import Extent
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from asrcore.testing.memory._session import Session
from asrcore.testing.memory._state import DirtyDisk, FrozenDisk, MachineState, ViewState, WorldState

__all__ = ["MemoryFrozenView", "MemorySource"]

_ORDER = (Consistency.CRASH, Consistency.FILESYSTEM, Consistency.APPLICATION)


class MemorySource(Source):
    """See `Source`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        with self._session.look() as state:
            machine = state.machine(machine_id)
            found = list(machine.findings)
            found += [
                Finding(
                    "disk-untracked",
                    Severity.WARNING,
                    f"changes of disk {disk.disk.id} are not tracked",
                    "The disk was added with tracked=False.",
                    "Each cycle compares the whole disk; replace it by a tracked disk.",
                )
                for disk in machine.disks.values()
                if not disk.tracked
            ]
            if machine.power is PowerState.RUNNING and not _can(machine, policy.consistency):
                found.append(
                    Finding(
                        "consistency-limited",
                        Severity.WARNING,
                        f"the guest offers {machine.consistency.value} consistency only",
                        "Nothing in the guest freezes its applications or file systems.",
                        "Recovery points will record this consistency; install the guest's agent for more.",
                    )
                )
            return found

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        if len(requests) > 1:
            self._session.need(Capability.GROUPS, "freeze several machines at one barrier")
        if not requests or len({request.machine_id for request in requests}) < len(requests):
            raise UnsupportedOperation(driver="memory", operation="freeze no machine, or one twice")
        with self._session.change() as state:
            views = self._still_frozen(state, requests) or self._freeze(state, requests, consistency)
            self._session.world.open_views.update((item.machine_id, item.view_id) for item in requests)
        reach("source.view.opened")
        return MemoryFrozenView(self._session, requests, views, consistency)

    def _still_frozen(self, state: WorldState, requests: Sequence[ViewRequest]) -> dict[str, ViewState] | None:
        """The views of these ids, if all are there and of one instant."""
        views = {item.machine_id: state.machine(item.machine_id).views.get(item.view_id) for item in requests}
        found = {machine_id: view for machine_id, view in views.items() if view is not None}
        one_instant = len({view.barrier for view in found.values()}) == 1
        return found if one_instant and len(found) == len(views) else None

    def _freeze(
        self, state: WorldState, requests: Sequence[ViewRequest], consistency: Consistency
    ) -> dict[str, ViewState]:
        for request in requests:
            state.machine(request.machine_id)  # all are there before any is frozen
        taken_at = self._session.world.clock()
        barrier = state.number()
        return {
            request.machine_id: self._freeze_one(state, request, consistency, taken_at, barrier) for request in requests
        }

    def _freeze_one(
        self, state: WorldState, request: ViewRequest, asked: Consistency, taken_at: float, barrier: int
    ) -> ViewState:
        machine = state.machine(request.machine_id)
        view = freeze(state, machine, asked, taken_at, barrier, whole=machine.holds_still)
        machine.views[request.view_id] = view
        return view

    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        kept = {mark.token for mark in keep}
        with self._session.change() as state:
            machine = state.machine(machine_id)
            for token in [token for token in machine.marks if token not in kept]:
                del machine.marks[token]
            left = [view_id for view_id in machine.views if (machine_id, view_id) not in self._session.world.open_views]
            for view_id in left:
                del machine.views[view_id]
        reach("source.marks.released")


def freeze(
    state: WorldState, machine: MachineState, asked: Consistency, taken_at: float, barrier: int, *, whole: bool
) -> ViewState:
    """The machine as it is now, and a new mark to track changes from."""
    tracked = [disk for disk in machine.disks.values() if disk.tracked]
    mark = None
    if Capability.TRACKING in state.capabilities and tracked:
        mark = f"{machine.base.id}/{state.number()}"
        machine.marks[mark] = {disk.disk.id: DirtyDisk(disk.serial, set()) for disk in tracked}
    return ViewState(
        barrier=barrier,
        taken_at=taken_at,
        description=machine.description,
        consistency=obtained(machine, asked),
        mark=mark,
        disks={
            disk_id: FrozenDisk(
                disk.disk, disk.serial, disk.content.snapshot() if whole else disk.content, disk.tracked, whole
            )
            for disk_id, disk in machine.disks.items()
        },
        dirty={
            token: {disk_id: dirty.frozen() for disk_id, dirty in known.items()}
            for token, known in machine.marks.items()
        },
        notices=tuple(item for item in machine.findings if item.severity is Severity.WARNING),
        halted=machine.halted if machine.power is PowerState.PAUSED else "",
    )


def obtained(machine: MachineState, asked: Consistency) -> Consistency:
    """What a view of the machine has, whatever was asked for."""
    if machine.power is PowerState.OFF:
        return Consistency.OFFLINE
    return asked if _can(machine, asked) else machine.consistency


def _can(machine: MachineState, asked: Consistency) -> bool:
    return asked in _ORDER and _ORDER.index(asked) <= _ORDER.index(machine.consistency)


class MemoryFrozenView(FrozenView):
    """See `FrozenView`. The state is at the source; this handle ends with the engine."""

    def __init__(
        self,
        session: Session,
        requests: Sequence[ViewRequest],
        views: Mapping[str, ViewState],
        asked: Consistency,
    ) -> None:
        self._session = session
        self._asked = asked
        self._view_ids = {item.machine_id: item.view_id for item in requests}
        self._closed = False
        first = next(iter(views.values()))
        self.taken_at = first.taken_at
        self._barrier = first.barrier
        self._machines = {item.machine_id: _MachineView(self, item, views[item.machine_id]) for item in requests}
        self.machines = self._machines

    def confirm(self) -> None:
        with self._session.look() as state:
            for machine_id in self._view_ids:
                self.check(state, machine_id)

    def settle(self) -> Mapping[str, Mapping[str, Sequence[Extent]]]:
        if all(machine.settled for machine in self._machines.values()):
            return {}
        with self._session.change() as state:
            for machine_id in self._view_ids:
                self.check(state, machine_id)
            self.taken_at, self._barrier = self._session.world.clock(), state.number()
            again = {machine_id: self._settle_one(state, machine_id) for machine_id in self._view_ids}
        reach("source.view.settled")
        return again

    def _settle_one(self, state: WorldState, machine_id: str) -> dict[str, list[Extent]]:
        """Freeze the machine now; what changed since the view was opened has to be read again."""
        machine, view_id = state.machine(machine_id), self._view_ids[machine_id]
        before = machine.views[view_id]
        known = {} if before.mark is None else machine.marks.get(before.mark, {})
        now = freeze(state, machine, self._asked, self.taken_at, self._barrier, whole=True)
        if _shape(now) != _shape(before):
            raise ViewLost(machine=machine_id, detail="its disks came, went or grew while they were read")
        machine.views[view_id] = now
        self._machines[machine_id].settle(now)
        again = {}
        for disk_id, disk in now.disks.items():
            blocks = known[disk_id].blocks if disk_id in known else None
            again[disk_id] = disk.content.extents() if blocks is None else disk.content.extents_of(blocks)
        return again

    def read_into(self, machine_id: str, content: FrozenDisk, offset: int, buffer: memoryview) -> None:
        """Read a frozen disk while the view stands."""
        with self._session.look() as state:
            self.check(state, machine_id)
        content.content.read_into(offset, buffer)  # a snapshot never changes: no lock is needed

    def check(self, state: WorldState, machine_id: str) -> None:
        """Raises ViewLost when the source does not have the view any more."""
        machine = state.machines.get(machine_id)
        view = machine.views.get(self._view_ids[machine_id]) if machine else None
        if self._closed or view is None or view.barrier != self._barrier:
            raise ViewLost(machine=machine_id, detail="it was closed" if self._closed else "the source dropped it")

    def close(self) -> None:
        if self._closed or not self._session.alive:
            return
        self._closed = True
        try:
            with self._session.change() as state:
                for machine_id, view_id in self._view_ids.items():
                    self._session.world.open_views.discard((machine_id, view_id))
                    if machine_id in state.machines:
                        state.machines[machine_id].views.pop(view_id, None)
        except SiteUnreachable:
            return  # it stays at the source as a left-over, for `keep_marks`
        reach("source.view.closed")


def _shape(view: ViewState) -> dict[str, tuple[int, int]]:
    return {disk_id: (disk.serial, disk.disk.size) for disk_id, disk in view.disks.items()}


class _MachineView(MachineView):
    def __init__(self, view: MemoryFrozenView, request: ViewRequest, frozen: ViewState) -> None:
        self._take(frozen)
        known = None if request.since is None else frozen.dirty.get(request.since.token)
        self._disks = {disk_id: _DiskView(view, request, disk, known) for disk_id, disk in frozen.disks.items()}
        self.disks = dict(self._disks)

    def _take(self, frozen: ViewState) -> None:
        self.description = frozen.description
        self.halted = frozen.halted
        self.consistency = frozen.consistency
        self.mark = None if frozen.mark is None else Mark(frozen.mark)
        self.notices = frozen.notices

    @property
    def settled(self) -> bool:
        """Whether all of it is frozen."""
        return all(disk.frozen.whole for disk in self._disks.values())

    def settle(self, frozen: ViewState) -> None:
        """Be of that instant from now on."""
        self._take(frozen)
        for disk_id, disk in self._disks.items():
            disk.frozen = frozen.disks[disk_id]


class _DiskView(DiskView):
    def __init__(
        self, view: MemoryFrozenView, request: ViewRequest, frozen: FrozenDisk, known: Mapping[str, DirtyDisk] | None
    ) -> None:
        self.disk = frozen.disk
        self.whole = frozen.whole
        self._view = view
        self._machine_id = request.machine_id
        self.frozen = frozen
        self._dirty = None if known is None else known.get(frozen.disk.id)
        self.tracking, self.reason = self._judge(request.since, known)

    def _judge(self, since: Mark | None, known: Mapping[str, DirtyDisk] | None) -> tuple[Tracking, str]:
        if since is None or not self.frozen.tracked:
            return Tracking.NONE, "" if self.frozen.tracked else "the disk's changes are not tracked"
        if known is None:
            return Tracking.LOST, f"the source does not know mark {since.token}"
        if self._dirty is None or self._dirty.serial != self.frozen.serial:
            return Tracking.NEW, ""
        if self._dirty.blocks is None:
            return Tracking.LOST, f"the change log of disk {self.disk.id} is lost"
        return Tracking.CHANGED, ""

    def changed(self) -> list[Extent]:
        if self.tracking is not Tracking.CHANGED or self._dirty is None:
            raise ValueError(f"changes of disk {self.disk.id} are not known: {self.tracking.value}")
        return self.frozen.content.extents_of(self._dirty.blocks or ())

    def allocated(self) -> list[Extent]:
        return self.frozen.content.extents()

    def reader(self) -> DiskReader:
        return _Reader(self._view, self._machine_id, self)


class _Reader(DiskReader):
    def __init__(self, view: MemoryFrozenView, machine_id: str, disk: _DiskView) -> None:
        self._view = view
        self._machine_id = machine_id
        self._disk = disk

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._view.read_into(self._machine_id, self._disk.frozen, offset, buffer)
