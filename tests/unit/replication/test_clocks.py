"""Recorded times are the engine's own, whatever the clocks of other hosts say and wherever its own is set."""

from __future__ import annotations

import pytest

from asrcore.model.policy import Policy
from asrcore.service.due import Action, due_action
from asrcore.testing.memory import MemoryWorld
from asrcore.testing.memory._source import MemoryFrozenView
from tests.unit.rig import Rig


def other_clock(rig: Rig, world: MemoryWorld, ahead: float) -> None:
    world.clock = lambda: rig.clock() + ahead


@pytest.mark.parametrize("ahead", [-600.0, -1.0, 1.0, 600.0, 86400.0])
@pytest.mark.parametrize("host", ["source", "target"])
def test_another_hosts_clock_is_not_recorded(rig: Rig, host: str, ahead: float) -> None:
    rig.protect()
    other_clock(rig, rig.home if host == "source" else rig.away, ahead)
    before = rig.clock.now
    rig.engine.replicate("web")
    protection, point = rig.protection, rig.engine.points("web")[-1]
    (cycle,) = rig.engine.vault.cycles(protection.id, limit=1)
    assert before < cycle.started_at < point.taken_at < point.sealed_at == cycle.sealed_at < rig.clock.now
    assert protection.last_cycle_at == cycle.started_at
    policy = rig.engine.vault.policy("gold")
    assert due_action(protection, policy, cycle.started_at + policy.interval - 0.01) is Action.NOTHING
    assert due_action(protection, policy, cycle.started_at + policy.interval) is Action.CYCLE
    replica = rig.engine.context.site("b").target.replica(protection.replica_id)
    assert replica.info().points[-1].taken_at == point.taken_at, "the target records what the engine gives"


@pytest.mark.parametrize("ahead", [-600.0, 600.0])
def test_an_interrupted_copy_is_resumed_whatever_the_sources_clock_says(
    rig: Rig, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.protect()
    other_clock(rig, rig.home, ahead)
    rig.machine.write("vda", 0, b"a" * 65536)
    began = rig.clock.now
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFrozenView, "close", lambda view: None)  # a killed process closes nothing
        with rig.killed_at("target.flushed", monkeypatch) as reached:
            rig.engine.replicate("web")
    assert reached
    interrupted = rig.clock.now
    rig.machine.write("vda", 0, b"b" * 65536)  # after the instant of the view, which is still frozen
    rig.clock.now += 100
    rig.engine.replicate("web")
    point = rig.engine.points("web")[-1]
    assert began < point.taken_at < interrupted, "the instant is that of the first opening"
    (cycle,) = rig.engine.vault.cycles(rig.protection.id, limit=1)
    assert cycle.bytes_sent == 0, "what was copied before is not sent again"


def test_a_clock_that_is_set_during_a_cycle_moves_its_instants(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.protect()
    ahead = 3600.0
    rig.engine.context.elapsed = rig.clock
    rig.engine.context.clock = lambda: rig.clock() + ahead
    opened = type(rig.engine.context.site("a").source).open_view

    def set_back(*given: object, **named: object) -> object:
        nonlocal ahead
        view = opened(*given, **named)  # type: ignore[arg-type]
        ahead = 0.0
        return view

    monkeypatch.setattr(type(rig.engine.context.site("a").source), "open_view", set_back)
    before = rig.clock.now
    rig.engine.replicate("web")
    point, last = rig.engine.points("web")[-1], rig.protection.last_cycle_at
    assert last is not None
    assert before < last < point.taken_at < point.sealed_at < rig.clock.now


def test_one_point_more_is_kept_after_a_clock_was_set_back_not_all(rig: Rig) -> None:
    rig.engine.vault.update_policy(Policy("gold", interval=5.0, point_interval=300.0))
    rig.protect()
    rig.clock.now += 7200
    rig.engine.replicate("web")
    rig.clock.now -= 7200
    for _ in range(10):
        rig.clock.now += 5
        rig.engine.replicate("web")
    assert [point.kept for point in rig.engine.points("web")] == [True, True, True, False]
