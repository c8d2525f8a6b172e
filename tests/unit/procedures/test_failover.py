"""Failing over, back and forth, on memory sites: who runs where, what is lost, who may write."""

from __future__ import annotations

import attrs
import pytest

from asrcore import driver
from asrcore.errors import MachineNotFound, PointNotFound, ShutdownFailed, SiteUnreachable, StaleEpoch, WrongState
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.service.scheduler import Scheduler
from asrcore.units import format_time
from tests.unit.rig import Rig, facts


@pytest.fixture
def protected(rig: Rig) -> Rig:
    rig.protect()
    return rig


def power(rig: Rig, site: str, machine: str = "web") -> PowerState:
    world = rig.home if site == "a" else rig.away
    return world.machine(machine).value.power


def test_a_test_runs_beside_replication_and_leaves_nothing(protected: Rig) -> None:
    job = protected.engine.failover_test("web")
    test_machine = str(facts(job)["machine_id"])
    assert power(protected, "b", test_machine) is PowerState.RUNNING
    protected.machine.write("vda", 4096, b"while the test runs")
    protected.engine.replicate("web")
    assert protected.content() == protected.truth()
    protected.engine.failover_cleanup("web")
    assert protected.protection.test is None
    with pytest.raises(MachineNotFound):
        protected.engine.context.site("b").inventory.machine(test_machine)


def test_what_was_repaired_is_told(protected: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the job and in the log of events, of a test and of a failover."""
    failover = type(protected.engine.context.site("b").failover)
    start, promote = failover.start_test, failover.promote

    def repaired(made: driver.Instance) -> driver.Instance:
        return attrs.evolve(made, repairs=("root by UUID", "left: an odd thing"))

    monkeypatch.setattr(failover, "start_test", lambda *given: repaired(start(*given)))
    monkeypatch.setattr(failover, "promote", lambda *given: repaired(promote(*given)))
    reported = ["root by UUID", "left: an odd thing"]
    assert facts(protected.engine.failover_test("web"))["repairs"] == reported
    assert facts(protected.engine.failover_unplanned("web"))["repairs"] == reported
    events = [item.text for item in protected.engine.vault.events(machine="web") if item.kind == "repair"]
    assert events == [*reported, *reported]


def test_a_second_test_takes_the_place_of_the_first(protected: Rig) -> None:
    first = str(facts(protected.engine.failover_test("web"))["machine_id"])
    second = str(facts(protected.engine.failover_test("web"))["machine_id"])
    machines = {machine.id for machine in protected.engine.machines("b")}
    assert second in machines
    assert first not in machines


def test_planned_failover_loses_nothing_and_stops_the_source_first(protected: Rig) -> None:
    protected.machine.write("vda", 0, b"the last write")
    truth = protected.truth()
    protected.engine.failover_planned("web")
    assert protected.protection.state is State.FAILED_OVER
    assert power(protected, "a") is PowerState.OFF
    assert power(protected, "b") is PowerState.RUNNING
    instance = protected.away.machine("web")
    assert {disk.id: instance.sha256(disk.id) for disk in instance.value.disks} == truth


def test_planned_failover_of_a_guest_that_ignores_the_request_is_taken_back(protected: Rig) -> None:
    protected.machine.configure(ignores_shutdown=True)
    with pytest.raises(ShutdownFailed):
        protected.engine.failover_planned("web")
    assert protected.protection.state is State.PROTECTED
    assert power(protected, "a") is PowerState.RUNNING
    protected.engine.replicate("web")


def test_planned_failover_with_a_full_target_starts_the_source_again(protected: Rig) -> None:
    protected.machine.write("vda", 0, b"x" * 100_000)
    protected.away.fill(room=0)
    with pytest.raises(Exception, match="no space"):
        protected.engine.failover_planned("web")
    assert protected.protection.state is State.PROTECTED
    assert power(protected, "a") is PowerState.RUNNING


def test_planned_failover_with_lost_tracking_compares_instead_of_losing(protected: Rig) -> None:
    protected.machine.write("vda", 8192, b"not in any log")
    protected.machine.lose_tracking()
    truth = protected.truth()
    protected.engine.failover_planned("web")
    instance = protected.away.machine("web")
    assert {disk.id: instance.sha256(disk.id) for disk in instance.value.disks} == truth


def test_unplanned_failover_does_not_wait_for_a_lost_site_and_owes_the_fence(protected: Rig) -> None:
    protected.home.cut()
    job = protected.engine.failover_unplanned("web")
    assert protected.protection.fence_due
    assert str(facts(job)["fence"]).startswith("owed")
    assert power(protected, "b") is PowerState.RUNNING


def test_a_source_that_returns_is_quarantined_and_stays_down(protected: Rig) -> None:
    protected.home.cut()
    protected.engine.failover_unplanned("web")
    protected.home.restore()
    assert power(protected, "a") is PowerState.RUNNING  # it came back with its host
    scheduler = Scheduler(protected.engine.context, lambda kind, protection, arguments: None)
    scheduler._fence(protected.protection, Watch())
    assert power(protected, "a") is PowerState.OFF
    assert not protected.protection.fence_due
    with pytest.raises(WrongState):
        protected.engine.context.site("a").inventory.power_on("web")


def test_an_old_epoch_cannot_write_after_a_failover(protected: Rig) -> None:
    before = protected.protection
    replica = protected.engine.context.site("b").target.replica(before.replica_id)
    sizes = dict(replica.info().disks)
    protected.engine.failover_unplanned("web")
    spec = driver.CycleSpec("late", before.epoch, before.head_point, sizes)
    with pytest.raises(StaleEpoch):
        replica.open_cycle(spec)


def test_unplanned_failover_to_an_older_point_by_id_and_by_time(protected: Rig) -> None:
    first = protected.engine.points("web")[0]
    old = protected.truth()
    protected.clock.now += 60
    protected.machine.write("vda", 0, b"newer")
    protected.engine.replicate("web")
    between = format_time(first.taken_at + 30)
    for wanted in (first.id, first.id[:6], between):
        protected.engine.failover_unplanned("web", point=wanted)
        assert protected.protection.failover_point == first.id
        instance = protected.away.machine("web")
        assert {disk.id: instance.sha256(disk.id) for disk in instance.value.disks} == old
        protected.engine.failover_undo("web")
    with pytest.raises(PointNotFound):
        protected.engine.failover_unplanned("web", point="2001-01-01T00:00:00Z")
    assert protected.protection.state is State.PROTECTED


def test_undo_gives_the_source_back_and_replication_goes_on(protected: Rig) -> None:
    protected.engine.failover_planned("web")
    protected.away.machine("web").write("vda", 0, b"to be forgotten")
    protected.engine.failover_undo("web")
    assert protected.protection.state is State.PROTECTED
    assert power(protected, "a") is PowerState.RUNNING
    protected.machine.write("vda", 0, b"life goes on")
    protected.engine.replicate("web")
    assert protected.content() == protected.truth()


def test_there_and_back_again_sends_only_differences(protected: Rig) -> None:
    protected.engine.failover_planned("web")
    protected.engine.failover_commit("web")
    assert protected.protection.state is State.COMMITTED
    assert protected.engine.points("web") == []  # the replica is gone, and all its points
    protected.away.machine("web").write("vda", 64 * 1024, b"written at the other site")
    job = protected.engine.reprotect("web")
    assert facts(job)["bytes_sent"] == 64 * 1024  # one block of the comparison
    assert protected.protection.direction.value == "reverse"
    assert protected.content() == protected.truth()
    protected.engine.failover_planned("web")
    assert power(protected, "a") is PowerState.RUNNING
    protected.engine.failover_commit("web")
    job = protected.engine.reprotect("web")
    assert facts(job)["bytes_sent"] == 0
    assert protected.protection.direction.value == "forward"
    assert protected.protection.epoch > 4


def test_reprotect_needs_the_former_source(protected: Rig) -> None:
    protected.home.cut()
    protected.engine.failover_unplanned("web")
    protected.engine.failover_commit("web")
    with pytest.raises(SiteUnreachable):
        protected.engine.reprotect("web")
    assert protected.protection.state is State.COMMITTED


def test_commit_needs_a_failover(protected: Rig) -> None:
    with pytest.raises(WrongState) as caught:
        protected.engine.failover_commit("web")
    assert "fail over" in caught.value.action_text


def test_unprotect_leaves_the_machine_and_removes_replica_and_marks(protected: Rig) -> None:
    replica = protected.protection.replica_id
    protected.engine.failover_test("web")
    protected.engine.unprotect("web")
    assert protected.engine.vault.protections() == []
    assert replica not in protected.engine.context.site("b").target.replicas()
    assert protected.machine.marks == []
    assert power(protected, "a") is PowerState.RUNNING
    assert [machine.name for machine in protected.engine.machines("b")] == []


def test_a_point_that_a_test_stands_on_outlives_its_age_until_the_test_is_over(protected: Rig) -> None:
    tested = protected.engine.points("web")[0].id
    protected.engine.failover_test("web", point=tested)
    protected.clock.now += 400 * 86400
    protected.engine.replicate("web")
    assert tested in {point.id for point in protected.engine.points("web")}
    protected.engine.failover_cleanup("web")
    protected.clock.now += 10
    protected.engine.replicate("web")
    replica = protected.engine.context.site("b").target.replica(protected.protection.replica_id)
    assert tested not in {point.id for point in replica.info().points}


def test_a_first_site_that_was_built_anew_gets_everything(protected: Rig) -> None:
    protected.home.cut()
    protected.engine.failover_unplanned("web")
    protected.engine.failover_commit("web")
    protected.home.restore()
    protected.home.remove_machine("web")
    job = protected.engine.reprotect("web")
    assert int(str(facts(job)["bytes_sent"])) > 200_000
    assert protected.content() == protected.truth()


def test_protection_of_a_committed_machine_can_be_ended(protected: Rig) -> None:
    protected.engine.failover_planned("web")
    protected.engine.failover_commit("web")
    protected.engine.unprotect("web")
    assert protected.engine.vault.protections() == []
    assert power(protected, "b") is PowerState.RUNNING
