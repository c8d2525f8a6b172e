"""The target role: replicas, the cycles that write them, and their points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import attrs

from asrcore.closing import Closing
from asrcore.driver._digests import Digest, different_blocks, digests_of
from asrcore.driver._examine import Examination, examination_parts, read_parts
from asrcore.driver._failover import PromoteSpec
from asrcore.errors import PointNotFound, ReplicaDamaged, StaleEpoch
from asrcore.model.extent import Extent
from asrcore.model.finding import Finding
from asrcore.model.machine import Description
from asrcore.model.point import Consistency
from asrcore.model.policy import Policy
from asrcore.model.watch import Watch

if TYPE_CHECKING:
    from asrcore.driver._reader import DiskReader

__all__ = [
    "Capacity",
    "CycleSpec",
    "CycleWriter",
    "Promoted",
    "Replica",
    "ReplicaInfo",
    "ReplicaSpec",
    "SealSpec",
    "StoredPoint",
    "Target",
]


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
    """A sealed point as the target knows it. `disks`: sizes in bytes by disk id. `held`: bytes that the target keeps
    for them, as last known, where storage is paid by use; None where the target does not report it. `damaged`: what was
    found wrong with it (see `Replica.mark_damaged`), for people."""

    id: str
    taken_at: float
    sealed_at: float
    consistency: Consistency
    kept: bool
    pinned: bool
    disks: Mapping[str, int]
    held: int | None = None
    damaged: str = ""


@attrs.frozen
class Promoted:
    """A failover that is neither undone nor committed: its point, and the machine that was made of it."""

    point_id: str
    machine_id: str


@attrs.frozen
class ReplicaInfo:
    """State of a replica: `points` oldest first, the last one is the head. `pending` is the id of an open cycle.
    `disks` are the disks of the head; before the first point those that were created or seeded. `kind` says how the
    target keeps points (`reflink`, `chain`, `page-blob`); it is shown to people. `promoted`: from a promotion until its
    undo or commit; a vault that was restored from a backup learns of the failover by it. `keeps_digests`: an
    examination compares content with what was recorded when it was written. Without, reading a point only shows that
    it can be read, and that is not done regularly."""

    replica_id: str
    epoch: int
    disks: Mapping[str, int]
    points: tuple[StoredPoint, ...]
    pending: str | None
    kind: str = ""
    promoted: Promoted | None = None
    keeps_digests: bool = False

    @property
    def head(self) -> str | None:
        """Id of the newest sealed point."""
        return self.points[-1].id if self.points else None


@attrs.frozen
class CycleSpec:
    """A cycle to be opened, or resumed when `cycle_id` is the pending one.

    `disks`: id -> size of *all* disks that the point will have; unknown ones are created empty, grown ones
    extended with zeroes, missing ones left out of the point. `base_point`: what the writer believes the head is.
    """

    cycle_id: str
    epoch: int
    base_point: str | None
    disks: Mapping[str, int]


@attrs.frozen
class SealSpec:
    """What makes a cycle a recovery point. `keep`: keep it as a separate point; otherwise it is only the latest state.
    A target that is at its limit of points stores the latest state only, and says so in the stored point."""

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
        """Make everything so far durable; afterwards `done` reports it, even after a crash."""

    @abstractmethod
    def seal(self, spec: SealSpec) -> StoredPoint:
        """Make the cycle a recovery point, atomically and durably; the same id again returns the point.

        What can wait is left to `close`: the engine calls it after the point is recorded and the source released."""

    @abstractmethod
    def discard(self) -> None:
        """Delete the cycle's content; only on the engine's decision, never as a clean-up of an error (invariant 3 in
        docs/explanation/architecture.md). Content that went into a replica without points stays there: the next
        comparison finds it equal."""


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
        """Raises StaleEpoch, StaleBase, TargetFull, ReplicaPromoted from a promotion until its undo, and MachineBusy
        beside another pending cycle, which is discarded only by its own writer."""

    @abstractmethod
    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        """Delete points; unknown ones are already deleted. The head, pinned points and the points of running tests
        are kept, and the content of all other points does not change. Freeing their space may take long where layers
        are merged: a cancelled `watch` ends it between two layers, and a later call resumes.

        Called after each cycle whose point the policy keeps, with the source no longer frozen, even if there is no
        point to delete: the target may reorganise its points then."""

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

    def examine(
        self, point_id: str, *, start: int | None = None, limit: int | None = None, watch: Watch | None = None
    ) -> Examination:
        """Look for damage in a recovery point; changes nothing that a point consists of. Raises PointNotFound.

        Without `start` it is a quick look, of seconds and few reads whatever the size: whether all parts are there and
        can be read, and samples of the content. With `start` the content is read from there on, past what is cached, to
        the end or for at most `limit` bytes (64 KiB or more): 0 is the beginning, otherwise the former part's `end`.

        By default the description and both ends of each disk are read, or all of it, and no digest is known. What
        cannot be read is damage only if the error says so (ReplicaDamaged): other errors are raised.
        """
        info = self.info()
        point = next((item for item in info.points if item.id == point_id), None)
        if point is None:
            raise PointNotFound(machine=info.replica_id, point=point_id)
        try:
            self.description(point_id)
        except ReplicaDamaged as problem:
            return Examination((str(problem),))
        parts, end = examination_parts(point.disks, start, limit)
        damage, done = [], 0
        for disk_id, extents in parts:
            try:
                with self.reader(disk_id, point_id) as reader:
                    done += read_parts(reader, extents, watch or Watch())
            except ReplicaDamaged as problem:
                damage.append(f"disk {disk_id}: {problem}")
        return Examination(tuple(damage), done, 0, end)

    def mark_damaged(  # noqa: B027 - the engine's record is enough
        self, point_id: str, damaged: str, epoch: int | None = None
    ) -> None:
        """Record with the point what was found wrong with it, "" that nothing is; by default only the engine does.
        Raises PointNotFound, and StaleEpoch where an epoch is given that is older than the replica's."""

    def from_records(self) -> Replica:
        """The replica, with `digests` and `compare` answered from what was recorded when the content was written, where
        it was, without reading that: for a resync. By default the same."""
        return self

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

    def failover_findings(self, spec: PromoteSpec) -> list[Finding]:
        """What is in the way of `Failover.promote` with this spec, or of starting its machine, now: an ERROR for what
        the platform would refuse. Asked before anything is taken from the source; changes nothing.

        By default the replica and the point are read, and nothing is found. A driver that overrides this does so, too.
        Raises ReplicaNotFound, ReplicaDamaged, PointNotFound, StaleEpoch.
        """
        replica = self.replica(spec.replica_id)
        info = replica.info()
        if spec.epoch < info.epoch:
            raise StaleEpoch(replica=spec.replica_id, epoch=spec.epoch, owner=info.epoch)
        if spec.point_id not in {point.id for point in info.points}:
            raise PointNotFound(machine=spec.replica_id, point=spec.point_id)
        replica.description(spec.point_id)
        return []

    @abstractmethod
    def capacity(self) -> Capacity:
        """Of the storage that replicas use."""

    @abstractmethod
    def create_replica(self, spec: ReplicaSpec, watch: Watch) -> Replica:
        """Make an empty (or seeded) replica; the same id again resumes its creation or returns it unchanged."""

    @abstractmethod
    def replica(self, replica_id: str) -> Replica:
        """Raises ReplicaNotFound, ReplicaDamaged."""

    @abstractmethod
    def replicas(self) -> list[str]:
        """Ids of all replicas at the site."""

    @abstractmethod
    def delete_replica(self, replica_id: str, epoch: int) -> None:
        """Delete a replica and all its points; an unknown one is already deleted. A machine that was made from it by a
        committed failover keeps its disks."""
