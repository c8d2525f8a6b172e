"""Machines made from recovery points in a memory world. Their disks are snapshots: a point is never written."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from asrcore.crashpoint import reach
from asrcore.driver import Failover, Instance, PromoteSpec, TestSpec
from asrcore.errors import AlreadyExists, DriverFailed, InvalidValue, WrongState
from asrcore.model.machine import Machine, Nic, PowerState
from asrcore.model.watch import Watch
from asrcore.testing.memory._content import Content
from asrcore.testing.memory._session import Session
from asrcore.testing.memory._state import (
    DiskState,
    MachineState,
    PointState,
    Promotion,
    ReplicaState,
    TestState,
    WorldState,
)

__all__ = ["MemoryFailover"]


class MemoryFailover(Failover):
    """See `Failover`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    # -- test

    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        with self._session.change() as state:
            replica = state.replica(spec.replica_id)
            if spec.test_id not in replica.tests:
                self._make_test(state, replica, spec)
        reach("failover.test.created")
        watch.check()
        with self._session.change() as state:
            test = state.replica(spec.replica_id).tests[spec.test_id]
            machine = state.machine(test.machine_id)
            if state.refuses_start:
                raise DriverFailed(operation="starting a machine", site=self._session.site, detail=state.refuses_start)
            machine.power = PowerState.RUNNING
            instance = Instance(machine.base.id, machine.base.name)
        reach("failover.test.started")
        return instance

    def _make_test(self, state: WorldState, replica: ReplicaState, spec: TestSpec) -> None:
        point = replica.point(spec.point_id)
        if spec.network and spec.network not in state.networks:
            raise InvalidValue(what="test network", value=spec.network, wanted="a network of the site")
        source = point.description.machine
        machine_id = f"test-{spec.test_id}"
        machine = attrs.evolve(
            source,
            id=machine_id,
            name=spec.name,
            nics=tuple(attrs.evolve(nic, network=spec.network) for nic in source.nics),
        )
        state.machines[machine_id] = _machine(state, point, machine, self._test_disks(point))
        replica.tests[spec.test_id] = TestState(spec.point_id, machine_id)

    def _test_disks(self, point: PointState) -> Mapping[str, Content]:
        return {disk_id: content.snapshot() for disk_id, content in point.disks.items()}

    def stop_test(self, replica_id: str, test_id: str) -> None:
        with self._session.change() as state:
            replica = state.replicas.get(replica_id)
            test = replica.tests.pop(test_id, None) if replica else None
            if test is not None:
                state.machines.pop(test.machine_id, None)
        reach("failover.test.stopped")

    def tests(self, replica_id: str) -> list[str]:
        with self._session.look() as state:
            return sorted(state.replicas[replica_id].tests) if replica_id in state.replicas else []

    # -- promotion

    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        with self._session.change() as state:
            replica = state.replica(spec.replica_id)
            replica.own(spec.epoch)
            point = replica.point(spec.point_id)
            self._make_room(state, replica, point)
        reach("failover.promote.begun")
        watch.check()
        with self._session.change() as state:
            replica = state.replica(spec.replica_id)
            source = point.description.machine
            if source.id not in state.machines:
                nics = tuple(self._plug(nic, spec) for nic in source.nics)
                machine = attrs.evolve(source, nics=nics)
                content = {disk_id: disk.snapshot() for disk_id, disk in point.disks.items()}
                state.machines[source.id] = _machine(state, point, machine, content)
            instance = Instance(source.id, state.machine(source.id).base.name)
        reach("failover.promoted")
        return instance

    def _make_room(self, state: WorldState, replica: ReplicaState, point: PointState) -> None:
        """Record the promotion; an existing machine of this identity is put aside or deleted, if it may be."""
        machine_id = point.description.machine.id
        there = state.machines.get(machine_id)
        if replica.promotion is None:
            if there is not None and there.fence is None:
                raise AlreadyExists(kind="machine", name=machine_id)
            replica.promotion = Promotion(point.point.id, machine_id, state.machines.pop(machine_id, None))
        elif replica.promotion.point_id != point.point.id:
            if there is not None and there.power is not PowerState.OFF:
                raise WrongState(
                    machine=there.base.name,
                    event="be replaced by another point",
                    state=there.power.value,
                    reason="What it wrote since the failover would be lost.",
                    possible="stop it first",
                )
            state.machines.pop(machine_id, None)
            replica.promotion.point_id = point.point.id

    def _plug(self, nic: Nic, spec: PromoteSpec) -> Nic:
        return attrs.evolve(nic, network=spec.networks.target(nic.network))

    def undo(self, replica_id: str, epoch: int) -> None:
        with self._session.change() as state:
            replica = state.replica(replica_id)
            replica.own(epoch)
            if replica.promotion is None:
                return
            self._take_back(state, replica, replica.promotion)
        reach("failover.undone")

    def _take_back(self, state: WorldState, replica: ReplicaState, promotion: Promotion) -> None:
        state.machines.pop(promotion.machine_id, None)
        if promotion.aside is not None:
            state.machines[promotion.machine_id] = promotion.aside
        replica.promotion = None

    def commit(self, replica_id: str, epoch: int, watch: Watch) -> None:
        with self._session.change() as state:
            if replica_id not in state.replicas:
                return  # it was deleted by an earlier commit that was killed before it could report that
            replica = state.replica(replica_id)
            replica.own(epoch)
            if replica.promotion is None:
                raise WrongState(
                    machine=replica.name,
                    event="be committed",
                    state="not failed over",
                    reason="No machine was made from a point of this replica.",
                    possible="fail over first",
                )
            replica.promotion.committing = True
        reach("failover.commit.begun")
        watch.check()
        with self._session.change() as state:
            replica = state.replica(replica_id)
            self._finish(state, replica)
        reach("failover.committed")

    def _finish(self, state: WorldState, replica: ReplicaState) -> None:
        aside = replica.promotion.aside if replica.promotion else None
        for disk_id, disk in (aside.disks if aside else {}).items():
            if not disk.ours:
                state.left_disks[f"{replica.name}/{disk_id}"] = disk
        for test in replica.tests.values():
            state.machines.pop(test.machine_id, None)
        del state.replicas[replica.id]


def _machine(state: WorldState, point: PointState, machine: Machine, content: Mapping[str, Content]) -> MachineState:
    disks = {
        disk.id: DiskState(
            attrs.evolve(disk, location=f"memory:{machine.id}/{disk.id}"),
            state.number(),
            content[disk.id],
            ours=True,
        )
        for disk in machine.disks
        if disk.id in content
    }
    base = attrs.evolve(machine, disks=(), power=PowerState.UNKNOWN)
    return MachineState(base, disks, PowerState.OFF, point.description.artifacts)
