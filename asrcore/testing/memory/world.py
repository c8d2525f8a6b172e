"""A platform in memory: its machines and replicas, and everything that may happen to it.

Tests use `MemoryWorld` directly; the driver's roles reach the same state through a session (`_session`).
What the world holds is durable, as a hypervisor and its storage are for the engine: machines, marks, frozen views,
replicas, sealed points, and the flushed part of cycles. Handles and unflushed writes belong to the engine's
process: they end with it, in `crash()` or in a real kill.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs

from asrcore.driver import Capability
from asrcore.model.finding import Finding
from asrcore.model.machine import Artifact, Disk, Firmware, Machine, Nic, PowerState
from asrcore.model.point import Consistency
from asrcore.testing.memory._content import Content, blocks_of
from asrcore.testing.memory._state import DiskState, MachineState, WorldState
from asrcore.units import MiB, TiB

__all__ = ["MemoryMachine", "MemoryWorld"]

_worlds: dict[str, MemoryWorld] = {}


class MemoryWorld:
    """A site's platform. A new one replaces an older one of the same name in this process.

    With `path` the state is kept in that directory, written whole and replaced atomically at each durable step, so
    that several processes (an engine and the test that kills it) see one world. `clock`: seconds since the epoch.
    """

    def __init__(
        self,
        name: str,
        *,
        path: str | os.PathLike[str] | None = None,
        clock: Callable[[], float] = time.time,
        capabilities: frozenset[Capability] = frozenset(Capability),
        capacity: int = TiB,
    ) -> None:
        self.name = name
        self.clock = clock
        self.generation = 0
        self.open_views: set[tuple[str, str]] = set()
        self._lock = threading.RLock()
        self._depth = 0
        self._path = None if path is None else Path(path)
        self._seen: tuple[int, int] | None = None
        self._state = WorldState(name, capabilities, capacity)
        if self._path is not None:
            self._path.mkdir(parents=True, exist_ok=True)
        with self.change():  # writes the file, or reads an existing one
            pass
        _worlds[name] = self

    @classmethod
    def find(cls, name: str) -> MemoryWorld | None:
        """The world of that name in this process."""
        return _worlds.get(name)

    # -- state -----------------------------------------------------------------------------------------------------

    @contextmanager
    def look(self) -> Iterator[WorldState]:
        """The state, to be read."""
        with self._lock, self._shared():
            yield self._state

    @contextmanager
    def change(self) -> Iterator[WorldState]:
        """The state, to be changed; durable when the block is left."""
        with self._lock, self._shared():
            try:
                yield self._state
            finally:
                if self._depth == 1:
                    self._save()

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """One process at a time, with the newest state."""
        self._depth += 1
        try:
            if self._path is None or self._depth > 1:
                yield
                return
            with (self._path / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._load()
                yield
        finally:
            self._depth -= 1

    def _load(self) -> None:
        assert self._path is not None
        file = self._path / "world.pickle"
        if file.exists() and _version(file) != self._seen:
            self._state = pickle.loads(file.read_bytes())
            self._seen = _version(file)

    def _save(self) -> None:
        if self._path is None:
            return
        file = self._path / "world.pickle"
        new = file.with_suffix(".new")
        new.write_bytes(pickle.dumps(self._state, pickle.HIGHEST_PROTOCOL))
        new.replace(file)
        self._seen = _version(file)

    # -- machines --------------------------------------------------------------------------------------------------

    def add_machine(
        self,
        machine_id: str,
        disks: Mapping[str, int],
        *,
        name: str = "",
        power: PowerState = PowerState.RUNNING,
        networks: tuple[str, ...] = ("lan",),
        firmware: Firmware = Firmware.BIOS,
        memory: int = 64 * MiB,
        autostart: bool = False,
    ) -> MemoryMachine:
        """A machine with empty disks of these sizes in bytes. Raises ValueError if the id is taken."""
        with self.change() as state:
            if machine_id in state.machines:
                raise ValueError(f"world {self.name} has a machine {machine_id} already")
            nics = tuple(Nic(_mac(state.number()), network) for network in networks)
            base = Machine(machine_id, name or machine_id, 1, memory, firmware, (), nics)
            state.machines[machine_id] = MachineState(
                base, {}, power, (Artifact("definition", machine_id.encode()),), autostart=autostart
            )
            state.networks.update(networks)
        machine = MemoryMachine(self, machine_id)
        for disk_id, size in disks.items():
            machine.add_disk(disk_id, size)
        return machine

    def machine(self, machine_id: str) -> MemoryMachine:
        """A handle on a machine. Raises MachineNotFound."""
        with self.look() as state:
            state.machine(machine_id)
        return MemoryMachine(self, machine_id)

    def remove_machine(self, machine_id: str) -> None:
        """Delete it with its disks; an unknown one is ignored."""
        with self.change() as state:
            state.machines.pop(machine_id, None)

    @property
    def left_disks(self) -> list[str]:
        """Disks of users that were left when a committed failover replaced their machine: `MACHINE/DISK`."""
        with self.look() as state:
            return sorted(state.left_disks)

    # -- what happens to a site --------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Cut the link: every call of a site raises SiteUnreachable until `restore`."""
        with self.change() as state:
            state.cut = True

    def restore(self) -> None:
        """Restore the link."""
        with self.change() as state:
            state.cut = False

    def crash(self) -> None:
        """The engine dies: unflushed writes are gone, all its handles are dead. The platform stays as it is."""
        with self._lock:
            self.generation += 1
            self.open_views.clear()

    def reboot(self) -> None:
        """The site's host restarts: machines with `autostart` run, all others are off; frozen views are gone."""
        with self.change() as state:
            for machine in state.machines.values():
                machine.views.clear()
                machine.power = PowerState.RUNNING if machine.autostart else PowerState.OFF

    def fill(self, room: int = 0) -> None:
        """Let the target take `room` more bytes of data, then it is full."""
        with self.change() as state:
            state.room = room

    def make_room(self) -> None:
        """Remove the limit of `fill`."""
        with self.change() as state:
            state.room = None

    def damage_point(self, replica_id: str, point_id: str, disk_id: str, offset: int) -> None:
        """Change a byte of a recovery point, as a bad disk would: nothing else of the replica, and nothing notes it."""
        with self.change() as state:
            content = state.replica(replica_id).point(point_id).disks[disk_id]
            content.write(offset, bytes([content.read(offset, 1)[0] ^ 0x20]))

    def configure(
        self,
        *,
        capabilities: frozenset[Capability] | None = None,
        read_only: bool | None = None,
        networks: set[str] | None = None,
        key: str | None = None,
        capacity: int | None = None,
        refuses_start: str | None = None,
    ) -> None:
        """Change what is given: what the site can do, whether its storage is read-only, its networks, the key that
        opens it, its storage in bytes, why it starts no machine ("": it does)."""
        given = {
            "capabilities": capabilities,
            "read_only": read_only,
            "networks": networks,
            "key": key,
            "capacity": capacity,
            "refuses_start": refuses_start,
        }
        with self.change() as state:
            for field, value in given.items():
                if value is not None:
                    setattr(state, field, value)


def _mac(number: int) -> str:
    return "52:54:00:" + ":".join(f"{number >> shift & 255:02x}" for shift in (16, 8, 0))


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns


class MemoryMachine:
    """A machine from inside and from its console: what the guest and its administrator do. Offsets in bytes."""

    def __init__(self, world: MemoryWorld, machine_id: str) -> None:
        self.world = world
        self.id = machine_id

    @property
    def value(self) -> Machine:
        """As the inventory shows it. Raises MachineNotFound."""
        with self._state() as machine:
            return machine.value

    @property
    def marks(self) -> list[str]:
        """Tokens of the marks that the source keeps."""
        with self._state() as machine:
            return sorted(machine.marks)

    @property
    def views(self) -> list[str]:
        """Ids of the views that are frozen."""
        with self._state() as machine:
            return sorted(machine.views)

    # -- the guest

    def write(self, disk_id: str, offset: int, data: bytes, *, offline: bool = False) -> None:
        """Write, as the running guest does; `offline`: the administrator writes to the disk of a stopped one."""
        with self._change(offline) as machine:
            machine.disks[disk_id].content.write(offset, data)
            machine.touch(disk_id, blocks_of(offset, len(data)))

    def discard(self, disk_id: str, offset: int, length: int) -> None:
        """Discard, as fstrim does: the range reads as zeroes."""
        with self._change(False) as machine:
            machine.disks[disk_id].content.zero(offset, length)
            machine.touch(disk_id, blocks_of(offset, length))

    def read(self, disk_id: str, offset: int = 0, length: int | None = None) -> bytes:
        """Content now; without `length` to the end of the disk."""
        with self._state() as machine:
            content = machine.disks[disk_id].content
            return content.read(offset, content.size - offset if length is None else length)

    def sha256(self, disk_id: str) -> str:
        """Of the whole disk as it is now."""
        return hashlib.sha256(self.read(disk_id)).hexdigest()

    # -- the administrator

    def add_disk(self, disk_id: str, size: int, *, tracked: bool = True) -> None:
        """Attach an empty disk; one of the same id is replaced. `tracked=False`: its changes are not tracked."""
        with self.world.change() as state:
            disk = Disk(disk_id, size, bus="virtio", location=f"memory:{self.id}/{disk_id}")
            state.machine(self.id).disks[disk_id] = DiskState(disk, state.number(), Content(size), tracked)

    def remove_disk(self, disk_id: str) -> None:
        """Detach a disk."""
        with self._change(True) as machine:
            del machine.disks[disk_id]

    def grow_disk(self, disk_id: str, size: int) -> None:
        """Grow to `size` bytes. What is new reads as zeroes."""
        with self._change(True) as machine:
            disk = machine.disks[disk_id]
            if size < disk.disk.size:
                raise ValueError(f"a disk of {disk.disk.size} bytes does not shrink")
            disk.content.resize(size)
            disk.disk = attrs.evolve(disk.disk, size=size)

    def rename(self, name: str) -> None:
        """Give another name; the id stays."""
        with self._change(True) as machine:
            machine.base = attrs.evolve(machine.base, name=name)

    def start(self) -> None:
        """Start by hand, without the driver: even a fenced one."""
        with self._change(True) as machine:
            machine.power = PowerState.RUNNING

    def stop(self) -> None:
        """Stop by hand, without the driver."""
        with self._change(True) as machine:
            machine.power = PowerState.OFF

    def store_artifact(self, name: str, data: bytes) -> None:
        """Change a part of the description, such as the UEFI variables."""
        with self._change(True) as machine:
            others = tuple(item for item in machine.artifacts if item.name != name)
            machine.artifacts = (*others, Artifact(name, data))

    def configure(
        self,
        *,
        consistency: Consistency | None = None,
        ignores_shutdown: bool | None = None,
        findings: tuple[Finding, ...] | None = None,
        holds_still: bool | None = None,
    ) -> None:
        """Change what is given: the best consistency that the guest helps with, whether it ignores a request to
        shut down, the findings against it as a source, whether its disks have snapshots below them (without, a view
        shows them live until it settles, as an agent in the guest does)."""
        with self._change(True) as machine:
            if consistency is not None:
                machine.consistency = consistency
            if ignores_shutdown is not None:
                machine.ignores_shutdown = ignores_shutdown
            if findings is not None:
                machine.findings = findings
            if holds_still is not None:
                machine.holds_still = holds_still

    # -- accidents

    def halt(self, why: str) -> None:
        """Its platform pauses it, as after an error of a disk, until it is started again."""
        with self._change(True) as machine:
            machine.power, machine.halted = PowerState.PAUSED, why

    def lose_tracking(self, disk_id: str | None = None) -> None:
        """What is known of changes is lost, of one disk or of all; also what open views knew."""
        with self._change(True) as machine:
            if disk_id is None:
                machine.marks.clear()
                return
            for mark in machine.marks.values():
                if disk_id in mark:
                    mark[disk_id].blocks = None

    def lose_views(self) -> None:
        """Frozen views end early: reads raise ViewLost."""
        with self._change(True) as machine:
            machine.views.clear()

    @contextmanager
    def _state(self) -> Iterator[MachineState]:
        with self.world.look() as state:
            yield state.machine(self.id)

    @contextmanager
    def _change(self, offline: bool) -> Iterator[MachineState]:
        with self.world.change() as state:
            machine = state.machine(self.id)
            if not offline and machine.power is not PowerState.RUNNING:
                raise RuntimeError(f"machine {self.id} of world {self.world.name} is off: it cannot write")
            yield machine
