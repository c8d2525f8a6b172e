"""What a command would do is said from the vault's records alone."""

from __future__ import annotations

import attrs
import pytest

from asrcore.errors import PointNotFound
from asrcore.model.point import Consistency, RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import NetworkMap, Protection
from asrcore.model.state import State
from asrcore.procedures import impact
from asrcore.units import DAY, HOUR

NOW = 1_800_000_000.0
WEB = Protection("m1", "web1", "gold", "alpha", "alpha", "vm1", "beta", "r1", state=State.PROTECTED)


def points(*ages: float) -> list[RecoveryPoint]:
    return [
        RecoveryPoint(f"p{age:g}", NOW - age, NOW - age, Consistency.CRASH, kept=True, bytes_sent=1000) for age in ages
    ]


def test_an_unplanned_failover_names_the_point_and_what_is_lost() -> None:
    plan = impact.of_unplanned(WEB, points(300, 200, 100), "p300", NOW)
    assert (plan.source, plan.target, plan.age) == ("alpha", "beta", 300)
    assert [point.id for point in plan.newer] == ["p200", "p100"]
    assert "2 newer recovery points hold 2.0 KiB of it" in str(plan)
    assert plan.document()["newer_bytes"] == 2000
    latest = impact.of_unplanned(WEB, points(300, 200, 100), "latest", NOW)
    assert (latest.newer, latest.age) == ((), 100)
    with pytest.raises(PointNotFound):
        impact.of_unplanned(WEB, [], "latest", NOW)


def test_the_age_of_a_point_from_the_future_is_not_known() -> None:
    plan = impact.of_unplanned(WEB, points(-60), "latest", NOW)
    assert plan.age is None
    assert plan.document()["age_seconds"] is None
    assert "its time is in the future" in str(plan)


def test_an_undo_is_harmful_only_where_a_machine_is_deleted() -> None:
    failed = attrs.evolve(WEB, state=State.FAILED_OVER, target_machine="vm2")
    plan = impact.of_undo(failed, NOW - HOUR, NOW)
    assert plan.harmful
    assert "web1 at beta is deleted with everything that it wrote since the failover (1h 00m ago)." in plan.effects
    assert not impact.of_undo(attrs.evolve(failed, target_machine=None), None, NOW).harmful


def test_a_shorter_retention_names_the_points_that_it_deletes() -> None:
    old, new = Policy("gold", interval=60.0, keep=DAY), Policy("gold", interval=60.0, keep=HOUR)
    kept = points(5000, 4000, 100)
    plan = impact.of_policy_change(old, new, [(WEB, kept), (attrs.evolve(WEB, name="db1"), points(50))], NOW)
    assert plan.harmful
    assert {name: [point.id for point in found] for name, found in plan.deletes.items()} == {"web1": ["p5000", "p4000"]}
    assert "keep: 24h 00m -> 1h 00m" in plan.effects
    assert "It applies to web1, db1." in plan.effects
    longer = impact.of_policy_change(new, old, [(WEB, kept)], NOW)
    assert not longer.harmful
    assert longer.deletes == {}


def test_a_change_of_a_machine_says_from_what_to_what() -> None:
    gold, silver = Policy("gold", interval=60.0), Policy("silver", interval=60.0, keep=HOUR)
    new = attrs.evolve(WEB, policy="silver", networks=NetworkMap({"lan": "lan-b"}), test_network="lab")
    plan = impact.of_machine_change(WEB, new, (gold, silver), points(5000, 100), ["a finding"], NOW)
    assert plan.effects[:4] == (
        "policy: gold -> silver",
        "networks: by name -> lan=lan-b",
        "test network: isolated -> lab",
        "a finding",
    )
    assert [point.id for point in plan.deletes["web1"]] == ["p5000"]
    assert impact.of_machine_change(WEB, WEB, (gold, gold), points(5000), [], NOW).effects == ("Nothing changes.",)
