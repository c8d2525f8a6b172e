"""Planned and unplanned failover on memory sites: which machine runs where, what is lost, and who may write."""

from __future__ import annotations

import attrs
import pytest

from asrcore import driver
from asrcore.errors import ShutdownFailed, StaleEpoch, WrongState
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.service.scheduler import Scheduler
from tests.unit.rig import Rig, facts


def test_repairs_are_reported(protected: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the job and in the event log, of a test and of a failover."""
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


def test_planned_failover_loses_nothing_and_stops_the_source_first(protected: Rig) -> None:
    protected.machine.write("vda", 0, b"the last write")
    truth = protected.truth()
    protected.engine.failover_planned("web")
    assert protected.protection.state is State.FAILED_OVER
    assert protected.power("a") is PowerState.OFF
    assert protected.power("b") is PowerState.RUNNING
    instance = protected.away.machine("web")
    assert {disk.id: instance.sha256(disk.id) for disk in instance.value.disks} == truth


def test_planned_failover_of_a_guest_that_ignores_the_request_is_taken_back(protected: Rig) -> None:
    protected.machine.configure(ignores_shutdown=True)
    with pytest.raises(ShutdownFailed):
        protected.engine.failover_planned("web")
    assert protected.protection.state is State.PROTECTED
    assert protected.power("a") is PowerState.RUNNING
    protected.engine.replicate("web")


def test_planned_failover_with_a_full_target_starts_the_source_again(protected: Rig) -> None:
    protected.machine.write("vda", 0, b"x" * 100_000)
    protected.away.fill(room=0)
    with pytest.raises(Exception, match="no space"):
        protected.engine.failover_planned("web")
    assert protected.protection.state is State.PROTECTED
    assert protected.power("a") is PowerState.RUNNING


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
    assert protected.power("b") is PowerState.RUNNING


def test_a_source_that_returns_is_quarantined_and_stays_down(protected: Rig) -> None:
    protected.home.cut()
    protected.engine.failover_unplanned("web")
    protected.home.restore()
    assert protected.power("a") is PowerState.RUNNING  # it came back with its host
    scheduler = Scheduler(protected.engine.context, lambda kind, protection, arguments: None)
    scheduler._fence(protected.protection, Watch())
    assert protected.power("a") is PowerState.OFF
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
