"""The contract between the engine and a driver: five roles by capability, in values of `asrcore.model`.

A driver connects to a *site*. The site offers the roles it can; a role or an operation that is not offered raises
UnsupportedOperation, so the contract grows by a capability with a default, never by a new abstract method.

Rules for every operation:
- It may be repeated: a step that was killed is called again with the same identities and ends in the same state.
- It raises errors of `asrcore.errors` for what can be expected and has a time limit wherever it waits.
- Offsets, lengths and disk sizes are bytes as the guest sees them, multiples of 512 but for the end of a disk; times
  are seconds; `taken_at` is the engine host's clock.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import ClassVar, Self

import attrs
from blake3 import blake3

from asrcore.errors import UnsupportedOperation
from asrcore.model.extent import Extent, split
from asrcore.model.finding import Finding
from asrcore.model.machine import Description, Disk, Machine
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch
from asrcore.units import KiB, MiB

__all__ = [
    "API",
    "DIGEST_BLOCK",
    "DIGEST_SIZE",
    "Capability",
    "Capacity",
    "Check",
    "CycleSpec",
    "CycleWriter",
    "Digest",
    "DiskReader",
    "DiskView",
    "Driver",
    "DriverInfo",
    "Failover",
    "Fence",
    "FrozenView",
    "Instance",
    "Inventory",
    "MachineView",
    "PromoteSpec",
    "Replica",
    "ReplicaInfo",
    "ReplicaSpec",
    "SealSpec",
    "Setting",
    "Site",
    "SiteStatus",
    "Source",
    "StoredPoint",
    "Target",
    "TestSpec",
    "Tracking",
    "ViewRequest",
    "block_digests",
    "different_blocks",
    "digest_of",
    "digests_of",
    "zero_digest",
]

API = (1, 0)
"""Version of this contract: (major, minor). The engine refuses a driver of another major."""

DIGEST_BLOCK = 64 * KiB
"""Both sides of a comparison hash blocks of this many bytes, counted from the start of the disk."""
DIGEST_SIZE = 16
"""Bytes of digest per block: 128 bits, no accidental collision in any disk's life."""


class Digest(Enum):
    """How blocks are hashed; the source chooses, the target follows."""

    BLAKE3 = "blake3"
    """3.5 x SHA-256 on one core."""
    BLAKE2B = "blake2b"
    """For an agent with nothing but Python's standard library."""


class Capability(Enum):
    """What a site can do. The conformance kit runs the tests of the capabilities that a driver claims."""

    POWER = "power"
    FENCE = "fence"
    SOURCE = "source"
    TRACKING = "tracking"
    GROUPS = "groups"
    TARGET = "target"
    FAILOVER = "failover"
    SEED = "seed"


@attrs.frozen
class Setting:
    """A setting of a site, given as text: `asr site add NAME --driver D --set name=value`."""

    name: str
    help: str
    required: bool = False
    default: str = ""
    secret: bool = False


@attrs.frozen
class DriverInfo:
    """Who a driver is. `capabilities` is all it may offer; a connected site may offer less (`SiteStatus`)."""

    name: str
    title: str
    version: str
    api: tuple[int, int]
    capabilities: frozenset[Capability]
    settings: tuple[Setting, ...] = ()


@attrs.frozen
class SiteStatus:
    """What a connected site says of itself; `details` are facts for people (`replica kind: reflink`)."""

    version: str
    capabilities: frozenset[Capability]
    details: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Check:
    """One thing that was tried at a site. `told`: what the platform answered; `seconds`: how long it took."""

    name: str
    passed: bool
    seconds: float
    told: str


class Driver(ABC):
    """Registered by the plug-in hook `asr_register_drivers`; one object serves any number of sites."""

    info: ClassVar[DriverInfo]

    def check_host(self) -> list[Finding]:
        """What this host lacks for the driver to work, for `asr doctor`."""
        return []

    def check(self, settings: Mapping[str, str]) -> Iterator[Check]:
        """Try the driver's own work at a site of these settings, on little data, and take all of it away again; one
        check after the other, as they end. For platforms that no test can have at hand."""
        raise UnsupportedOperation(driver=self.info.name, operation="check a site by trying")

    @abstractmethod
    def connect(self, name: str, settings: Mapping[str, str]) -> Site:
        """Connect to a site; `name` is for messages.

        Raises InvalidSetting, SiteUnreachable, AccessDenied, HostIncomplete.
        """


class Closing:
    """A resource with `close`, which may be called twice; leaving the `with` block closes it."""

    def close(self) -> None:
        """Give back what is held. Never raises for something already gone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # the first error is the one that tells what went wrong
                raise


class Site(Closing):
    """A connection to a site. Safe to use from several threads."""

    name: str
    driver: str

    def status(self) -> SiteStatus:
        """Raises SiteUnreachable when the site does not answer."""
        raise NotImplementedError

    @property
    def inventory(self) -> Inventory:
        """Machines and their power."""
        raise self._unsupported("list machines")

    @property
    def source(self) -> Source:
        """Reads frozen machines."""
        raise self._unsupported("be a source")

    @property
    def target(self) -> Target:
        """Holds replicas."""
        raise self._unsupported("be a target")

    @property
    def failover(self) -> Failover:
        """Makes machines of recovery points."""
        raise self._unsupported("run replicas")

    def sweep(self) -> list[str]:
        """Remove what runs that never came back have left at the site and nobody else would find; what it was.
        Where what is left lies beside what it was for, and is found with it, there is nothing to do."""
        return []

    def _unsupported(self, operation: str) -> UnsupportedOperation:
        return UnsupportedOperation(driver=self.driver, operation=operation)


# -- inventory ------------------------------------------------------------------------------------------------------


@attrs.frozen
class Fence:
    """A machine quarantined at a site: the epoch that took its ownership away, and why."""

    epoch: int
    reason: str


class Inventory(ABC):
    """Discovery, power and quarantine. A missing machine raises MachineNotFound."""

    @abstractmethod
    def machines(self) -> list[Machine]:
        """All machines of the site, replicas under test included."""

    @abstractmethod
    def machine(self, machine_id: str) -> Machine:
        """One machine as it is now."""

    def description(self, machine_id: str) -> Description:
        """The machine with the artifacts that its platform can give now, for readiness and a replica's creation.
        What a recovery point needs comes with the frozen view."""
        return Description(self.machine(machine_id), platform="")

    @abstractmethod
    def power_on(self, machine_id: str) -> None:
        """Start it; a running machine is left alone. Raises WrongState when it is fenced."""

    @abstractmethod
    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        """Stop it; a stopped machine is left alone. Graceful asks the guest and raises ShutdownFailed after
        `timeout` seconds with the machine still running; otherwise the power is cut."""

    @abstractmethod
    def fence(self, machine_id: str, fence: Fence) -> None:
        """Quarantine: stop it at once, keep it from starting with its host, and record the fence at the site.

        Repeating is a repair: a fenced machine that runs again is stopped again. A lower epoch changes nothing.
        """

    @abstractmethod
    def unfence(self, machine_id: str, epoch: int) -> None:
        """Take a fence of at most `epoch` away; the machine is not started."""

    @abstractmethod
    def fenced(self, machine_id: str) -> Fence | None:
        """The fence recorded at the site, or None."""


# -- source ----------------------------------------------------------------------------------------------------------


class Tracking(Enum):
    """What is known of a disk's changes since the mark that the view was asked for."""

    CHANGED = "changed"
    """`changed()` is complete."""
    NEW = "new"
    """The disk was not part of the mark: it was added or replaced."""
    LOST = "lost"
    """Unknown: compare."""
    NONE = "none"
    """This disk cannot be tracked here (or no mark was given): compare each time."""


@attrs.frozen
class ViewRequest:
    """One machine of a view. `view_id` names the view: a view of that id that is still frozen at the source is
    opened again, with the same `taken_at` and mark, so that a restarted engine reads the same instant. When it is
    no longer frozen a new view is made under that id, with a new mark that differs from the former one's (which
    may be `since`). `since`: the mark to tell changes from."""

    machine_id: str
    view_id: str
    since: Mark | None


class DiskReader(Closing, ABC):
    """Reads one frozen disk. Not shared between threads: each opens its own."""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the caller's writable buffer from `offset`. Raises ViewLost (or ReplicaDamaged for a replica)."""

    def read_each(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Fill several buffers, each from its offset. Raises as `read_into`.

        To be overridden where requests can be in flight together: a delta is thousands of small ones.
        """
        for offset, buffer in reads:
            self.read_into(offset, buffer)


class DiskView(ABC):
    """One disk of a frozen machine."""

    disk: Disk
    tracking: Tracking
    reason: str = ""
    """Why `tracking` is LOST or NONE, for people."""
    whole: bool = True
    """Whether every range shows the instant of the view, so that `verify` can compare all of it; False where only
    what changed is held still."""
    hashes_at_source: bool = False
    """`digests` is computed where the data is: a comparison asks for it first and reads only what differs."""

    @abstractmethod
    def changed(self) -> list[Extent]:
        """Extents changed since the mark, sorted, only when tracking is CHANGED. What was discarded is `zero`."""

    @abstractmethod
    def allocated(self) -> list[Extent]:
        """The whole disk, sorted and without gaps; what is known to read as zeroes is `zero`."""

    @abstractmethod
    def reader(self) -> DiskReader:
        """A new reader; the caller closes it."""

    digest: Digest = Digest.BLAKE3
    """What `digests` computes."""

    def digests(self, extent: Extent) -> bytes:
        """Digests of the blocks of an extent, see `digests_of`. An agent computes them where the data is."""
        with self.reader() as reader:
            return digests_of(reader, extent, self.digest)


class MachineView(ABC):
    """One machine of a frozen view: all its disks at one instant."""

    description: Description
    consistency: Consistency
    """As obtained (invariant 5)."""
    mark: Mark | None
    """To be kept once the point is recorded; None when nothing is tracked."""
    disks: Mapping[str, DiskView]


class FrozenView(Closing, ABC):
    """Machines frozen at one barrier. Reads through it give the content of `taken_at` however long they take."""

    taken_at: float
    machines: Mapping[str, MachineView]

    def settle(self) -> Mapping[str, Mapping[str, Sequence[Extent]]]:
        """Called when all planned extents are flushed, and again whenever what it named is: what has to be read
        again, by machine and disk, until it names nothing.

        A source that cannot hold a whole disk still (an agent without snapshots below it) names what changed while it
        was read, in as many rounds as it needs, and freezes briefly for the last one; from then on `taken_at`,
        consistency and marks are those of that instant. A source that froze at the opening returns nothing.
        """
        return {}

    def confirm(self) -> None:
        """Called after the last read and before the seal. Raises ViewLost when the reads may not all have shown
        the same instant; a source that freezes for certain has nothing to do."""


class Source(ABC):
    """Reads frozen machines and tracks what changes. Views never disturb the workload beyond the freeze limit."""

    @abstractmethod
    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        """Readiness of the machine as a source under this policy."""

    @abstractmethod
    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        """Freeze the machines at one barrier (one machine unless the site has GROUPS).

        A consistency that cannot be had lowers what the view says it obtained; it is no error. From the instant
        of the view on, changes are tracked for its new mark. A lost mark is told per disk (`Tracking.LOST`).
        Raises MachineNotFound, ViewLost, SiteUnreachable, DriverFailed.
        """

    @abstractmethod
    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        """Release every mark and every left-over of a view of ours for this machine except these.

        Called after a point is recorded, and with nothing to keep when protection ends. What cannot be released
        now (a stopped machine) is released by a later call.
        """


# -- target ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Capacity:
    """Bytes of the target's storage; None where the platform sets no bound."""

    total: int | None
    free: int | None


@attrs.frozen
class ReplicaSpec:
    """A replica to be made. `seed_machine`: a stopped machine at the target whose disks resemble the source's;
    their content becomes the replica's first content, to be compared (needs SEED)."""

    replica_id: str
    name: str
    epoch: int
    description: Description
    seed_machine: str | None = None


@attrs.frozen
class StoredPoint:
    """A sealed point as the target knows it. `disks`: sizes in bytes by disk id."""

    id: str
    taken_at: float
    sealed_at: float
    consistency: Consistency
    kept: bool
    pinned: bool
    disks: Mapping[str, int]


@attrs.frozen
class ReplicaInfo:
    """State of a replica: `points` oldest first, the last one is the head. `pending` is the id of an open cycle.
    `disks` are the disks of the head; before the first point those that were created or seeded. `kind` tells people
    how the target keeps points (`reflink`, `chain`, `page-blob`)."""

    replica_id: str
    epoch: int
    disks: Mapping[str, int]
    points: tuple[StoredPoint, ...]
    pending: str | None
    kind: str = ""

    @property
    def head(self) -> str | None:
        """Id of the newest sealed point."""
        return self.points[-1].id if self.points else None


@attrs.frozen
class CycleSpec:
    """A cycle to be opened, or taken up again when `cycle_id` is the pending one.

    `disks`: id -> size of *all* disks that the point will have; unknown ones are created empty, grown ones
    extended with zeroes, missing ones left out of the point. `base_point`: what the writer believes the head is.
    """

    cycle_id: str
    epoch: int
    base_point: str | None
    disks: Mapping[str, int]


@attrs.frozen
class SealSpec:
    """What makes a cycle a recovery point. `keep`: a point of its own, else only the latest state. A target that holds
    as many points as it can makes it the latest state only, and says so in the stored point."""

    point_id: str
    taken_at: float
    consistency: Consistency
    keep: bool
    description: Description


class CycleWriter(Closing, ABC):
    """Receives one cycle. `write`, `zero` and `same` may be called from several threads for different ranges.

    `flush` may run while others write. Where a range is given twice, the later call counts. Until `seal` returns
    the head and all points are what they were. `close` without seal leaves the cycle pending with what was
    flushed. A failed call leaves the cycle pending as well. Space and permission problems raise TargetFull and
    TargetReadOnly.
    """

    @abstractmethod
    def done(self, disk_id: str) -> list[Extent]:
        """What of this cycle is durable at the target already, from before a restart too."""

    @abstractmethod
    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        """Put data."""

    @abstractmethod
    def zero(self, disk_id: str, offset: int, length: int) -> None:
        """Make a range read as zeroes, without allocating it where the target can."""

    @abstractmethod
    def same(self, disk_id: str, offset: int, length: int) -> None:
        """Note that the range was compared and is equal to the head: it counts as done. What was written to it
        earlier in this cycle no longer counts."""

    @abstractmethod
    def flush(self) -> None:
        """Make all so far durable; afterwards `done` tells it, even after a crash."""

    @abstractmethod
    def seal(self, spec: SealSpec) -> StoredPoint:
        """Make the cycle a recovery point, atomically and durably; the same id again returns the point."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the cycle; only on the engine's decision, never as a clean-up of an error (invariant 3). Content
        that went into a replica without points stays there: the next comparison finds it equal."""


class Replica(ABC):
    """A replica at the target. Every change names its epoch; an older one raises StaleEpoch."""

    hashes_at_target: bool = False
    """`digests` and `compare` are computed where the replica is: a comparison asks them and reads nothing of it. Else
    its reader is as near as its digests, and a comparison of two sides that are both read here compares bytes."""

    @abstractmethod
    def info(self) -> ReplicaInfo:
        """Its state as durable now. A cycle that was sealed but not fully applied is applied first."""

    @abstractmethod
    def raise_epoch(self, epoch: int) -> None:
        """Take ownership: from now on only this epoch (or a higher one) writes. Lower raises StaleEpoch."""

    @abstractmethod
    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        """Raises StaleEpoch, StaleBase, TargetFull, and MachineBusy beside another pending cycle, which is discarded
        only by its own writer."""

    @abstractmethod
    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        """Remove points; unknown ones are gone already. The head, pinned points and what a test stands on
        stay whole; the content of all other points does not change. Freeing their space may take long where layers
        are merged: a cancelled `watch` ends it between two, and a later call goes on.

        Called after each cycle whose point the policy keeps, with the source no longer frozen, if only with none to
        drop: the target may bring its points into better order then."""

    @abstractmethod
    def pin(self, point_id: str, pinned: bool) -> None:
        """Keep a point from `drop_points`, or let it go. Raises PointNotFound."""

    @abstractmethod
    def description(self, point_id: str) -> Description:
        """The machine as it was at the point."""

    @abstractmethod
    def allocated(self, disk_id: str) -> list[Extent]:
        """Of the head: the whole disk without gaps, `zero` where nothing is stored."""

    @abstractmethod
    def reader(self, disk_id: str, point_id: str | None = None) -> DiskReader:
        """Reads a point, by default the head."""

    def digests(self, disk_id: str, extent: Extent, digest: Digest = Digest.BLAKE3) -> bytes:
        """Digests of the head's blocks in an extent, computed at the target; see `digests_of`."""
        with self.reader(disk_id) as reader:
            return digests_of(reader, extent, digest)

    def compare(self, disk_id: str, extent: Extent, ours: bytes, digest: Digest = Digest.BLAKE3) -> list[Extent]:
        """Where the head differs from what `ours` are the digests of (see `digests_of`): whole blocks but for the end
        of the disk, sorted, neighbours joined. A target that is not here answers with little where little differs."""
        return different_blocks(extent, ours, self.digests(disk_id, extent, digest))


class Target(ABC):
    """Holds replicas on the site's storage."""

    @abstractmethod
    def findings(self, description: Description, policy: Policy) -> list[Finding]:
        """Readiness of the site as a target for this machine: capacity, firmware, networks, names."""

    @abstractmethod
    def capacity(self) -> Capacity:
        """Of the storage that replicas use."""

    @abstractmethod
    def create_replica(self, spec: ReplicaSpec, watch: Watch) -> Replica:
        """Make an empty (or seeded) replica; the same id again goes on or returns it as it is."""

    @abstractmethod
    def replica(self, replica_id: str) -> Replica:
        """Raises ReplicaNotFound, ReplicaDamaged."""

    @abstractmethod
    def replicas(self) -> list[str]:
        """Ids of all replicas at the site."""

    @abstractmethod
    def delete_replica(self, replica_id: str, epoch: int) -> None:
        """Remove a replica and its points; an unknown one is gone already. A machine that was made of it by a
        committed failover keeps its disks."""


# -- failover --------------------------------------------------------------------------------------------------------


@attrs.frozen
class TestSpec:
    """A test failover: a disposable copy-on-write machine of a point. `network` "" means plugged into nothing
    that leads anywhere."""

    test_id: str
    replica_id: str
    point_id: str
    name: str
    network: str = ""
    __test__ = False  # not a test class, whatever pytest thinks of the name


@attrs.frozen
class PromoteSpec:
    """A real failover: the machine of a point, with its own name, id, and mapped networks."""

    replica_id: str
    point_id: str
    epoch: int
    networks: NetworkMap


@attrs.frozen
class Instance:
    """A machine that was made of a recovery point. `repairs`: what was changed on its disks, never in the point, so
    that it comes up at this site, and what was not understood and left; lines for the log."""

    machine_id: str
    name: str
    repairs: tuple[str, ...] = ()


class Failover(ABC):
    """Makes machines of points. Nothing here changes a point: instances write to copies or overlays."""

    @abstractmethod
    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        """Make and start a test machine; the same test id again returns it. Raises PointNotFound, DriverFailed."""

    @abstractmethod
    def stop_test(self, replica_id: str, test_id: str) -> None:
        """Stop and remove everything of a test; an unknown one is gone already."""

    @abstractmethod
    def tests(self, replica_id: str) -> list[str]:
        """Ids of tests that are running or left over; none for an unknown replica."""

    @abstractmethod
    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        """Make the machine of a point, not started. A fenced machine of the same id is put aside for undo.

        Repeating with the same spec returns it; with another point, the former (stopped) machine is replaced
        (WrongState while it runs). Raises AlreadyExists when an unfenced machine has the id or the name.
        """

    @abstractmethod
    def undo(self, replica_id: str, epoch: int) -> None:
        """Stop and remove the promoted machine and its writes; bring back what `promote` put aside."""

    @abstractmethod
    def commit(self, replica_id: str, epoch: int, watch: Watch) -> None:
        """Make the promotion final: the machine's disks become its own, the replica with its points goes, as do
        disks of *ours* that the machine put aside was using. Disks that the user made stay."""


# -- digests ---------------------------------------------------------------------------------------------------------

_ZERO_BLOCK = bytes(DIGEST_BLOCK)


def digest_of(block: bytes | bytearray | memoryview, digest: Digest = Digest.BLAKE3) -> bytes:
    """DIGEST_SIZE bytes for one block."""
    if digest is Digest.BLAKE2B:
        return hashlib.blake2b(block, digest_size=DIGEST_SIZE).digest()
    return blake3(block).digest(DIGEST_SIZE)


def digests_of(reader: DiskReader, extent: Extent, digest: Digest = Digest.BLAKE3) -> bytes:
    """Digests of an extent's blocks, DIGEST_SIZE bytes each, in order.

    The extent starts at a multiple of DIGEST_BLOCK; its last block may be short (end of the disk).
    """
    if extent.offset % DIGEST_BLOCK:
        raise ValueError(f"extent at {extent.offset} does not start at a digest block")
    result = bytearray()
    buffer = bytearray(min(extent.length, 1 * MiB))
    for piece in split([extent], 1 * MiB):
        view = memoryview(buffer)[: piece.length]
        reader.read_into(piece.offset, view)
        result += block_digests(view, digest)
    return bytes(result)


def block_digests(data: memoryview, digest: Digest = Digest.BLAKE3) -> bytes:
    """Digests of the blocks of `data`, which starts at a multiple of DIGEST_BLOCK; its last block may be short."""
    blocks = (data[start : start + DIGEST_BLOCK] for start in range(0, len(data), DIGEST_BLOCK))
    return b"".join(digest_of(block, digest) for block in blocks)


def different_blocks(extent: Extent, ours: bytes, theirs: bytes) -> list[Extent]:
    """The blocks of an extent whose digests differ, neighbours joined. Raises ValueError for another number of them."""
    if not len(ours) == len(theirs) == -(-extent.length // DIGEST_BLOCK) * DIGEST_SIZE:
        raise ValueError(f"{len(ours)} and {len(theirs)} bytes of digests for {extent.length} bytes")
    if ours == theirs:
        return []
    result: list[Extent] = []
    for at in range(0, len(ours), DIGEST_SIZE):
        if ours[at : at + DIGEST_SIZE] == theirs[at : at + DIGEST_SIZE]:
            continue
        start = extent.offset + at // DIGEST_SIZE * DIGEST_BLOCK
        end = min(start + DIGEST_BLOCK, extent.end)
        if result and result[-1].end == start:
            start = result.pop().offset
        result.append(Extent(start, end - start))
    return result


@functools.cache
def zero_digest(digest: Digest = Digest.BLAKE3) -> bytes:
    """Digest of a full block of zeroes."""
    return digest_of(_ZERO_BLOCK, digest)
