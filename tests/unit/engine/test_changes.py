"""A policy and a protected machine are changed where they are: no new copy, no recovery point lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from asrcore.errors import InvalidValue, NotFound, NotReady, StillInUse
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Description
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.protection import NetworkMap
from asrcore.service.scheduler import Scheduler
from asrcore.testing.memory._target import MemoryTarget
from asrcore.units import HOUR
from tests.unit.rig import Rig, facts


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """`web` is protected under `gold`, an hour apart; at `b` there are the networks `lan` and `lan-b`."""
    made = Rig(tmp_path, interval=HOUR, point_interval=HOUR)
    made.away.configure(networks={"lan", "lan-b", "lab"})
    made.protect()
    yield made
    made.engine.close()


def due(rig: Rig, seconds: float) -> bool:
    """Whether the service starts a cycle of `web` that many seconds from now, if it looks at the vault now."""
    scheduler = Scheduler(rig.engine.context, lambda *_: None)
    scheduler._look()
    return scheduler._queue.pop(rig.clock.now + seconds, lambda _: True) is not None


def test_a_changed_interval_counts_from_the_next_look_of_the_service(rig: Rig) -> None:
    assert not due(rig, 60)
    before = [point.id for point in rig.engine.points("web")]
    rig.engine.update_policy(attrs.evolve(rig.engine.vault.policy("gold"), interval=30.0))
    assert due(rig, 60)
    assert not due(rig, 10)
    assert [point.id for point in rig.engine.points("web")] == before


def test_a_shorter_retention_deletes_at_the_next_cycle_what_the_plan_said(rig: Rig) -> None:
    for _ in range(3):
        rig.clock.now += HOUR
        rig.engine.replicate("web", keep=True)
    points = [point.id for point in rig.engine.points("web")]
    shorter = attrs.evolve(rig.engine.vault.policy("gold"), keep=HOUR + 60, interval=60.0)
    plan = rig.engine.policy_impact(shorter)
    said = [point.id for point in plan.deletes["web"]]
    assert said
    rig.engine.update_policy(shorter)
    assert [point.id for point in rig.engine.points("web")] == points, "they stay until retention runs"
    rig.engine.replicate("web", keep=True)
    assert [point for point in points if point not in {item.id for item in rig.engine.points("web")}] == said


def test_a_policy_in_use_is_not_removed(rig: Rig) -> None:
    rig.engine.vault.add_policy(Policy("silver", resync_window=ALWAYS))
    for call in (rig.engine.remove_policy, lambda name: rig.engine.impact("policy-remove", name)):
        with pytest.raises(StillInUse) as caught:
            call("gold")
        assert "asr machine set" in caught.value.action_text
    rig.engine.update_machine("web", policy="silver")
    rig.engine.remove_policy("gold")
    assert [policy.name for policy in rig.engine.vault.policies()] == ["silver"]


def test_another_policy_and_other_networks_keep_the_replica(rig: Rig) -> None:
    rig.engine.vault.add_policy(Policy("silver", interval=60.0, resync_window=ALWAYS))
    before, points = rig.protection, rig.engine.points("web")
    changed = rig.engine.update_machine("web", policy="silver", networks={"lan": "lan-b"}, test_network="lab")
    assert (
        changed
        == rig.protection
        == attrs.evolve(before, policy="silver", networks=NetworkMap({"lan": "lan-b"}), test_network="lab")
    )
    assert rig.engine.points("web") == points
    assert facts(rig.engine.replicate("web"))["mode"] == "delta", "no new copy"
    assert due(rig, 120)
    assert rig.engine.update_machine("web", networks={"lan": ""}).networks == NetworkMap()


def test_a_failover_uses_the_changed_networks(rig: Rig) -> None:
    rig.engine.update_machine("web", networks={"lan": "lan-b"})
    rig.engine.failover_planned("web")
    assert [nic.network for nic in rig.away.machine("web").value.nics] == ["lan-b"]


def test_a_network_that_the_target_lacks_is_in_the_plan(rig: Rig) -> None:
    plan = rig.engine.machine_impact("web", networks={"lan": "none"})
    assert "warning [network-missing] the target has no network 'none'" in plan.effects
    assert not any("[" in effect for effect in rig.engine.machine_impact("web", networks={"lan": "lan-b"}).effects)


def test_a_change_that_makes_protection_impossible_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def findings(_: MemoryTarget, description: Description, policy: Policy) -> list[Finding]:
        known = Finding("known", Severity.ERROR, "the machine has had this from the start", "", "")
        unplugged = Finding("unplugged", Severity.ERROR, "no such network", "", "")
        return [known, *([unplugged] if description.machine.nics[0].network == "none" else [])]

    monkeypatch.setattr(MemoryTarget, "findings", findings)
    before = rig.protection
    with pytest.raises(NotReady) as caught:
        rig.engine.update_machine("web", networks={"lan": "none"})
    assert "unplugged" in str(caught.value)
    assert "known" not in str(caught.value)
    assert rig.protection == before
    assert rig.engine.update_machine("web", networks={"lan": "lan-b"}) == rig.protection, "what it had does not matter"


def test_with_the_source_lost_the_mapping_can_still_be_changed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.home.cut()
    rig.engine.update_machine("web", networks={"lan": "lan-b"})
    assert "not checked" in caplog.text
    rig.engine.failover_unplanned("web")
    assert [nic.network for nic in rig.away.machine("web").value.nics] == ["lan-b"]


def test_what_is_not_there_is_refused(rig: Rig) -> None:
    for call in (
        lambda: rig.engine.update_machine("web", policy="none"),
        lambda: rig.engine.machine_impact("web", policy="none"),
        lambda: rig.engine.update_machine("none", policy="gold"),
        lambda: rig.engine.update_policy(Policy("none")),
        lambda: rig.engine.policy_impact(Policy("none")),
        lambda: rig.engine.remove_policy("none"),
        lambda: rig.engine.impact("policy-remove", "none"),
    ):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(InvalidValue):
        rig.engine.impact("replicate", "web")
