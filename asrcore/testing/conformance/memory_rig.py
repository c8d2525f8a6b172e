"""The rig of the memory driver, as an example of one: two worlds and a machine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from asrcore.driver import Driver, Instance, MachineView, Site
from asrcore.model.machine import Machine, PowerState
from asrcore.model.point import Consistency
from asrcore.testing.conformance.rig import ConformanceRig
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.units import KiB, MiB

__all__ = ["MemoryRig"]

_STAMP = 32 * KiB  # where stamps are, on the first disk


class MemoryRig(ConformanceRig):
    """Worlds `NAME-home` and `NAME-away`; machine `web` with two disks. A variant of the driver may be given.

    Without `holds_still` the machines are read live and settle at the end, as by an agent in the guest.
    """

    consistency = Consistency.FILESYSTEM

    def __init__(
        self, name: str = "conformance", driver: MemoryDriver | None = None, *, holds_still: bool = True
    ) -> None:
        super().__init__()
        self.driver: Driver = driver or MemoryDriver()
        self.machine_id = "web"
        self.home = self.make_world(f"{name}-home")
        self.away = self.make_world(f"{name}-away")
        self.away.configure(networks={"lan", "dmz"})
        self._random = random.Random(7)
        self._disks = 0
        self._holds_still = holds_still
        self._make_machine("web")
        self._connect()

    def make_world(self, name: str) -> MemoryWorld:
        """Where the worlds are: by default in this process."""
        return MemoryWorld(name)

    def _make_machine(self, machine_id: str) -> None:
        machine = self.home.add_machine(machine_id, {"vda": 512 * KiB, "vdb": 192 * KiB + 512})
        machine.configure(consistency=self.consistency, holds_still=self._holds_still)
        machine.write("vda", 64 * KiB, self._random.randbytes(128 * KiB))
        machine.write("vdb", 0, self._random.randbytes(64 * KiB))

    def _connect(self) -> None:
        self._source: Site = self.driver.connect("home", {"world": self.home.name})
        self._target: Site = self.driver.connect("away", {"world": self.away.name})

    @property
    def source_site(self) -> Site:
        return self._source

    @property
    def target_site(self) -> Site:
        return self._target

    def restart(self) -> None:
        self.home.crash()
        self.away.crash()
        self._connect()

    # -- source

    def change(self, machine_id: str) -> None:
        machine = self.home.machine(machine_id)
        for disk_id, size in self._sizes(machine.value).items():
            machine.write(disk_id, self._random.randrange(64 * KiB, size // 2), self._random.randbytes(5000))
            machine.write(disk_id, size - 100, self._random.randbytes(100))

    def _sizes(self, machine: Machine) -> Mapping[str, int]:
        return {disk.id: disk.size for disk in machine.disks}

    def discard(self, machine_id: str) -> None:
        machine = self.home.machine(machine_id)
        machine.write("vda", 128 * KiB, self._random.randbytes(64 * KiB))
        machine.discard("vda", 128 * KiB, 64 * KiB)

    def still(self, machine_id: str) -> AbstractContextManager[None]:
        return nullcontext()  # it writes in `change` only

    def sha256(self, machine_id: str, disk_id: str) -> str:
        return self.home.machine(machine_id).sha256(disk_id)

    def lose_tracking(self, machine_id: str) -> None:
        self.home.machine(machine_id).lose_tracking()

    def lose_view(self, machine_id: str) -> None:
        self.home.machine(machine_id).lose_views()

    def leftovers(self, machine_id: str) -> list[str]:
        machine = self.home.machine(machine_id)
        return [*machine.marks, *machine.views]

    def add_disk(self, machine_id: str) -> str:
        self._disks += 1
        disk_id = f"extra{self._disks}"
        self.replace_disk(machine_id, disk_id)
        return disk_id

    def replace_disk(self, machine_id: str, disk_id: str) -> None:
        machine = self.home.machine(machine_id)
        machine.add_disk(disk_id, 192 * KiB)
        machine.write(disk_id, 64 * KiB, self._random.randbytes(64 * KiB))

    def grow_disk(self, machine_id: str, disk_id: str) -> None:
        self.home.machine(machine_id).grow_disk(disk_id, 320 * KiB)

    def remove_disk(self, machine_id: str, disk_id: str) -> None:
        self.home.machine(machine_id).remove_disk(disk_id)

    def second_machine(self) -> str:
        if "db" not in {machine.id for machine in self._source.inventory.machines()}:
            self._make_machine("db")
        return "db"

    def stamp(self, machine_id: str, number: int) -> None:
        self.home.machine(machine_id).write("vda", _STAMP, number.to_bytes(8, "big"))

    def stamp_in(self, view: MachineView) -> int:
        data = bytearray(8)
        with view.disks["vda"].reader() as reader:
            reader.read_into(_STAMP, memoryview(data))
        return int.from_bytes(data, "big")

    # -- power and quarantine

    @contextmanager
    def ignore_shutdown(self, machine_id: str) -> Iterator[None]:
        self.home.machine(machine_id).configure(ignores_shutdown=True)
        yield
        self.home.machine(machine_id).configure(ignores_shutdown=False)

    def start_past_driver(self, machine_id: str) -> None:
        self.home.machine(machine_id).start()

    # -- target

    @contextmanager
    def full_target(self) -> Iterator[None]:
        self.away.fill(1 * MiB)
        yield
        self.away.make_room()

    @contextmanager
    def read_only_target(self) -> Iterator[None]:
        self.away.configure(read_only=True)
        yield
        self.away.configure(read_only=False)

    def damage_point(self, replica_id: str, point_id: str, disk_id: str, offset: int) -> None:
        self.away.damage_point(replica_id, point_id, disk_id, offset)

    @contextmanager
    def unreachable_target(self) -> Iterator[None]:
        self.away.cut()
        yield
        self.away.restore()

    # -- failover

    def change_instance(self, instance: Instance) -> None:
        machine = self.away.machine(instance.machine_id)
        for disk_id, size in self._sizes(machine.value).items():
            machine.write(disk_id, 0, b"written by the instance")
            machine.write(disk_id, size - 23, b"written by the instance")

    def check_instance(self, instance: Instance) -> None:
        machine = self.away.machine(instance.machine_id)
        assert machine.value.power is PowerState.RUNNING
        for disk in machine.value.disks:
            middle = machine.read(disk.id, 64 * KiB, disk.size - 128 * KiB)
            key = f"{instance.machine_id}/{disk.id}"
            seen = self.notes.setdefault(key, hashlib.sha256(middle).hexdigest())
            assert seen == hashlib.sha256(middle).hexdigest(), f"disk {disk.id} changed under the instance"

    def target_sha256(self, machine_id: str, disk_id: str) -> str:
        return self.away.machine(machine_id).sha256(disk_id)

    def remove_target_machine(self, machine_id: str) -> None:
        self.away.remove_machine(machine_id)

    def make_target_machine(self, machine: Machine) -> str:
        made = self.away.add_machine(machine.id, self._sizes(machine), name=machine.name, power=PowerState.OFF)
        for disk in machine.disks:
            made.write(disk.id, 4 * KiB, self._random.randbytes(100 * KiB), offline=True)
        return machine.id

    def other_network(self) -> str:
        return "dmz"

    def target_leftovers(self, replica_id: str) -> list[str]:
        with self.away.look() as state:
            replica = state.replica(replica_id)
            return [*state.machines, *replica.tests, *state.left_disks, str(replica.promotion)]
