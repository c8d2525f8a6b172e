"""Failovers that are broken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from asrcore.driver import CycleSpec, CycleWriter, Instance, PromoteSpec, ReplicaInfo, TestSpec
from asrcore.errors import AlreadyExists, DriverFailed
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Nic, PowerState
from asrcore.model.watch import Watch
from asrcore.testing.memory._content import Content
from asrcore.testing.memory._failover import MemoryFailover
from asrcore.testing.memory._state import PointState, ReplicaState, WorldState
from asrcore.testing.memory._target import MemoryReplica, MemoryTarget

from ._mutant import caught_by


@caught_by("test_a_test_changes_no_point")
class PointIsWrittenByATest(MemoryFailover):
    def _test_disks(self, point: PointState) -> Mapping[str, Content]:
        return point.disks


@caught_by("test_a_test_is_isolated")
class TestedMachineIsPluggedIn(MemoryFailover):
    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        return super().start_test(attrs.evolve(spec, network="lan"), watch)


@caught_by(
    "test_a_test_outlives_the_engine",
    "test_stopping_a_test_leaves_no_files",
    "test_stopping_a_test_leaves_nothing",
)
class StoppedTestLeavesItsMachine(MemoryFailover):
    """The machine of a stopped test stays."""

    def stop_test(self, replica_id: str, test_id: str) -> None:
        with self._session.change() as state:
            state.replica(replica_id).tests.pop(test_id, None)


@caught_by(
    "test_a_promoted_machine_holds_its_point",
    "test_a_promoted_machine_is_not_started",
    "test_another_point_replaces_the_machine",
)
class PromoteStartsTheMachine(MemoryFailover):
    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        instance = super().promote(spec, watch)
        with self._session.change() as state:
            state.machine(instance.machine_id).power = PowerState.RUNNING
        return instance


@caught_by(
    "test_a_promoted_machine_holds_its_point",
    "test_another_point_replaces_the_machine",
    "test_a_promotion_is_reported",
    "test_commit_of_a_stopped_machine_keeps_its_content",
    "test_undo_brings_back_what_was_put_aside",
)
class PromoteTakesTheNewestPoint(MemoryFailover):
    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        with self._session.look() as state:
            replica = state.replica(spec.replica_id)
            replica.point(spec.point_id)
            newest = replica.points[-1].point.id
        return super().promote(attrs.evolve(spec, point_id=newest), watch)


@caught_by("test_networks_are_mapped")
class PromoteIgnoresTheMap(MemoryFailover):
    def _plug(self, nic: Nic, spec: PromoteSpec) -> Nic:
        return nic


@caught_by("test_undo_leaves_the_replica_as_before")
class UndoLosesPoints(MemoryFailover):
    def undo(self, replica_id: str, epoch: int) -> None:
        with self._session.look() as state:
            promoted = state.replica(replica_id).promotion is not None
        super().undo(replica_id, epoch)
        if promoted:
            with self._session.change() as state:
                del state.replica(replica_id).points[0]


@caught_by("test_undo_brings_back_what_was_put_aside")
class UndoForgetsWhatWasPutAside(MemoryFailover):
    def undo(self, replica_id: str, epoch: int) -> None:
        with self._session.change() as state:
            promotion = state.replica(replica_id).promotion
            if promotion is not None:
                promotion.aside = None
        super().undo(replica_id, epoch)


@caught_by("test_failover_of_a_stale_epoch_is_refused")
class FailoverIgnoresTheEpoch(MemoryFailover):
    def undo(self, replica_id: str, epoch: int) -> None:
        super().undo(replica_id, epoch + 1000)


@caught_by(
    "test_commit_leaves_the_machine_alone",
    "test_commit_of_a_stopped_machine_keeps_its_content",
)
class CommitKeepsTheReplica(MemoryFailover):
    def _finish(self, state: WorldState, replica: ReplicaState) -> None:
        if replica.promotion is not None:
            replica.promotion.aside = None


@caught_by("test_commit_leaves_the_machine_alone")
class CommitStopsTheMachine(MemoryFailover):
    def _finish(self, state: WorldState, replica: ReplicaState) -> None:
        if replica.promotion is not None:
            state.machine(replica.promotion.machine_id).power = PowerState.OFF
        super()._finish(state, replica)


@caught_by("test_a_test_runs_under_its_own_name")
class NameOfATestIsTheMachines(MemoryFailover):
    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        with self._session.look() as state:
            name = state.replica(spec.replica_id).point(spec.point_id).description.machine.name
        return super().start_test(attrs.evolve(spec, name=name), watch)


@caught_by("test_starting_a_test_again_returns_it")
class StartingATestAgainMakesAnother(MemoryFailover):
    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        while spec.test_id in self.tests(spec.replica_id):
            spec = attrs.evolve(spec, test_id=spec.test_id + "-again")
        return super().start_test(spec, watch)


@caught_by("test_two_tests_at_once")
class StoppingATestStopsAll(MemoryFailover):
    def stop_test(self, replica_id: str, test_id: str) -> None:
        for each in self.tests(replica_id):
            super().stop_test(replica_id, each)


@caught_by("test_failover_to_an_unknown_point")
class UnknownPointIsTheHead(MemoryFailover):
    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        if spec.point_id == "no-such-point":
            with self._session.look() as state:
                spec = attrs.evolve(spec, point_id=state.replica(spec.replica_id).points[-1].point.id)
        return super().start_test(spec, watch)


@caught_by("test_a_promoted_machine_is_the_machine")
class PromotedMachineHasLessMemory(MemoryFailover):
    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        instance = super().promote(spec, watch)
        with self._session.change() as state:
            machine = state.machine(instance.machine_id)
            machine.base = attrs.evolve(machine.base, memory=machine.base.memory // 2)
        return instance


@caught_by("test_promoting_again_returns_the_machine")
class PromotingAgainFails(MemoryFailover):
    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        with self._session.look() as state:
            promotion = state.replica(spec.replica_id).promotion
        if promotion is not None and promotion.point_id == spec.point_id:
            raise AlreadyExists(kind="machine", name=promotion.machine_id)
        return super().promote(spec, watch)


@caught_by("test_a_promoted_replica_takes_no_cycle", tried_as="failover")
class CycleOverAPromotedMachine(MemoryReplica):
    def _admit(self, replica: ReplicaState, spec: CycleSpec) -> None:
        promotion, replica.promotion = replica.promotion, None
        try:
            super()._admit(replica, spec)
        finally:
            replica.promotion = promotion


@caught_by("test_a_promotion_is_reported", tried_as="failover")
class PromotionIsNotReported(MemoryReplica):
    def info(self) -> ReplicaInfo:
        return attrs.evolve(super().info(), promoted=None)


@caught_by("test_replication_goes_on_during_a_test", tried_as="failover")
class NoCycleDuringATest(MemoryReplica):
    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        if self._look(lambda replica: replica.tests):
            raise DriverFailed(operation="open", site=self._session.site, detail="a test is running")
        return super().open_cycle(spec)


@caught_by("test_replication_goes_on_during_a_test", tried_as="failover")
class DropPullsThePointFromUnderATest(MemoryReplica):
    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        wanted = set(point_ids)
        super().drop_points(wanted, epoch)
        with self._session.change() as state:
            for test in state.replica(self._id).tests.values():
                if test.point_id in wanted:
                    for disk in state.machine(test.machine_id).disks.values():
                        disk.content = Content(disk.content.size)


@caught_by("test_failover_findings_change_nothing", tried_as="failover")
class FindingsTakeTheReplica(MemoryTarget):
    def failover_findings(self, spec: PromoteSpec) -> list[Finding]:
        found = super().failover_findings(spec)
        self.replica(spec.replica_id).raise_epoch(spec.epoch)
        return found


@caught_by("test_failover_findings_read_the_point", tried_as="failover")
class FindingsReadNothing(MemoryTarget):
    def failover_findings(self, spec: PromoteSpec) -> list[Finding]:
        return []


@caught_by("test_failover_findings_change_nothing", tried_as="failover")
class FindingsSayThatItsOwnMachineIsInTheWay(MemoryTarget):
    def failover_findings(self, spec: PromoteSpec) -> list[Finding]:
        found = super().failover_findings(spec)
        with self._session.look() as state:
            if state.replica(spec.replica_id).promotion is not None:
                found.append(Finding("machine-exists", Severity.ERROR, "it exists", "It is there.", "Delete it."))
        return found
