"""After a kept point the target is asked to put its points in order, with the view no longer open."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from asrcore.errors import TargetFull
from asrcore.model.watch import Watch
from asrcore.testing.memory._target import MemoryReplica
from tests.unit.rig import Rig


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each call of `drop_points` was to drop."""
    calls: list[list[str]] = []
    inner = MemoryReplica.drop_points

    def noted(self: MemoryReplica, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        calls.append(list(point_ids))
        inner(self, point_ids, epoch, watch)

    monkeypatch.setattr(MemoryReplica, "drop_points", noted)
    return calls


def test_only_a_point_that_the_policy_keeps_asks_for_order(tmp_path: Path, told: list[list[str]]) -> None:
    rig = Rig(tmp_path, interval=5.0, point_interval=60.0)
    try:
        rig.protect()
        rig.clock.now += 5
        rig.engine.replicate("web")  # only the latest state
        rig.clock.now += 5
        rig.engine.replicate("web", keep=True)  # somebody waits for it
        assert told == []
        rig.clock.now += 60
        rig.engine.replicate("web")
        assert told == [[]]
    finally:
        rig.engine.close()


def test_its_failure_is_no_failure_of_the_cycle(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def full(*_: object) -> None:
        called.append(1)
        raise TargetFull(where="away", detail="0 bytes are free.")

    monkeypatch.setattr(MemoryReplica, "drop_points", full)
    rig.protect()
    rig.clock.now += 5
    rig.engine.replicate("web")
    assert called
    assert rig.content() == rig.truth()
