"""Undo and commit of a failover, on memory sites."""

from __future__ import annotations

from typing import Any

import pytest

from asrcore.errors import DriverFailed, SiteUnreachable, WrongState
from asrcore.model.health import Level
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.service.due import cycle_at
from asrcore.service.scheduler import Scheduler, _to_fence
from tests.unit.rig import Rig, facts


def test_undo_gives_the_source_back_and_replication_continues(protected: Rig) -> None:
    protected.engine.failover_planned("web")
    protected.away.machine("web").write("vda", 0, b"to be forgotten")
    protected.engine.failover_undo("web")
    assert protected.protection.state is State.PROTECTED
    assert protected.power("a") is PowerState.RUNNING
    protected.machine.write("vda", 0, b"after the undo")
    protected.engine.replicate("web")
    assert protected.content() == protected.truth()


def test_commit_needs_a_failover(protected: Rig) -> None:
    with pytest.raises(WrongState) as caught:
        protected.engine.failover_commit("web")
    assert "fail over" in caught.value.action_text


def _owes(rig: Rig) -> bool:
    return rig.protection.undo_due


def test_undo_does_not_need_the_target(protected: Rig) -> None:
    """The source is given back at once; the target's clean-up is owed, shown, and done when the target is back."""
    protected.engine.failover_unplanned("web")
    protected.away.cut()
    owed = facts(protected.engine.failover_undo("web"))["owed"]
    assert owed == ["target"]
    protection = protected.protection
    assert protection.state is State.PROTECTED
    assert protection.undo_due
    assert protected.power("a") is PowerState.RUNNING
    (status,) = protected.engine.status()
    assert [reason.code for reason in status.health.reasons] == ["no-engine", "undo-due"]
    assert status.health.level is Level.CRITICAL
    assert cycle_at(protection, status.policy, protected.engine.context.clock()) is None, (
        "a replica with a machine takes no cycles"
    )
    scheduler = Scheduler(protected.engine.context, lambda kind, protection, arguments: None)
    scheduler._finish_undo(protection, Watch())
    assert _owes(protected)
    protected.machine.stop()  # by a person: nothing starts it again
    protected.away.restore()
    scheduler._finish_undo(protection, Watch())
    assert not _owes(protected)
    assert not protected.protection.fence_due
    assert protected.power("a") is PowerState.OFF
    assert protected.engine.machines("b") == []
    protected.machine.start()
    protected.engine.replicate("web")
    assert protected.content() == protected.truth()


def test_undo_without_the_source_releases_it_when_it_is_back(protected: Rig) -> None:
    """It was stopped and quarantined; nothing else would ever start it."""
    protected.engine.failover_planned("web")
    protected.home.cut()
    assert facts(protected.engine.failover_undo("web"))["owed"] == ["source"]
    assert _owes(protected)
    protected.home.restore()
    protected.engine.replicate("web")  # completes it, as the service does
    assert not _owes(protected)
    assert protected.power("a") is PowerState.RUNNING


def test_another_point_can_be_chosen_while_the_source_is_lost(protected: Rig) -> None:
    protected.home.cut()
    protected.engine.failover_unplanned("web")
    protected.engine.failover_undo("web")
    protected.engine.failover_unplanned("web")
    assert protected.protection.state is State.FAILED_OVER
    assert protected.protection.fence_due
    assert protected.power("b") is PowerState.RUNNING


def test_undo_leaves_a_source_off_that_it_did_not_stop(protected: Rig) -> None:
    protected.home.cut()
    protected.engine.failover_unplanned("web")
    protected.home.restore()
    protected.machine.stop()
    protected.engine.failover_undo("web")
    assert protected.power("a") is PowerState.OFF


def test_undo_does_not_start_a_source_while_the_target_is_known_to_run(
    protected: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica's directory is gone, the machine runs on, and cannot be stopped."""
    protected.engine.failover_unplanned("web")
    with protected.away.change() as state:
        replicas, state.replicas = state.replicas, {}
    inventory = type(protected.engine.context.site("b").inventory)

    def stuck(*given: object, **named: object) -> None:
        raise DriverFailed(operation="stopping a machine", site="b", detail="it hangs")

    with monkeypatch.context() as patch:
        patch.setattr(inventory, "power_off", stuck)
        with pytest.raises(DriverFailed, match="hangs"):
            protected.engine.failover_undo("web")
    assert protected.power("a") is PowerState.OFF
    (status,) = protected.engine.status()
    assert [reason.code for reason in status.health.reasons] == ["no-engine", "failover-stuck", "driver-failed"]
    protected.engine.failover_undo("web")
    assert (protected.power("a"), protected.power("b")) == (PowerState.RUNNING, PowerState.OFF)
    assert protected.protection.undo_due
    with protected.away.change() as state:
        state.replicas = replicas
    protected.engine.replicate("web")
    assert protected.engine.machines("b") == []


def test_unprotect_completes_an_undo_at_the_target(protected: Rig) -> None:
    protected.engine.failover_unplanned("web")
    protected.away.cut()
    protected.engine.failover_undo("web")
    protected.away.restore()
    protected.engine.unprotect("web")
    assert protected.engine.machines("b") == []
    assert protected.power("a") is PowerState.RUNNING


def test_a_failover_after_an_owed_undo_takes_nothing_either(protected: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source runs again since the undo; that the undo was owed must not fence it."""
    protected.engine.failover_unplanned("web")
    protected.away.cut()
    protected.engine.failover_undo("web")
    protected.away.restore()
    seen: list[object] = []

    def fails(*given: object) -> None:
        seen.append(_to_fence(protected.protection))
        raise DriverFailed(operation="making a machine", site="b", detail="injected")

    monkeypatch.setattr(type(protected.engine.context.site("b").failover), "promote", fails)
    with pytest.raises(DriverFailed):
        protected.engine.failover_unplanned("web")
    assert seen == [None]
    assert protected.protection.state is State.PROTECTED
    assert not _owes(protected)
    assert protected.power("a") is PowerState.RUNNING


def test_a_lost_source_is_released_even_if_the_next_failover_fails(
    protected: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    protected.engine.failover_planned("web")
    protected.home.cut()
    protected.engine.failover_undo("web")

    def fails(*given: object) -> None:
        raise DriverFailed(operation="making a machine", site="b", detail="injected")

    monkeypatch.setattr(type(protected.engine.context.site("b").failover), "promote", fails)
    with pytest.raises(DriverFailed):
        protected.engine.failover_unplanned("web")
    assert protected.protection.state is State.PROTECTED
    assert _owes(protected)
    protected.home.restore()
    protected.engine.replicate("web")
    assert not _owes(protected)
    assert protected.power("a") is PowerState.RUNNING


@pytest.mark.parametrize("lost", [False, True])
def test_undo_of_a_planned_failover_that_owes_its_fence_starts_the_source(
    protected: Rig, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped, though not fenced. Also if the source can be reached only after the undo."""

    def fails(*given: object) -> None:
        raise DriverFailed(operation="fencing a machine", site="a", detail="injected")

    with monkeypatch.context() as patch:
        patch.setattr(type(protected.engine.context.site("a").inventory), "fence", fails)
        protected.engine.failover_planned("web")
    assert protected.protection.fence_due
    if lost:
        protected.home.cut()
    protected.engine.failover_undo("web")
    assert _owes(protected) is lost
    protected.home.restore()
    protected.engine.replicate("web")
    assert protected.power("a") is PowerState.RUNNING
    assert not _owes(protected)


def test_a_source_whose_fence_was_not_confirmed_is_started_after_an_undo_without_it(
    protected: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory = type(protected.engine.context.site("a").inventory)
    fence = inventory.fence

    def no_reply(*given: Any) -> None:
        fence(*given)
        raise SiteUnreachable(site="a", detail="injected")

    with monkeypatch.context() as patch:
        patch.setattr(inventory, "fence", no_reply)
        protected.engine.failover_unplanned("web")
    assert protected.protection.fence_due
    protected.home.cut()
    protected.engine.failover_undo("web")
    protected.home.restore()
    protected.engine.replicate("web")
    assert protected.power("a") is PowerState.RUNNING
    assert not _owes(protected)


def test_unprotect_releases_a_source_that_an_undo_still_owes(protected: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else would ever start it. A site that refuses prevents the end of protection."""
    protected.engine.failover_planned("web")
    protected.home.cut()
    protected.engine.failover_undo("web")
    protected.home.restore()
    assert "is released first" in str(protected.engine.impact("unprotect", "web"))

    def fails(*given: object) -> None:
        raise DriverFailed(operation="releasing a machine", site="a", detail="injected")

    with monkeypatch.context() as patch:
        patch.setattr(type(protected.engine.context.site("a").inventory), "unfence", fails)
        with pytest.raises(DriverFailed, match="injected"):
            protected.engine.unprotect("web")
    assert _owes(protected)
    protected.engine.unprotect("web")
    assert protected.engine.vault.protections() == []
    assert protected.power("a") is PowerState.RUNNING


def test_unprotect_says_that_a_lost_source_is_not_released(protected: Rig) -> None:
    protected.engine.failover_planned("web")
    protected.home.cut()
    protected.engine.failover_undo("web")
    job = protected.engine.unprotect("web")
    assert "web at a may be left stopped and quarantined" in str(facts(job)["source"])
    events = [item.text for item in protected.engine.vault.events(machine="web")]
    assert any("may be left stopped and quarantined" in text for text in events)
    assert protected.engine.vault.protections() == []
