"""A frozen machine as the engine reads it: the same views of disks for each way of keeping them frozen (see
`_frozen`)."""

from __future__ import annotations

import errno
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from asr_driver_libvirt.source.tracking import DiskPlan
from asr_storage.nbd.client import NbdClient, NbdError
from asr_storage.nbd.status import BASE_ALLOCATION, DiskExtent, dirty_bitmap_context, merge_status
from asrcore.driver import DiskReader, DiskView, FrozenView, MachineView, Tracking
from asrcore.errors import AsrError
from asrcore.model.extent import Extent, union
from asrcore.model.finding import Finding
from asrcore.model.machine import Description, Disk
from asrcore.model.point import Consistency, Mark
from asrcore.units import MiB

__all__ = ["READ_SECONDS", "Frozen", "LibvirtDiskView", "LibvirtMachineView", "LibvirtView"]

READ_SECONDS = 20.0
"""A server that is silent for this long counts as lost. libvirt's own keep-alive notices within the same time."""

# glibc, with which QEMU allocates the memory of each request, keeps up to twice the largest block that was ever freed
# (mallopt(3), M_MMAP_THRESHOLD) and returns the rest to the system, to be faulted in again. Measured, a copy of 2 GiB
# over four connections: 55,000 to 525,000 page faults of QEMU and 2.4 to 3.2 s of its processor time; after one request
# of this size no faults, and 1.6 s.
_LARGE = 8 * MiB


class Frozen(ABC):
    """What keeps a machine's disks frozen and serves them over NBD."""

    @abstractmethod
    def connect(self, disk_id: str, bitmap: str) -> NbdClient:
        """A connection to a disk with base:allocation and, unless it is "", the dirty bitmap of checkpoint `bitmap`.

        Raises NbdError or an AsrError.
        """

    @abstractmethod
    def bitmap_name(self, disk_id: str, base: str) -> str:
        """The name under which the bitmap of checkpoint `base` is served."""

    @abstractmethod
    def explain(self, problem: NbdError) -> AsrError:
        """The catalogue's error for a failed read: view lost, site unreachable, or the disk itself."""

    @abstractmethod
    def confirm(self) -> None:
        """Raises ViewLost."""

    @abstractmethod
    def close(self) -> None:
        """Release it. Raises nothing for what has ended already."""


class _Connections:
    """Connections to one disk, kept for reuse.

    Over a long link a connection takes some ten round trips to make, a read takes one.
    """

    def __init__(self, frozen: Frozen, disk_id: str, bitmap: str) -> None:
        self._frozen = frozen
        self._disk_id = disk_id
        self._bitmap = bitmap
        self._lock = threading.Lock()
        self._idle: list[NbdClient] = []
        self._closed = False

    def take(self) -> NbdClient:
        """A connection for the caller alone."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._frozen.connect(self._disk_id, self._bitmap)

    def give(self, client: NbdClient, *, sound: bool) -> None:
        """Return it for reuse, unless something failed on it."""
        with self._lock:
            if sound and not self._closed:
                self._idle.append(client)
                return
        client.close()

    def close(self) -> None:
        """Close those that are not in use; the others when they are returned."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for client in idle:
            client.close()


class LibvirtDiskReader(DiskReader):
    """One NBD connection."""

    def __init__(self, frozen: Frozen, connections: _Connections, client: NbdClient) -> None:
        self._frozen = frozen
        self._connections = connections
        self._client: NbdClient | None = client
        self._sound = True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises ViewLost, SiteUnreachable, DriverFailed."""
        self.read_each([(offset, buffer)])

    def read_each(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Raises as `read_into`."""
        if self._client is None:
            raise ValueError("the reader is closed")
        try:
            self._client.read_each(reads)
        except BaseException as problem:
            self._sound = False
            if isinstance(problem, NbdError):
                raise self._frozen.explain(problem) from problem
            raise

    def close(self) -> None:
        """Give the connection back."""
        client, self._client = self._client, None
        if client is not None:
            self._connections.give(client, sound=self._sound)


class LibvirtDiskView(DiskView):
    """A disk of a frozen machine. `grown_from`: its size at the mark, where it is larger now (bytes)."""

    def __init__(self, frozen: Frozen, disk: Disk, plan: DiskPlan, *, grown_from: int | None = None) -> None:
        self.disk = disk
        self.tracking = plan.tracking
        self.reason = plan.reason
        self._frozen = frozen
        self._plan = plan
        self._grown_from = grown_from
        self._connections = _Connections(frozen, disk.id, plan.base)

    def changed(self) -> list[Extent]:
        """Dirty extents since the mark; ranges that were discarded are `zero`."""
        if self.tracking is not Tracking.CHANGED:
            raise ValueError(f"changes of {self.disk.id} are not known: {self.tracking.value}")
        if self._plan.unchanged:
            return []
        dirty = [_extent(item) for item in self._status(self._plan.base) if item.dirty]
        if self._grown_from is None or self._grown_from >= self.disk.size:
            return dirty
        # A bitmap that grew with its disk has no bits set in the new part.
        return union(dirty, (item for item in self.allocated() if item.end > self._grown_from))

    def allocated(self) -> list[Extent]:
        """The whole disk; `zero` where it is known to read as zeroes."""
        found = [_extent(item) for item in self._status("")]
        hole = next((item for item in found if item.zero and item.length >= _LARGE), None)
        if hole is not None:
            self._have_memory_kept(hole.offset)
        return found

    def _have_memory_kept(self, hole: int) -> None:
        """A caller that asks for all of the disk will read much of it. Reading a hole sends no data."""
        client, sound = self._connect(), False
        try:
            if (client.max_block_size or 0) >= _LARGE:
                client.read_at_once(bytearray(_LARGE), hole)
            sound = True
        except NbdError as problem:
            raise self._frozen.explain(problem) from problem
        finally:
            self._connections.give(client, sound=sound)

    def _status(self, base: str) -> Iterator[DiskExtent]:
        size = self.disk.size
        bitmap = self._frozen.bitmap_name(self.disk.id, base) if base else None
        client, sound = self._connect(), False
        try:
            yield from merge_status(client.block_status(0, size), 0, size, bitmap=bitmap)
            sound = True
        except NbdError as problem:
            raise self._frozen.explain(problem) from problem
        finally:
            self._connections.give(client, sound=sound)

    def reader(self) -> LibvirtDiskReader:
        """A separate connection."""
        return LibvirtDiskReader(self._frozen, self._connections, self._connect())

    def close(self) -> None:
        """Close connections that are not in use; their readers close the others."""
        self._connections.close()

    def _connect(self) -> NbdClient:
        try:
            client = self._connections.take()
        except NbdError as problem:
            raise self._frozen.explain(problem) from problem
        if client.size < self.disk.size:
            self._connections.give(client, sound=False)
            late = NbdError(
                "open",
                f"{client.size} bytes instead of {self.disk.size}",
                export=self.disk.id,
                errno=errno.ESTALE,
            )
            raise self._frozen.explain(late)
        return client


def contexts(bitmap: str) -> list[str]:
    """Meta contexts to ask for."""
    return [BASE_ALLOCATION, *([dirty_bitmap_context(bitmap)] if bitmap else [])]


def _extent(item: DiskExtent) -> Extent:
    return Extent(item.offset, item.length, item.zero)


class LibvirtMachineView(MachineView):
    """One machine."""

    def __init__(
        self,
        description: Description,
        consistency: Consistency,
        mark: Mark | None,
        disks: Mapping[str, LibvirtDiskView],
        notices: Sequence[Finding] = (),
        halted: str = "",
    ) -> None:
        self.disks: Mapping[str, LibvirtDiskView]
        self.halted = halted
        self.description = description
        self.consistency = consistency
        self.mark = mark
        self.disks = disks
        self.notices = notices


class LibvirtView(FrozenView):
    """A view of one machine."""

    def __init__(self, taken_at: float, machine: LibvirtMachineView, frozen: Frozen) -> None:
        self.taken_at = taken_at
        self.machines = {machine.description.machine.id: machine}
        self._frozen = frozen
        self._machine = machine

    def confirm(self) -> None:
        """Raises ViewLost when the job ended or the machine that was off was started."""
        self._frozen.confirm()

    def close(self) -> None:
        """End the job; may be called twice."""
        for disk in self._machine.disks.values():
            disk.close()
        self._frozen.close()
