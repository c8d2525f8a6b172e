"""Replicas in a memory world.

A cycle goes to a journal: calls are collected in the engine's process, `flush` makes them part of the world. `seal`
adds the commit record to the journal: from then on the point exists. Then the journal is applied to the head; after
a crash in between, the next access to the replica applies it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TypeVar

import attrs

from asrcore.crashpoint import reach
from asrcore.driver import (
    Capability,
    Capacity,
    CycleSpec,
    CycleWriter,
    DiskReader,
    Examination,
    Promoted,
    PromoteSpec,
    Replica,
    ReplicaInfo,
    ReplicaSpec,
    SealSpec,
    StoredPoint,
    Target,
    examination_parts,
)
from asrcore.errors import (
    InvalidValue,
    MachineBusy,
    MachineNotFound,
    ReplicaPromoted,
    StaleBase,
    StaleEpoch,
    TargetFull,
    TargetReadOnly,
    WrongState,
)
from asrcore.model.extent import Extent
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Description, PowerState
from asrcore.model.policy import Policy
from asrcore.model.watch import Watch
from asrcore.testing.memory._content import Content
from asrcore.testing.memory._session import Session
from asrcore.testing.memory._state import Commit, Journal, Log, PointState, Promotion, ReplicaState, WorldState

__all__ = ["MemoryReplica", "MemoryTarget", "MemoryWriter"]

_Result = TypeVar("_Result")


def _writable(state: WorldState) -> None:
    if state.read_only:
        raise TargetReadOnly(where=f"memory:{state.name}", detail="")


@attrs.frozen
class _Call:
    """A call that is not flushed yet. `data` is empty but for kind `data`."""

    kind: str
    disk_id: str
    extent: Extent
    data: bytes = b""


class MemoryWriter(CycleWriter):
    """See `CycleWriter`."""

    def __init__(self, session: Session, replica_id: str, spec: CycleSpec) -> None:
        self._session = session
        self._id = replica_id
        self._spec = spec
        self._lock = threading.Lock()
        self._calls: list[_Call] = []
        self._closed = False

    def _journal(self, replica: ReplicaState) -> Journal:
        """The journal of this cycle. Raises StaleEpoch when another has taken over."""
        replica.own(self._spec.epoch)
        journal = replica.journal
        if self._closed or journal is None or journal.cycle_id != self._spec.cycle_id:
            raise WrongState(
                machine=replica.name,
                event=f"write to cycle {self._spec.cycle_id}",
                state="not in that cycle",
                reason="It was sealed, discarded or closed.",
                possible="open a cycle",
            )
        return journal

    def done(self, disk_id: str) -> list[Extent]:
        with self._session.look() as state:
            log = self._journal(state.replica(self._id)).logs.get(disk_id)
            return log.done if log else []

    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        self._take(_Call("data", disk_id, Extent(offset, len(data)), bytes(data)))

    def zero(self, disk_id: str, offset: int, length: int) -> None:
        self._take(_Call("zero", disk_id, Extent(offset, length)))

    def same(self, disk_id: str, offset: int, length: int) -> None:
        self._take(_Call("same", disk_id, Extent(offset, length)))

    def _take(self, call: _Call) -> None:
        size = self._spec.disks[call.disk_id]
        if call.extent.offset < 0 or call.extent.end > size:
            raise ValueError(f"{call.extent} is not within disk {call.disk_id} of {size} bytes")
        with self._session.look() as state, self._lock:
            self._journal(state.replica(self._id))
            _writable(state)
            if state.room is not None and sum(len(item.data) for item in self._calls) + len(call.data) > state.room:
                raise TargetFull(where=f"memory:{state.name}", detail="")
            self._calls.append(call)

    def flush(self) -> None:
        reach("target.flush")
        with self._session.change() as state, self._lock:
            journal = self._journal(state.replica(self._id))
            if self._calls:
                _writable(state)
            self._log(journal)
            if state.room is not None:
                state.room -= sum(len(call.data) for call in self._calls)
            self._calls.clear()
        reach("target.flushed")

    def _log(self, journal: Journal) -> None:
        for (disk_id, kind), run in groupby(self._calls, key=lambda call: (call.disk_id, call.kind)):
            calls = list(run)
            size = journal.disks[disk_id]
            log = journal.logs.setdefault(disk_id, Log(Content(size)))
            log.content.resize(max(size, log.content.size))
            for call in calls:
                if kind == "data":
                    log.content.write(call.extent.offset, call.data)
            log.put(kind, [call.extent for call in calls])

    def seal(self, spec: SealSpec) -> StoredPoint:
        reach("target.seal.begin")
        with self._session.change() as state:
            sealed = [point.point for point in state.replica(self._id).points if point.point.id == spec.point_id]
        if sealed:
            return sealed[0]
        self.flush()
        with self._session.change() as state:
            _writable(state)
            self._commit(self._journal(state.replica(self._id)), spec)
        reach("target.seal.commit")
        with self._session.change() as state:
            point = state.replica(self._id).point(spec.point_id).point
        reach("target.seal.applied")
        return point

    def _commit(self, journal: Journal, spec: SealSpec) -> None:
        journal.commit = Commit(spec, self._session.world.clock())

    def discard(self) -> None:
        with self._session.change() as state:
            replica = state.replica(self._id)
            replica.own(self._spec.epoch)
            if replica.journal is not None and replica.journal.cycle_id == self._spec.cycle_id:
                replica.journal = None
            self._calls.clear()
        reach("target.discarded")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._calls.clear()


class MemoryReplica(Replica):
    """See `Replica`."""

    writer_type = MemoryWriter

    def __init__(self, session: Session, replica_id: str) -> None:
        self._session = session
        self._id = replica_id

    def _look(self, read: Callable[[ReplicaState], _Result]) -> _Result:
        with self._session.look() as state:
            return read(state.replica(self._id))

    def info(self) -> ReplicaInfo:
        return self._look(
            lambda replica: ReplicaInfo(
                replica_id=replica.id,
                epoch=replica.epoch,
                disks={disk_id: content.size for disk_id, content in replica.head.items()},
                points=tuple(point.point for point in replica.points),
                pending=replica.journal.cycle_id if replica.journal else None,
                kind="memory",
                promoted=_promoted(replica.promotion),
                keeps_digests=True,
            )
        )

    def raise_epoch(self, epoch: int) -> None:
        with self._session.change() as state:
            state.replica(self._id).own(epoch)
        reach("target.epoch.raised")

    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        with self._session.change() as state:
            _writable(state)
            replica = state.replica(self._id)
            self._admit(replica, spec)
            if replica.journal is None:
                replica.journal = Journal(spec.cycle_id, spec.base_point, dict(spec.disks))
            elif replica.journal.cycle_id != spec.cycle_id:
                raise MachineBusy(machine=replica.name, work=f"cycle {replica.journal.cycle_id}")
            replica.journal.disks = dict(spec.disks)  # disks may have come, gone or grown since it was interrupted
        reach("target.cycle.opened")
        return self.writer_type(self._session, self._id, spec)

    def _admit(self, replica: ReplicaState, spec: CycleSpec) -> None:
        replica.own(spec.epoch)
        if replica.promotion is not None:
            raise ReplicaPromoted(replica=replica.id, machine=replica.name)
        if spec.base_point != replica.head_point:
            raise StaleBase(replica=replica.id, head=replica.head_point, base=spec.base_point)

    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        wanted = set(point_ids)
        with self._session.change() as state:
            replica = state.replica(self._id)
            replica.own(epoch)
            replica.points = [
                point
                for point in replica.points
                if point.point.id not in wanted or point is replica.points[-1] or self._is_held(replica, point)
            ]
        reach("target.points.dropped")

    def _is_held(self, replica: ReplicaState, point: PointState) -> bool:
        return point.point.pinned or replica.in_use(point.point.id)

    def pin(self, point_id: str, pinned: bool) -> None:
        with self._session.change() as state:
            point = state.replica(self._id).point(point_id)
            point.point = attrs.evolve(point.point, pinned=pinned)
        reach("target.pinned")

    def description(self, point_id: str) -> Description:
        return self._look(lambda replica: replica.point(point_id).description)

    def examine(
        self, point_id: str, *, start: int | None = None, limit: int | None = None, watch: Watch | None = None
    ) -> Examination:
        found = super().examine(point_id, start=start, limit=limit, watch=watch)
        point = self._look(lambda replica: replica.point(point_id))
        damage = [
            f"disk {disk_id}: a block of the {extent.length} bytes at {extent.offset} is not as it was written"
            for disk_id, extents in examination_parts(point.point.disks, start, limit)[0]
            for extent in extents
            if point.disks[disk_id].differs(point.sealed[disk_id], extent.offset, extent.length)
        ]
        return attrs.evolve(found, damage=(*found.damage, *damage), proved=0 if damage else found.read)

    def mark_damaged(self, point_id: str, damaged: str, epoch: int | None = None) -> None:
        with self._session.change() as state:
            replica = state.replica(self._id)
            if epoch is not None and epoch < replica.epoch:
                raise StaleEpoch(replica=self._id, epoch=epoch, owner=replica.epoch)
            point = replica.point(point_id)
            point.point = attrs.evolve(point.point, damaged=damaged)
        reach("target.marked")

    def allocated(self, disk_id: str) -> list[Extent]:
        return self._look(lambda replica: _disk(replica.head, disk_id).extents())

    def reader(self, disk_id: str, point_id: str | None = None) -> DiskReader:
        def content(replica: ReplicaState) -> Content:
            disks = replica.head if point_id is None else replica.point(point_id).disks
            return _disk(disks, disk_id).snapshot()

        return _Reader(self._session, self._look(content))


def _promoted(promotion: Promotion | None) -> Promoted | None:
    return None if promotion is None else Promoted(promotion.point_id, promotion.machine_id)


def _disk(disks: dict[str, Content], disk_id: str) -> Content:
    if disk_id not in disks:
        raise InvalidValue(what="disk", value=disk_id, wanted=f"one of {', '.join(disks) or 'none'}")
    return disks[disk_id]


class _Reader(DiskReader):
    def __init__(self, session: Session, content: Content) -> None:
        self._session = session
        self._content = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self._session.look():
            pass  # only whether the site can be reached
        self._content.read_into(offset, buffer)


def _in_the_way(state: WorldState, machine_id: str) -> list[Finding]:
    there = state.machines.get(machine_id)
    if there is None or there.fence is not None:
        return []
    return [
        Finding(
            "machine-exists",
            Severity.ERROR,
            f"the target already has a machine {machine_id!r}",
            "A failover would make a second machine of the same identity.",
            "Delete or fence it at the target.",
        )
    ]


class MemoryTarget(Target):
    """See `Target`."""

    replica_type = MemoryReplica

    def __init__(self, session: Session) -> None:
        self._session = session

    def findings(self, description: Description, policy: Policy) -> list[Finding]:
        with self._session.look() as state:
            found = []
            need = sum(disk.size for disk in description.machine.disks)
            if need > state.free:
                found.append(
                    Finding(
                        "target-small",
                        Severity.WARNING,
                        f"the disks may grow to {need} bytes, {state.free} are free",
                        "A replica stores what is written, up to the size of the disks, and more for its points.",
                        "Add storage to the target, or monitor its free space.",
                    )
                )
            missing = {nic.network for nic in description.machine.nics} - state.networks
            found += [
                Finding(
                    "network-missing",
                    Severity.WARNING,
                    f"the target has no network {network!r}",
                    "The machine is connected to it at the source, and no mapping names another.",
                    "Map it to a network of the target.",
                )
                for network in sorted(missing)
            ]
            return found + _in_the_way(state, description.machine.id)

    def failover_findings(self, spec: PromoteSpec) -> list[Finding]:
        super().failover_findings(spec)
        with self._session.look() as state:
            replica = state.replica(spec.replica_id)
            machine = replica.point(spec.point_id).description.machine
            found = _in_the_way(state, machine.id) if replica.promotion is None else []
            if state.refuses_start:
                found.append(
                    Finding(
                        "cannot-start",
                        Severity.ERROR,
                        f"the target does not start machines: {state.refuses_start}",
                        "The test said so.",
                        "Let it start machines.",
                    )
                )
            return found

    def capacity(self) -> Capacity:
        with self._session.look() as state:
            return Capacity(state.capacity, state.free)

    def create_replica(self, spec: ReplicaSpec, watch: Watch) -> Replica:
        with self._session.change() as state:
            if spec.replica_id not in state.replicas:
                _writable(state)
                state.replicas[spec.replica_id] = ReplicaState(
                    spec.replica_id, spec.name, spec.epoch, self._first_content(state, spec)
                )
        watch.check()
        reach("target.created")
        return self.replica(spec.replica_id)

    def _first_content(self, state: WorldState, spec: ReplicaSpec) -> dict[str, Content]:
        head = {disk.id: Content(disk.size) for disk in spec.description.machine.disks}
        if spec.seed_machine is None:
            return head
        if Capability.SEED not in state.capabilities:
            self._session.need(Capability.SEED, "start a replica from a machine's disks")
        seed = state.machines.get(spec.seed_machine)
        if seed is None:
            raise MachineNotFound(site=self._session.site, machine=spec.seed_machine)
        if seed.power is not PowerState.OFF:
            raise WrongState(
                machine=seed.base.name,
                event="be a seed",
                state=seed.power.value,
                reason="Its disks change while it runs.",
                possible="stop it first",
            )
        for disk_id in head.keys() & seed.disks.keys():
            size = head[disk_id].size
            head[disk_id] = seed.disks[disk_id].content.snapshot()
            head[disk_id].resize(size)
        return head

    def replica(self, replica_id: str) -> Replica:
        with self._session.look() as state:
            state.replica(replica_id)
        return self.replica_type(self._session, replica_id)

    def replicas(self) -> list[str]:
        with self._session.look() as state:
            return sorted(state.replicas)

    def delete_replica(self, replica_id: str, epoch: int) -> None:
        with self._session.change() as state:
            if replica_id not in state.replicas:
                return
            replica = state.replica(replica_id)
            replica.own(epoch)
            if replica.promotion is not None:
                raise WrongState(
                    machine=replica.name,
                    event="have its replica deleted",
                    state="failed over, not committed",
                    reason="The machine at the target uses the replica.",
                    possible="commit or undo the failover first",
                )
            for test in replica.tests.values():
                state.machines.pop(test.machine_id, None)
            del state.replicas[replica_id]
        reach("target.deleted")
