"""Frozen views, and what changed since a mark.

A view is a snapshot: copies of the machine's files. It stays after the view is closed, because it is the mark as well;
`keep_marks` deletes it. What changed since a mark is what differs between two snapshots.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from asr_driver_folder import files
from asr_driver_folder.inventory import FolderInventory
from asrcore.crashpoint import reach
from asrcore.driver import DiskReader, DiskView, FrozenView, MachineView, Source, Tracking, ViewRequest
from asrcore.errors import UnsupportedOperation, ViewLost
from asrcore.model.extent import Extent, clip, normalise, split, subtract
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Description, Disk, PowerState
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from asrcore.units import KiB

__all__ = ["FolderSource"]

_TICK = 0.02  # a file's times move with the kernel's clock, every 10 ms at the slowest


@attrs.frozen
class Snapshot:
    """The record of a snapshot. `inodes`: they distinguish a disk from a file that was put in its place."""

    taken_at: float
    description: Description
    inodes: Mapping[str, int]

    @property
    def running(self) -> bool:
        return self.description.machine.power is PowerState.RUNNING


@attrs.frozen
class FolderSource(Source):
    """See `Source`."""

    inventory: FolderInventory

    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        if self.inventory.machine(machine_id).disks:
            return []
        cause, action = "Its folder has no file *.raw.", "Put the machine's disks there, as raw images."
        return [Finding("no-disks", Severity.ERROR, f"{machine_id!r} has no disk", cause, action)]

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        if len(requests) != 1:
            raise UnsupportedOperation(driver="folder", operation="freeze several machines at one barrier")
        request = requests[0]
        running = self.inventory.machine(request.machine_id).power is PowerState.RUNNING
        snapshots = self._snapshots(request.machine_id)
        for folder in snapshots.glob(f"{request.view_id}@*"):
            found = files.load(Snapshot, folder / "snapshot.json")
            # Once the machine has been stopped the view of its running is over: the last delta before a planned
            # failover must show all that was written.
            if found is not None and found.running == running:
                return FolderView(folder, found, request.since)
        folder = snapshots / f"{request.view_id}@{time.time_ns()}"
        with self.inventory.place.writing(folder):
            snapshot = self._freeze(request.machine_id, folder)
        reach("folder.view-frozen")
        return FolderView(folder, snapshot, request.since)

    def _freeze(self, machine_id: str, folder: Path) -> Snapshot:
        """Copy the disks. Nobody can hold the machine up here, so a write in the meantime spoils the copy."""
        before = self._state(machine_id)
        description = self.inventory.description(machine_id)
        time.sleep(_TICK)  # a write from here on changes a file's time for certain
        taken_at = time.time()
        folder.mkdir(parents=True)
        for disk in description.machine.disks:
            image = Path(disk.location)
            files.build(folder / image.name, disk.size, (image, files.data(image)))
        if self._state(machine_id) != before:
            raise ViewLost(machine=machine_id, detail="its files were written while they were copied")
        inodes = {disk.id: before[f"{disk.id}.raw"][0] for disk in description.machine.disks}
        snapshot = Snapshot(taken_at, description, inodes)
        files.save(folder / "snapshot.json", snapshot)  # last: without it the snapshot does not count
        return snapshot

    def _state(self, machine_id: str) -> dict[str, tuple[int, int, int]]:
        there = {path.name: path.stat() for path in self.inventory.place.machine(machine_id).iterdir()}
        return {name: (status.st_ino, status.st_ctime_ns, status.st_size) for name, status in there.items()}

    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        for folder in self._snapshots(machine_id).glob("*"):
            if Mark(folder.name) not in keep:
                self.inventory.place.remove(folder)

    def _snapshots(self, machine_id: str) -> Path:
        return self.inventory.place.ours("snapshots", machine_id)


class FolderView(FrozenView):
    """See `FrozenView`."""

    def __init__(self, folder: Path, snapshot: Snapshot, since: Mark | None) -> None:
        self.taken_at = snapshot.taken_at
        self.machines = {snapshot.description.machine.id: FolderMachineView(folder, snapshot, since)}
        self._record = folder / "snapshot.json"

    def confirm(self) -> None:
        if not self._record.exists():
            raise ViewLost(machine=next(iter(self.machines)), detail=f"{self._record} is gone")


class FolderMachineView(MachineView):
    """See `MachineView`. Nothing in the machine helps, so a running one is crash-consistent at best."""

    def __init__(self, folder: Path, snapshot: Snapshot, since: Mark | None) -> None:
        self.description = snapshot.description
        self.consistency = Consistency.CRASH if snapshot.running else Consistency.OFFLINE
        self.mark = Mark(folder.name)
        self.disks = {}
        former = folder.with_name(since.token) if since else folder
        known = files.load(Snapshot, former / "snapshot.json")
        for disk in snapshot.description.machine.disks:
            tracking, reason = Tracking.CHANGED, ""
            if since is None:
                tracking = Tracking.NONE
            elif known is None:
                tracking, reason = Tracking.LOST, f"there is no snapshot {since.token}"
            elif known.inodes.get(disk.id) != snapshot.inodes[disk.id]:
                tracking = Tracking.NEW
            self.disks[disk.id] = FolderDisk(
                disk, folder / f"{disk.id}.raw", former / f"{disk.id}.raw", tracking, reason
            )


@attrs.frozen
class FolderDisk(DiskView):
    """See `DiskView`. `former` is the disk in the snapshot of the mark."""

    disk: Disk
    image: Path
    former: Path
    tracking: Tracking
    reason: str

    def changed(self) -> list[Extent]:
        if self.tracking is not Tracking.CHANGED:
            raise ValueError(f"changes of disk {self.disk.id} are not known: {self.tracking.value}")
        now, before = files.data(self.image), files.data(self.former)
        discarded = [attrs.evolve(item, zero=True) for item in subtract(clip(before, self.disk.size), now)]
        with self.image.open("rb") as new, self.former.open("rb") as old:

            def differs(piece: Extent) -> bool:
                there, here = (os.pread(file.fileno(), piece.length, piece.offset) for file in (old, new))
                return there != here

            return normalise([*discarded, *filter(differs, split(now, 64 * KiB))])

    def allocated(self) -> list[Extent]:
        return files.allocated(self.image, self.disk.size)

    def reader(self) -> DiskReader:
        machine = self.image.parent.parent.name
        return files.FileReader(self.image, lambda detail: ViewLost(machine=machine, detail=detail))
