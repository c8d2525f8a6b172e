"""A machine that was given back to its source runs there, whatever arrives late and whichever failovers got stuck."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asrcore import driver
from asrcore.driver import Fence
from asrcore.errors import AsrError, DriverFailed, SiteUnreachable
from asrcore.model.health import Level
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.procedures import failover
from asrcore.procedures.procedure import Arguments, Work
from asrcore.service import scheduler
from asrcore.testing.faults import Faults, faulty_site
from asrcore.vault import Job, JobState
from tests.unit.rig import Rig
from tests.unit.service.test_scheduler import Service


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(scheduler, "TICK", 0.05)
    monkeypatch.setattr(scheduler, "FENCE_EVERY", 0.2)
    made = Service(tmp_path)
    made.engine.wait(made.engine.protect("web", source="a", target="b", policy="gold"), timeout=60)
    yield made
    made.close()


@pytest.fixture
def faults(service: Service, monkeypatch: pytest.MonkeyPatch) -> dict[str, Faults]:
    """Of the sites, by their names."""
    made = {"a": Faults(), "b": Faults()}
    plain = service.engine.context.site

    def site(name: str) -> driver.Site:
        return faulty_site(plain(name), made[name])

    monkeypatch.setattr(service.engine.context, "site", site)
    return made


@pytest.fixture
def protected(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    rig.protect()
    yield rig
    rig.engine.close()


def fence_of(item: Rig | Service) -> Fence | None:
    with item.home.look() as state:
        return state.machines["web"].fence


def failed(site: str) -> AsrError:
    return DriverFailed(operation="a call", site=site, detail="injected")


def test_a_fence_of_the_failover_that_arrives_after_the_undo_is_withdrawn(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failover does not wait for a slow site; the site does what it was asked when the machine runs there again."""
    inventory = type(service.engine.context.site("a").inventory)
    fence, arrives, arrived = inventory.fence, threading.Event(), threading.Event()

    def late(*given: Any) -> None:
        if threading.current_thread().name != "fence":
            raise failed("a")  # of the service
        assert arrives.wait(30)
        fence(*given)
        arrived.set()

    monkeypatch.setattr(failover, "FENCE_PATIENCE", 0.1)
    monkeypatch.setattr(inventory, "fence", late)
    service.engine.wait(service.engine.failover_unplanned("web"), timeout=60)
    service.engine.wait(service.engine.failover_undo("web"), timeout=60)
    assert service.machine.value.power is PowerState.RUNNING
    arrives.set()
    assert arrived.wait(30)
    service.until(lambda: service.machine.value.power is PowerState.RUNNING and fence_of(service) is None)
    service.engine.wait(service.engine.replicate("web"), timeout=60)
    assert service.machine.value.power is PowerState.RUNNING


def given_back(rig: Rig) -> Fence:
    """Undone while its fence is under way, and the engine that sent it is killed. Returns the fence."""
    inventory = type(rig.engine.context.site("a").inventory)
    sent: list[Fence] = []

    def no_answer(_inventory: object, _machine: str, fence: Fence) -> None:
        sent.append(fence)
        raise SiteUnreachable(site="a", detail="injected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inventory, "fence", no_answer)
        rig.engine.failover_unplanned("web")
    rig.restart()
    rig.engine.failover_undo("web")
    assert rig.power("a") is PowerState.RUNNING
    return sent[-1]


def test_a_fence_of_an_engine_that_was_killed_is_withdrawn(protected: Rig) -> None:
    """Nothing remembers it: the next cycle finds a machine that is off and quarantined."""
    late = given_back(protected)
    protected.engine.context.site("a").inventory.fence("web", late)
    assert protected.power("a") is PowerState.OFF
    protected.engine.replicate("web")
    assert (protected.power("a"), fence_of(protected)) == (PowerState.RUNNING, None)
    assert "arrived after the machine was given back" in protected.engine.vault.events(machine="web")[-1].text
    protected.machine.stop()  # by a person: it stays off
    protected.engine.replicate("web")
    assert protected.power("a") is PowerState.OFF


def test_a_fence_of_a_newer_owner_stays(protected: Rig) -> None:
    """Of a later copy of this vault: it names the same record."""
    sent = given_back(protected)
    newer = Fence(protected.protection.epoch + 5, sent.reason)
    protected.engine.context.site("a").inventory.fence("web", newer)
    with pytest.raises(AsrError, match="no failover of this vault"):
        protected.engine.replicate("web")
    assert protected.power("a") is PowerState.OFF
    assert fence_of(protected) == newer


def test_a_fence_stays_while_the_machine_runs_at_the_target(protected: Rig) -> None:
    """The vault's records do not know of that failover, and its epochs have come as far."""
    point = str(protected.protection.head_point)
    site = protected.engine.context.site("b")
    spec = driver.PromoteSpec(protected.protection.replica_id, point, 9, protected.protection.networks)
    site.target.replica(spec.replica_id).raise_epoch(9)
    site.failover.promote(spec, Watch())
    site.inventory.power_on("web")
    protected.engine.context.site("a").inventory.fence("web", Fence(9, "failed over"))
    protected.engine.vault.update(protected.protection.id, epoch=9)
    with pytest.raises(AsrError):
        protected.engine.replicate("web")
    assert (protected.power("a"), protected.power("b")) == (PowerState.OFF, PowerState.RUNNING)


def stuck(service: Service, faults: dict[str, Faults]) -> None:
    """A planned failover whose start fails, and whose target then does not answer; the source refuses its fence."""
    faults["a"].add("inventory.fence", failed("a"), times=10_000)
    for operation in ("inventory.power_on", "failover.undo", "inventory.machine"):
        faults["b"].add(operation, failed("b"), times=10_000)
    with pytest.raises(DriverFailed):
        service.engine.wait(service.engine.failover_planned("web"), timeout=60)
    protection = service.engine.vault.protection("web")
    assert (protection.state, protection.fence_due) == (State.FAILING_OVER, True)
    assert service.machine.value.power is PowerState.OFF


@pytest.mark.parametrize("ends", [True, False])
def test_undo_after_a_planned_failover_that_got_stuck_and_an_unplanned_one(
    ends: bool, service: Service, faults: dict[str, Faults]
) -> None:
    """The planned one stopped the source; neither could quarantine it. `ends`: the unplanned one does not get stuck."""
    stuck(service, faults)
    if ends:
        faults["b"].clear()
    job = service.engine.failover_unplanned("web")
    if ends:
        service.engine.wait(job, timeout=60)
    else:
        with pytest.raises(DriverFailed):
            service.engine.wait(job, timeout=60)
        with pytest.raises(AsrError):  # refused, and forgets nothing
            service.engine.wait(service.engine.failover_planned("web"), timeout=60)
        faults["b"].clear()
    assert service.engine.vault.protection("web").fence_due
    service.engine.wait(service.engine.failover_undo("web"), timeout=60)
    assert service.machine.value.power is PowerState.RUNNING
    assert not service.engine.vault.protection("web").undo_due


def recorded(rig: Rig, kind: str, result: dict[str, object], state: JobState = JobState.FAILED) -> None:
    job = Job(id=f"j-{kind}", kind=kind, machine="web", created_at=rig.clock())
    rig.engine.vault.add_job(job)
    rig.engine.vault.update_job(job.id, state=state, result=json.dumps(result))


@pytest.mark.parametrize("promotes", [True, False])
def test_an_unplanned_failover_remembers_that_the_source_was_stopped(
    promotes: bool, protected: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planned one was stopped before it made a machine. The unplanned one is taken back, or undone."""
    work = Work(protected.engine.context, "j1", protected.protection.id, Arguments(), Watch())
    for step in failover.PLANNED.steps[:3]:
        step.run(work)
    recorded(protected, "failover-planned", work.facts)
    assert protected.power("a") is PowerState.OFF
    inventory, replaced = (
        type(protected.engine.context.site("b").inventory),
        type(protected.engine.context.site("b").failover),
    )

    def fails(*given: object, **named: object) -> None:
        raise failed("a")

    monkeypatch.setattr(inventory, "fence", fails)
    second = Work(protected.engine.context, "j2", protected.protection.id, Arguments(), Watch())
    with monkeypatch.context() as patch:
        if not promotes:
            patch.setattr(replaced, "promote", fails)
        try:
            for step in failover.UNPLANNED.steps:
                step.run(second)
        except DriverFailed:
            assert not promotes
    recorded(protected, "failover-unplanned", second.facts, JobState.DONE if promotes else JobState.FAILED)
    if promotes:
        protected.engine.failover_undo("web")
    else:
        protected.engine.replicate("web")  # what the source owes is done first, as by the service
    assert protected.power("a") is PowerState.RUNNING
    assert protected.protection.state is State.PROTECTED
    assert not protected.protection.undo_due


def reasons(service: Service) -> list[tuple[str, Level]]:
    (status,) = service.engine.status()
    return [(reason.code, status.health.level) for reason in status.health.reasons]


@pytest.mark.parametrize("verb", ["failover_planned", "failover_unplanned"])
def test_a_source_that_refuses_its_fence_is_critical_and_says_what_to_do(
    verb: str, service: Service, faults: dict[str, Faults]
) -> None:
    """It answers, so it may well run beside the machine at the target until it is stopped by hand."""
    faults["a"].add("inventory.fence", failed("a"), times=10_000)
    service.engine.wait(getattr(service.engine, verb)("web"), timeout=60)
    assert service.engine.vault.protection("web").fence_due
    (status,) = service.engine.status()
    worst = status.health.reasons[0]
    assert (worst.code, status.health.level) == ("fence-refused", Level.CRITICAL)
    assert "may still run" in worst.what
    assert "Stop it at 'a'" in worst.action
    assert "`asr failover undo web`" in worst.action
    service.home.cut()  # it does not become less dangerous when it is lost
    assert reasons(service)[0] == ("fence-refused", Level.CRITICAL)
    service.home.restore()
    faults["a"].clear()
    service.until(lambda: not service.engine.vault.protection("web").fence_due)
    assert "fence-refused" not in [code for code, _ in reasons(service)]
    assert service.engine.vault.protection("web").error is None


def test_a_source_that_refuses_later_is_critical(service: Service, faults: dict[str, Faults]) -> None:
    """It was lost at the failover, and comes back."""
    service.home.cut()
    service.engine.wait(service.engine.failover_unplanned("web"), timeout=60)
    assert ("fence-due", Level.WARNING) in reasons(service)
    faults["a"].add("inventory.fence", failed("a"), times=10_000)
    service.home.restore()
    service.until(lambda: reasons(service)[0] == ("fence-refused", Level.CRITICAL))
    service.engine.wait(service.engine.failover_undo("web"), timeout=60)
    assert service.engine.vault.protection("web").error is None
    assert service.machine.value.power is PowerState.RUNNING
