"""The old machine is quarantined, or the quarantine is known to be owed, whatever its site answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asrcore import driver
from asrcore.driver import Fence
from asrcore.model.machine import PowerState
from asrcore.model.watch import Watch
from asrcore.procedures.failover import UNPLANNED
from asrcore.procedures.procedure import Arguments, Work
from asrcore.service.scheduler import Scheduler
from asrcore.testing.faults import Faults, faulty_site
from tests.unit.rig import Killed, Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    made.protect()
    yield made
    made.engine.close()


@pytest.fixture
def service(rig: Rig) -> Scheduler:
    return Scheduler(rig.engine.context, lambda kind, protection, arguments: None)


def inventory(rig: Rig) -> driver.Inventory:
    return rig.engine.context.site("a").inventory


def has_a_defect(_inventory: object, *_: object) -> None:
    raise KeyError("vendor")


def sees_nothing(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    """Site `a` fails when it is asked about a machine, by a defect of its driver."""
    faults, plain = Faults(), rig.engine.context.site
    faults.add("inventory.machine", KeyError("power"), times=10_000)

    def site(name: str) -> driver.Site:
        return faulty_site(plain(name), faults) if name == "a" else plain(name)

    patch.setattr(rig.engine.context, "site", site)


def fails(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(inventory(rig)), "fence", has_a_defect)


@pytest.mark.parametrize("verb", ["failover_planned", "failover_unplanned"])
def test_a_defect_of_a_driver_leaves_the_quarantine_owed(
    verb: str, rig: Rig, service: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fails(rig, patch)
        getattr(rig.engine, verb)("web")
        assert rig.power("b") is PowerState.RUNNING
        assert rig.protection.fence_due
        assert (rig.protection.error or {})["code"] == "fence-refused"
        rig.engine.vault.update(rig.protection.id, error=None)
        service._fence(rig.protection, Watch())
        assert (rig.protection.error or {})["code"] == "fence-refused"
    service._fence(rig.protection, Watch())
    assert (rig.power("a"), rig.protection.fence_due, rig.protection.error) == (PowerState.OFF, False, None)


def test_a_failed_look_at_the_machine_does_not_prevent_its_quarantine(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sees_nothing(rig, monkeypatch)
    rig.engine.failover_unplanned("web")
    assert (rig.power("a"), rig.protection.fence_due) == (PowerState.OFF, False)


def test_a_failed_look_of_the_service_does_not_prevent_the_quarantine(
    rig: Rig, service: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fails(rig, patch)
        rig.engine.failover_unplanned("web")
    sees_nothing(rig, monkeypatch)
    service._fence(rig.protection, Watch())
    assert (rig.power("a"), rig.protection.fence_due) == (PowerState.OFF, False)


def test_a_machine_that_an_earlier_attempt_stopped_is_started_when_a_late_quarantine_is_withdrawn(
    rig: Rig, service: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt did it, and its reply was lost. The second one arrives after the undo."""
    work = Work(rig.engine.context, "j1", rig.protection.id, Arguments(), Watch())
    steps = {step.name: step.run for step in UNPLANNED.steps}
    for name in ("begin", "take-replica", "promote"):
        steps[name](work)
    kind = type(inventory(rig))
    fence = kind.fence

    def is_killed(asked: driver.Inventory, machine: str, sent: Fence) -> None:
        fence(asked, machine, sent)
        raise Killed

    def late(asked: driver.Inventory, machine: str, sent: Fence) -> None:
        rig.engine.failover_undo("web")
        assert rig.power("a") is PowerState.RUNNING
        fence(asked, machine, sent)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "fence", is_killed)
        patch.setattr("threading.excepthook", lambda _: None)
        steps["fence-source"](work)
    assert rig.power("a") is PowerState.OFF
    with monkeypatch.context() as patch:
        patch.setattr(kind, "fence", late)
        steps["fence-source"](work)
    assert rig.power("a") is PowerState.OFF
    service._release_late(rig.protection, Watch())
    assert (rig.power("a"), inventory(rig).fenced("web")) == (PowerState.RUNNING, None)
