"""The state of a memory world: plain data, so that it can be kept in a file. Everything else is volatile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from asrcore.driver import Capability, Fence, SealSpec, StoredPoint
from asrcore.errors import MachineNotFound, PointNotFound, ReplicaNotFound, StaleEpoch
from asrcore.model.extent import Extent, subtract, union
from asrcore.model.finding import Finding
from asrcore.model.machine import Artifact, Description, Disk, Machine, PowerState
from asrcore.model.point import Consistency
from asrcore.testing.memory._content import BLOCK, Content

__all__ = [
    "Commit",
    "DirtyDisk",
    "DiskState",
    "FrozenDisk",
    "Journal",
    "Log",
    "MachineState",
    "PointState",
    "Promotion",
    "ReplicaState",
    "TestState",
    "ViewState",
    "WorldState",
]


# -- machines ------------------------------------------------------------------------------------------------------


@attrs.define
class DiskState:
    """A disk. `serial` distinguishes a replaced disk from the former one; `ours`: made by this driver, not a user."""

    disk: Disk
    serial: int
    content: Content
    tracked: bool = True
    ours: bool = False


@attrs.define
class DirtyDisk:
    """Blocks of a disk changed since a mark; None when that is not known any more."""

    serial: int
    blocks: frozenset[int] | set[int] | None

    def frozen(self) -> DirtyDisk:
        """As it is now."""
        return DirtyDisk(self.serial, None if self.blocks is None else frozenset(self.blocks))


@attrs.frozen
class FrozenDisk:
    """A disk at the instant of a view. Not `whole`: `content` is the live one until the view settles."""

    disk: Disk
    serial: int
    content: Content
    tracked: bool
    whole: bool


@attrs.frozen
class ViewState:
    """A frozen machine at the source. `barrier` is the same number for machines frozen together, and no others.
    `dirty`: for each mark known at that instant, what had changed since it."""

    barrier: int
    taken_at: float
    description: Description
    consistency: Consistency
    mark: str | None
    disks: Mapping[str, FrozenDisk]
    dirty: Mapping[str, Mapping[str, DirtyDisk]]
    notices: tuple[Finding, ...] = ()
    halted: str = ""


@attrs.define
class MachineState:
    """A machine; `base` without what is kept in the other fields. `holds_still`: its disks have snapshots.
    `halted`: why its platform paused it."""

    base: Machine
    disks: dict[str, DiskState]
    power: PowerState
    artifacts: tuple[Artifact, ...] = ()
    consistency: Consistency = Consistency.APPLICATION
    ignores_shutdown: bool = False
    autostart: bool = False
    holds_still: bool = True
    halted: str = ""
    findings: tuple[Finding, ...] = ()
    fence: Fence | None = None
    marks: dict[str, dict[str, DirtyDisk]] = attrs.field(factory=dict)
    views: dict[str, ViewState] = attrs.field(factory=dict)

    @property
    def value(self) -> Machine:
        """The machine as the inventory shows it."""
        return attrs.evolve(self.base, disks=tuple(disk.disk for disk in self.disks.values()), power=self.power)

    @property
    def description(self) -> Description:
        """The machine as kept with a recovery point."""
        return Description(self.value, "memory", self.artifacts)

    def touch(self, disk_id: str, blocks: range) -> None:
        """Note changed blocks for every mark."""
        serial = self.disks[disk_id].serial
        for mark in self.marks.values():
            dirty = mark.get(disk_id)
            if dirty is not None and dirty.serial == serial and isinstance(dirty.blocks, set):
                dirty.blocks.update(blocks)


# -- replicas ------------------------------------------------------------------------------------------------------


@attrs.define
class PointState:
    """A sealed recovery point with its own content. `sealed`: the content as it was sealed, instead of digests of it; a
    snapshot costs nothing."""

    point: StoredPoint
    description: Description
    disks: dict[str, Content]
    sealed: dict[str, Content] = attrs.field(factory=dict)


@attrs.frozen
class Commit:
    """The record that makes a cycle a recovery point."""

    spec: SealSpec
    sealed_at: float


@attrs.define
class Log:
    """What a cycle brought for a disk. For each byte the last call counts: data, zero, or same as the head."""

    content: Content
    data: list[Extent] = attrs.field(factory=list)
    zero: list[Extent] = attrs.field(factory=list)
    same: list[Extent] = attrs.field(factory=list)

    def put(self, kind: str, extents: list[Extent]) -> None:
        """Note ranges as `data`, `zero` or `same`."""
        for name in ("data", "zero", "same"):
            known = getattr(self, name)
            setattr(self, name, union(known, extents) if name == kind else subtract(known, extents))

    @property
    def done(self) -> list[Extent]:
        """All ranges that were noted."""
        return union(self.data, self.zero, self.same)

    def apply(self, content: Content) -> None:
        """Change the head's content to the cycle's. Repeating it changes nothing."""
        for extent in self.data:
            for piece in _within(extent, content.size):
                content.write(piece.offset, self.content.read(piece.offset, piece.length))
        for extent in self.zero:
            for piece in _within(extent, content.size):
                content.zero(piece.offset, piece.length)


def _within(extent: Extent, size: int) -> list[Extent]:
    end = min(extent.end, size)
    return [Extent(extent.offset, end - extent.offset)] if end > extent.offset else []


@attrs.define
class Journal:
    """A cycle that is not applied yet. With `commit` it is a point already, whatever happens."""

    cycle_id: str
    base_point: str | None
    disks: dict[str, int]
    logs: dict[str, Log] = attrs.field(factory=dict)
    commit: Commit | None = None


@attrs.define
class TestState:
    """A test failover. It uses the point until it is stopped."""

    point_id: str
    machine_id: str
    __test__ = False


@attrs.define
class Promotion:
    """A failover before its commit, and the fenced machine that made room for it."""

    point_id: str
    machine_id: str
    aside: MachineState | None = None
    committing: bool = False


@attrs.define
class ReplicaState:
    """A replica. Before the first point the head is what was created or seeded."""

    id: str
    name: str
    epoch: int
    head: dict[str, Content]
    points: list[PointState] = attrs.field(factory=list)
    journal: Journal | None = None
    tests: dict[str, TestState] = attrs.field(factory=dict)
    promotion: Promotion | None = None

    @property
    def head_point(self) -> str | None:
        """Id of the newest point."""
        return self.points[-1].point.id if self.points else None

    def point(self, point_id: str) -> PointState:
        """Raises PointNotFound."""
        for point in self.points:
            if point.point.id == point_id:
                return point
        raise PointNotFound(machine=self.id, point=point_id)

    def own(self, epoch: int) -> None:
        """A writer with a higher epoch takes over. Raises StaleEpoch for a lower one."""
        if epoch < self.epoch:
            raise StaleEpoch(replica=self.id, epoch=epoch, owner=self.epoch)
        self.epoch = epoch

    def in_use(self, point_id: str) -> bool:
        """Whether a test or an uncommitted failover uses a point."""
        tested = any(test.point_id == point_id for test in self.tests.values())
        return tested or (self.promotion is not None and self.promotion.point_id == point_id)

    def apply(self) -> None:
        """Finish a committed cycle: the head becomes its content, and the point stands."""
        journal = self.journal
        if journal is None or journal.commit is None:
            return
        head: dict[str, Content] = {}
        for disk_id, size in journal.disks.items():
            old = self.head.get(disk_id)
            head[disk_id] = Content(size) if old is None else old.snapshot()
            head[disk_id].resize(size)
            if disk_id in journal.logs:
                journal.logs[disk_id].apply(head[disk_id])
        if self.points:
            last = self.points[-1].point
            if not last.kept and not last.pinned and not self.in_use(last.id):
                del self.points[-1]
        spec = journal.commit.spec
        point = StoredPoint(
            id=spec.point_id,
            taken_at=spec.taken_at,
            sealed_at=journal.commit.sealed_at,
            consistency=spec.consistency,
            kept=spec.keep,
            pinned=False,
            disks=dict(journal.disks),
            held=sum(len(block) for content in head.values() for block in content.blocks),
        )
        frozen, sealed = (
            {disk_id: content.snapshot() for disk_id, content in head.items()} for _ in ("the point", "as sealed")
        )
        self.points.append(PointState(point, spec.description, frozen, sealed))
        self.head = head
        self.journal = None


# -- the world -----------------------------------------------------------------------------------------------------


@attrs.define
class WorldState:
    """A platform. `room`: bytes that may still be stored, None for all of `capacity`. `refuses_start`: why it starts no
    machine, if it does not."""

    name: str
    capabilities: frozenset[Capability]
    capacity: int
    machines: dict[str, MachineState] = attrs.field(factory=dict)
    replicas: dict[str, ReplicaState] = attrs.field(factory=dict)
    left_disks: dict[str, DiskState] = attrs.field(factory=dict)
    networks: set[str] = attrs.field(factory=set)
    key: str = ""
    cut: bool = False
    read_only: bool = False
    room: int | None = None
    refuses_start: str = ""
    counter: int = 0

    def number(self) -> int:
        """A number that was never given before."""
        self.counter += 1
        return self.counter

    def machine(self, machine_id: str) -> MachineState:
        """Raises MachineNotFound."""
        if machine_id not in self.machines:
            raise MachineNotFound(site=self.name, machine=machine_id)
        return self.machines[machine_id]

    def replica(self, replica_id: str) -> ReplicaState:
        """Raises ReplicaNotFound. A sealed cycle is applied first: that follows from what is durable, so the next
        caller does it, and it does not matter which process saves it."""
        if replica_id not in self.replicas:
            raise ReplicaNotFound(site=self.name, replica=replica_id)
        replica = self.replicas[replica_id]
        replica.apply()
        return replica

    @property
    def free(self) -> int:
        """Bytes that may still be stored."""
        if self.room is not None:
            return self.room
        # A block shared by head and points takes space once, as on a file system that clones files.
        blocks = {id(block) for replica in self.replicas.values() for block in _blocks(replica)}
        return max(0, self.capacity - len(blocks) * BLOCK)


def _blocks(replica: ReplicaState) -> Iterator[bytes]:
    contents = [*replica.head.values(), *(disk for point in replica.points for disk in point.disks.values())]
    if replica.journal:
        contents += [log.content for log in replica.journal.logs.values()]
    for content in contents:
        yield from content.blocks
