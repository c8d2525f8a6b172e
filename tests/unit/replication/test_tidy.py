"""After a kept point the target is called to reorganise its points, with the view already closed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from asrcore.errors import TargetFull
from asrcore.model.watch import Watch
from asrcore.testing.memory._source import MemoryFrozenView
from asrcore.testing.memory._target import MemoryReplica, MemoryWriter
from tests.unit.rig import Rig


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The points that each call of `drop_points` had to delete."""
    calls: list[list[str]] = []
    inner = MemoryReplica.drop_points

    def noted(self: MemoryReplica, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        calls.append(list(point_ids))
        inner(self, point_ids, epoch, watch)

    monkeypatch.setattr(MemoryReplica, "drop_points", noted)
    return calls


def test_only_a_kept_point_asks_for_order(tmp_path: Path, reported: list[list[str]]) -> None:
    rig = Rig(tmp_path, interval=5.0, point_interval=60.0)
    try:
        rig.protect()
        assert reported == [[]]
        rig.clock.now += 5
        rig.engine.replicate("web")  # only the latest state
        assert reported == [[]]
        rig.clock.now += 5
        rig.engine.replicate("web", keep=True)
        assert reported == [[], []]
        rig.clock.now += 60
        rig.engine.replicate("web")
        assert reported == [[], [], []]
    finally:
        rig.engine.close()


def test_a_planned_failover_does_not_wait_for_it(rig: Rig, reported: list[list[str]]) -> None:
    rig.protect()
    before = len(reported)
    rig.engine.failover_planned("web")
    assert len(reported) == before


def test_the_writer_is_closed_last(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """That may take long, so the point is recorded and the source released first."""
    rig.protect()
    order: list[str] = []
    close_view, close_writer = MemoryFrozenView.close, MemoryWriter.close

    def view_closed(self: MemoryFrozenView) -> None:
        order.append("view")
        close_view(self)

    def writer_closed(self: MemoryWriter) -> None:
        order.append(f"writer, {len(rig.engine.vault.points(rig.protection.id))} points recorded")
        close_writer(self)

    monkeypatch.setattr(MemoryFrozenView, "close", view_closed)
    monkeypatch.setattr(MemoryWriter, "close", writer_closed)
    before = len(rig.engine.vault.points(rig.protection.id))
    rig.clock.now += 5
    rig.engine.replicate("web")
    assert order == ["view", f"writer, {before + 1} points recorded"]


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
