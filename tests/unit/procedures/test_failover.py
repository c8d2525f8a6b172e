"""Planned and unplanned failover on memory sites: which machine runs where, what is lost, and who may write."""

from __future__ import annotations

import threading
from typing import Any

import attrs
import pytest

from asrcore import driver
from asrcore.errors import (
    Cancelled,
    DriverFailed,
    MachineNotFound,
    PointNotFound,
    ReplicaNotFound,
    ShutdownFailed,
    StaleEpoch,
    TargetNotReady,
    VaultUnavailable,
    WrongState,
)
from asrcore.model.health import Level
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.procedures.failover import PLANNED, UNPLANNED
from asrcore.procedures.give_back import release_source
from asrcore.procedures.procedure import Arguments, Work
from asrcore.service.scheduler import Scheduler, _to_fence
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


def test_unplanned_failover_without_its_replica_leaves_the_source_alone(protected: Rig) -> None:
    """As when the target's file system is not mounted: the job fails, nothing is changed, nothing is fenced."""
    before = protected.protection
    with protected.away.change() as state:
        replicas, state.replicas = state.replicas, {}
    with pytest.raises(ReplicaNotFound):
        protected.engine.failover_unplanned("web")
    assert protected.protection == before
    assert _to_fence(protected.protection) is None
    assert protected.power("a") is PowerState.RUNNING
    with protected.away.change() as state:
        state.replicas = replicas
    protected.engine.replicate("web")


def test_unplanned_failover_without_its_point_leaves_the_source_alone(protected: Rig) -> None:
    """As after a vault was restored: it names a point that the target does not have any more."""
    before = protected.protection
    with protected.away.change() as state:
        state.replica(before.replica_id).points.clear()
    with pytest.raises(PointNotFound) as caught:
        protected.engine.failover_unplanned("web")
    assert "asr point list web" in caught.value.action_text
    assert protected.protection == before
    assert protected.power("a") is PowerState.RUNNING


@pytest.mark.parametrize("verb", ["failover_planned", "failover_unplanned"])
def test_a_target_that_cannot_run_it_is_asked_first(protected: Rig, verb: str) -> None:
    before = protected.protection
    protected.away.configure(refuses_start="no network lan")
    with pytest.raises(TargetNotReady, match="no network lan"):
        getattr(protected.engine, verb)("web")
    assert protected.protection == before
    assert protected.power("a") is PowerState.RUNNING


def test_a_planned_failover_that_is_forced_is_taken_back_when_the_start_fails(protected: Rig) -> None:
    protected.away.configure(refuses_start="no network lan")
    protected.machine.write("vda", 0, b"the last write")
    with pytest.raises(DriverFailed, match="no network lan"):
        protected.engine.failover_planned("web", force=True)
    assert protected.protection.state is State.PROTECTED
    assert not protected.protection.undo_due
    assert protected.power("a") is PowerState.RUNNING
    with pytest.raises(MachineNotFound):
        protected.power("b")
    protected.machine.write("vda", 4096, b"nothing is lost")
    protected.engine.replicate("web")
    assert protected.content() == protected.truth()


def test_a_machine_that_was_off_stays_off_when_its_failover_is_taken_back(protected: Rig) -> None:
    protected.machine.stop()
    protected.away.configure(refuses_start="no network lan")
    with pytest.raises(DriverFailed):
        protected.engine.failover_planned("web", force=True)
    assert protected.protection.state is State.PROTECTED
    assert protected.power("a") is PowerState.OFF


def test_an_unplanned_failover_whose_start_fails_names_the_way_out(protected: Rig) -> None:
    protected.away.configure(refuses_start="no network lan")
    with pytest.raises(DriverFailed):
        protected.engine.failover_unplanned("web", force=True)
    (status,) = protected.engine.status()
    assert status.health.level is Level.CRITICAL
    assert "`asr failover undo web`" in "".join(reason.action for reason in status.health.reasons)
    protected.engine.failover_undo("web")
    assert protected.power("a") is PowerState.RUNNING


def test_a_fence_is_owed_only_once_the_machine_exists_at_the_target(
    protected: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    failover = type(protected.engine.context.site("b").failover)
    promote = failover.promote

    def looked(*given: Any) -> driver.Instance:
        seen.append(_to_fence(protected.protection))
        return promote(*given)

    monkeypatch.setattr(failover, "promote", looked)
    protected.home.cut()
    protected.engine.failover_unplanned("web")
    assert seen == [None]
    assert _to_fence(protected.protection) == ("a", "web")


@pytest.mark.parametrize("verb", ["failover_planned", "failover_unplanned"])
def test_a_vault_that_does_not_answer_is_no_failure_of_the_failover(
    protected: Rig, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a kill: nothing is taken back, the step is run again when the vault is back."""
    failover = type(protected.engine.context.site("b").failover)

    def blinks(*given: object) -> driver.Instance:
        raise VaultUnavailable(url="vault", detail="restarting")

    with monkeypatch.context() as patch:
        patch.setattr(failover, "promote", blinks)
        with pytest.raises(VaultUnavailable):
            getattr(protected.engine, verb)("web")
    assert protected.protection.state is State.FAILING_OVER
    getattr(protected.engine, verb)("web")
    assert protected.power("b") is PowerState.RUNNING


@pytest.mark.parametrize("step", ["take-replica", "stop-source", "last-delta", "promote", "fence-source", "start"])
def test_a_planned_failover_that_is_cancelled_is_taken_back(protected: Rig, step: str) -> None:
    """Also between two steps, where the source is stopped already."""
    work = Work(protected.engine.context, "j1", protected.protection.id, Arguments(), Watch())
    for item in PLANNED.steps:
        if item.name == step:
            assert item.checks_itself
            work.watch.cancel()
            with pytest.raises(Cancelled):
                item.run(work)
            break
        item.run(work)
    assert protected.protection.state is State.PROTECTED
    assert protected.power("a") is PowerState.RUNNING
    assert protected.engine.machines("b") == []


def test_an_unplanned_failover_that_is_cancelled_before_the_machine_is_made_takes_nothing(protected: Rig) -> None:
    work = Work(protected.engine.context, "j1", protected.protection.id, Arguments(), Watch())
    for item in UNPLANNED.steps[:2]:
        item.run(work)
    work.watch.cancel()
    with pytest.raises(Cancelled):
        UNPLANNED.steps[2].run(work)
    assert protected.protection.state is State.PROTECTED
    assert protected.power("a") is PowerState.RUNNING


@pytest.mark.parametrize("step", ["promote", "fence-source", "start"])
def test_an_unplanned_failover_with_a_machine_at_the_target_is_ended_though_it_is_cancelled(
    protected: Rig, step: str
) -> None:
    """The source is not fenced without a start at the target. `promote` is run again after a kill."""
    work = Work(protected.engine.context, "j1", protected.protection.id, Arguments(), Watch())
    steps = {item.name: item for item in UNPLANNED.steps}
    names = list(steps)
    for name in names[: max(3, names.index(step))]:
        steps[name].run(work)
    assert all(steps[name].checks_itself for name in ("promote", "fence-source", "start", "finish"))
    work.watch.cancel()
    for name in names[names.index(step) :]:
        steps[name].run(work)
    assert protected.protection.state is State.FAILED_OVER
    assert (protected.power("a"), protected.power("b")) == (PowerState.OFF, PowerState.RUNNING)


def test_a_planned_failover_is_refused_after_an_unplanned_one_that_got_stuck(protected: Rig) -> None:
    """The machine at the target lacks what the source wrote; nothing is changed, and health does not name it."""
    protected.machine.write("vda", 0, b"the last write")
    protected.away.configure(refuses_start="no network lan")
    with pytest.raises(DriverFailed):
        protected.engine.failover_unplanned("web", force=True)
    protected.away.configure(refuses_start="")
    before = protected.protection
    for refused in (
        lambda: protected.engine.failover_planned("web"),
        lambda: protected.engine.impact("failover-planned", "web"),
    ):
        with pytest.raises(WrongState, match="planned failover") as caught:
            refused()
        assert "`asr failover undo web`" in caught.value.action_text
    assert protected.protection == before
    (status,) = protected.engine.status()
    assert "failover planned" not in "".join(reason.action for reason in status.health.reasons)
    assert "after `asr failover undo web`" in str(protected.engine.impact("failover-unplanned", "web"))
    protected.engine.failover_undo("web")
    truth = protected.truth()
    protected.engine.failover_planned("web")
    instance = protected.away.machine("web")
    assert {disk.id: instance.sha256(disk.id) for disk in instance.value.disks} == truth


def test_a_fence_of_the_service_that_lands_while_the_failover_is_taken_back_is_withdrawn(
    protected: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was owed and under way. It lands when the source is released and started, before the end is recorded."""
    inventory = type(protected.engine.context.site("a").inventory)
    fence, sent, arrives = inventory.fence, threading.Event(), threading.Event()

    def late(*given: Any) -> None:
        sent.set()
        assert arrives.wait(30)
        fence(*given)

    def fails(*given: object) -> None:
        raise DriverFailed(operation="a call", site="a", detail="injected")

    work = Work(protected.engine.context, "j1", protected.protection.id, Arguments(), Watch())
    with monkeypatch.context() as patch:
        patch.setattr(inventory, "fence", fails)
        for item in PLANNED.steps[:6]:
            item.run(work)
    assert _to_fence(protected.protection) == ("a", "web")
    monkeypatch.setattr(inventory, "fence", late)
    scheduler = Scheduler(protected.engine.context, lambda kind, protection, arguments: None)
    service = threading.Thread(target=scheduler._fence, args=(protected.protection, Watch()))
    service.start()
    assert sent.wait(30)
    real = release_source

    def release(*given: Any, **named: Any) -> object:
        left = real(*given, **named)
        arrives.set()
        service.join(30)
        return left

    monkeypatch.setattr("asrcore.procedures.failover.release_source", release)
    protected.away.configure(refuses_start="no network lan")
    with protected.engine.context.locks.hold(protected.protection, "the failover", Watch()):
        with pytest.raises(DriverFailed, match="no network lan"):
            PLANNED.steps[6].run(work)
        assert protected.protection.state is State.PROTECTED
    scheduler._release_late(protected.protection, Watch())  # as at the service's next look
    assert protected.power("a") is PowerState.RUNNING
    with protected.home.look() as state:
        assert state.machines["web"].fence is None
    assert not protected.protection.fence_due
    assert protected.engine.context.fencing == {}
