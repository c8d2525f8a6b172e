"""What the conformance kit needs to know of a platform: the rig that a driver author writes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import NoReturn

import pytest

from asrcore.driver import Closing, Driver, Instance, MachineView, Site
from asrcore.model.machine import Machine
from asrcore.model.point import Consistency
from asrcore.units import KiB, MiB

__all__ = ["ConformanceRig"]


class ConformanceRig(Closing):
    """A platform under test: two sites and a machine to be protected.

    Subclass it, define what raises NotImplementedError, and as much of the rest as your platform supports: tests that
    need what is not defined are skipped with a reason. One rig serves many tests in any order; what is expensive (a
    machine that boots, a first copy) is made once per rig. Leaving `with rig:` cleans up.
    """

    driver: Driver
    """The driver under test."""
    machine_id: str
    """A machine at the source site, fit for protection; running where the site has POWER."""
    consistency: Consistency = Consistency.CRASH
    """The best consistency that the machine's guest supports: a view that claims more is wrong."""
    views_survive: bool = True
    """Whether a frozen view stays at the source when the engine is killed."""
    thin: bool = True
    """Whether the target can keep zeroed ranges of a mebibyte without storing them."""
    disk_sizes: Mapping[str, int] = {"vda": 3 * MiB, "vdb": 1 * MiB + 68 * KiB + 512}
    """Two disks for replicas that are filled by the kit itself, in bytes: the first of at least 3 MiB. Change them
    where the platform wants rounder sizes."""
    boot_timeout: float = 60.0
    """Seconds within which a machine must be reported as running."""

    def __init__(self) -> None:
        self.shared = ExitStack()
        """Closed with the rig: what the kit made once for several tests."""
        self.notes: dict[str, object] = {}
        """Of the kit, about what it made once."""

    def close(self) -> None:
        """Clean up; extend it by what your rig made."""
        self.shared.close()
        self.notes.clear()

    # -- needed by all ---------------------------------------------------------------------------------------------

    @property
    def source_site(self) -> Site | None:
        """The connected site of the machine; None if there is none (then what needs a source is skipped).

        The source of a driver that is only a target may be of another driver, such as `asrcore.testing.memory`.
        """
        raise NotImplementedError("ConformanceRig.source_site: return the connected source site, or None")

    @property
    def target_site(self) -> Site | None:
        """The connected site for replicas; None if there is none (then what needs a target is skipped)."""
        raise NotImplementedError("ConformanceRig.target_site: return the connected target site, or None")

    def restart(self) -> None:
        """The engine is killed and comes back: drop both connections as a kill would, connect again."""
        raise NotImplementedError("ConformanceRig.restart: drop the connections without closing them, connect again")

    def abandon(self, handle: Closing) -> None:
        """The engine is about to be killed while it holds this view, reader or writer. By default it is left as it
        is. Where its locks outlive the handle within one process, free them, but flush and seal nothing."""

    # -- needed of a source ------------------------------------------------------------------------------------------

    def wait_for_guest(self, machine_id: str) -> None:
        """Return when the machine's guest is up, in case it is booting: the kit may just have powered it on. Needed
        where a view does not survive a boot, or `change` does not wait for it."""

    def change(self, machine_id: str) -> None:
        """Make the machine change a little (much less than half) of one or more disks; return when it is on disk."""
        raise NotImplementedError("ConformanceRig.change: make the machine write, wait until it is on its disks")

    def discard(self, machine_id: str) -> None:
        """Make the machine discard (fstrim) at least 64 KiB, aligned to 64 KiB, that held data until now."""
        self._cannot("make a machine discard data")

    def still(self, machine_id: str) -> AbstractContextManager[None]:
        """The machine writes nothing within this context (it is paused, or its workload is). Needed for a source whose
        views do not freeze whole disks."""
        self._cannot("keep a machine from writing")

    def sha256(self, machine_id: str, disk_id: str) -> str:
        """Hex digest of a disk's content now, by other means than the driver's; called while it is `still`."""
        self._cannot("read a machine's disk without the driver")

    def lose_tracking(self, machine_id: str) -> None:
        """Break the change tracking of all disks, as a crash of the host would. The machine runs afterwards."""
        self._cannot("break change tracking")

    def lose_view(self, machine_id: str) -> None:
        """End the view that is open now, from the platform's side; return when it has ended. The machine runs
        afterwards."""
        self._cannot("end a view early")

    def leftovers(self, machine_id: str) -> list[str]:
        """Names of the driver's marks, views and scratch files that are at the source."""
        self._cannot("list marks and left-overs at the source")

    def add_disk(self, machine_id: str) -> str:
        """Attach a disk with some data, return its id."""
        self._cannot("attach a disk")

    def replace_disk(self, machine_id: str, disk_id: str) -> None:
        """Put another disk in the place of one made by `add_disk`, of the same id, with some other data."""
        self._cannot("replace a disk")

    def grow_disk(self, machine_id: str, disk_id: str) -> None:
        """Grow a disk made by `add_disk`."""
        self._cannot("grow a disk")

    def remove_disk(self, machine_id: str, disk_id: str) -> None:
        """Detach and delete a disk made by `add_disk`."""
        self._cannot("detach a disk")

    # Groups

    def second_machine(self) -> str:
        """Id of another machine of the source site, running."""
        self._cannot("offer a second machine")

    def stamp(self, machine_id: str, number: int) -> None:
        """Make the machine write this number to a fixed place; return when it is on its disk."""
        self._cannot("stamp a machine")

    def stamp_in(self, view: MachineView) -> int:
        """The number that a frozen machine holds; 0 if it was never stamped."""
        self._cannot("read a stamp")

    # -- needed for power and quarantine -------------------------------------------------------------------------------

    def ignore_shutdown(self, machine_id: str) -> AbstractContextManager[None]:
        """Within this context the guest ignores a request to shut down."""
        self._cannot("make a guest ignore a shutdown")

    def start_past_driver(self, machine_id: str) -> None:
        """Start a machine of the source site by the platform's own means, even a fenced one."""
        self._cannot("start a machine without the driver")

    # -- needed of a target --------------------------------------------------------------------------------------------

    def full_target(self) -> AbstractContextManager[None]:
        """Within this context the target takes at most 1 MiB more data."""
        self._cannot("fill the target")

    def read_only_target(self) -> AbstractContextManager[None]:
        """Within this context the target's storage cannot be written."""
        self._cannot("make the target read-only")

    def unreachable_target(self) -> AbstractContextManager[None]:
        """Within this context the target does not answer."""
        self._cannot("cut the link to the target")

    def damage_point(self, replica_id: str, point_id: str, disk_id: str, offset: int) -> None:
        """Change a byte of a recovery point's disk past the driver, as a bad disk would."""
        self._cannot("damage a recovery point")

    # -- needed of failover --------------------------------------------------------------------------------------------

    def change_instance(self, instance: Instance) -> None:
        """Make a running machine at the target write to all its disks (its boot may do); return when it has."""
        raise NotImplementedError("ConformanceRig.change_instance: make the machine at the target write")

    def check_instance(self, instance: Instance) -> None:
        """Raise AssertionError unless the running machine at the target is whole (its file systems answer, its
        ledger has no gap). By default being reported as running is enough."""

    def target_sha256(self, machine_id: str, disk_id: str) -> str:
        """Hex digest of a disk of a stopped machine at the target, by other means than the driver's."""
        self._cannot("read a disk at the target without the driver")

    def remove_target_machine(self, machine_id: str) -> None:
        """Delete a machine with its disks at the target; an unknown one is ignored."""
        raise NotImplementedError("ConformanceRig.remove_target_machine: delete a machine at the target")

    def make_target_machine(self, machine: Machine) -> str:
        """Make a stopped machine of the user's at the target with this id and name, and disks of these ids and sizes
        that hold some data. Return its id: another one where the asked one cannot be an id on your platform (those of
        the rig's own machines can)."""
        self._cannot("make a machine at the target")

    def other_network(self) -> str:
        """Name of a network of the target that the machine is not plugged into at the source."""
        self._cannot("name another network of the target")

    def target_leftovers(self, replica_id: str) -> list[str]:
        """Names of files, images and machines of a replica, its points excluded, that are at the target: what must
        be the same after a test failover as before it."""
        self._cannot("list left-overs at the target")

    # ------------------------------------------------------------------------------------------------------------------

    def _cannot(self, what: str) -> NoReturn:
        pytest.skip(f"rig {type(self).__name__} cannot {what}")
