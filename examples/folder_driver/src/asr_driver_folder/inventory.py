"""Machines, their power, and quarantine.

A machine runs while there is a file `running` in its folder: whatever works with the disks makes and removes it, as
`power_on` and `power_off` do. `machine.json` may hold the rest of a `Machine`; without it there are defaults.
"""

from __future__ import annotations

import attrs

from asr_driver_folder import files
from asr_driver_folder.place import Place
from asrcore.crashpoint import reach
from asrcore.driver import Fence, Inventory
from asrcore.errors import WrongState
from asrcore.model.machine import Description, Disk, Firmware, Machine, PowerState

__all__ = ["FolderInventory"]


@attrs.frozen
class FolderInventory(Inventory):
    """See `Inventory`."""

    place: Place

    def machines(self) -> list[Machine]:
        self.place.check()
        names = sorted(path.name for path in self.place.path.iterdir() if path.is_dir())
        return [self.machine(name) for name in names if not name.startswith(".")]

    def machine(self, machine_id: str) -> Machine:
        folder = self.place.machine(machine_id)
        known = files.load(Machine, folder / "machine.json") or Machine(machine_id, machine_id, 1, 0, Firmware.BIOS, ())
        images = sorted(folder.glob("*.raw"))
        disks = tuple(Disk(image.stem, image.stat().st_size, location=str(image)) for image in images)
        power = PowerState.RUNNING if (folder / "running").exists() else PowerState.OFF
        return attrs.evolve(known, id=machine_id, disks=disks, power=power)

    def description(self, machine_id: str) -> Description:
        return Description(self.machine(machine_id), "folder")

    def power_on(self, machine_id: str) -> None:
        fence = self.fenced(machine_id)
        if fence is not None:
            why, possible = f"Epoch {fence.epoch}: {fence.reason}.", "re-protect the machine, or undo the failover"
            raise WrongState(machine=machine_id, event="be started", state="fenced", reason=why, possible=possible)
        with self.place.writing(self.place.path):
            (self.place.machine(machine_id) / "running").touch()

    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        # A hypervisor's driver asks the guest here, and raises ShutdownFailed after `timeout`.
        with self.place.writing(self.place.path):
            (self.place.machine(machine_id) / "running").unlink(missing_ok=True)

    def fence(self, machine_id: str, fence: Fence) -> None:
        former = self.fenced(machine_id)
        if former is None or fence.epoch >= former.epoch:
            with self.place.writing(self.place.path):  # first: it cannot be started any more
                files.save(self.place.machine(machine_id) / "fence.json", fence)
            reach("folder.fence-recorded")
            self.power_off(machine_id, graceful=False, timeout=0.0)

    def unfence(self, machine_id: str, epoch: int) -> None:
        fence = self.fenced(machine_id)
        if fence is not None and fence.epoch <= epoch:
            with self.place.writing(self.place.path):
                (self.place.machine(machine_id) / "fence.json").unlink()

    def fenced(self, machine_id: str) -> Fence | None:
        return files.load(Fence, self.place.machine(machine_id) / "fence.json")
