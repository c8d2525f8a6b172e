"""What cycles release at the source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from asrcore.errors import AsrError, DriverFailed
from asrcore.model.point import Mark
from asrcore.model.watch import Watch
from asrcore.service.scheduler import Scheduler
from asrcore.testing.memory._source import MemorySource
from tests.unit.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.engine.close()


def test_an_empty_list_of_marks_is_sent_only_when_protection_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers end tracking by it, and report what stays (`Source.keep_marks`)."""
    sent: list[list[Mark]] = []
    keep_marks, open_view = MemorySource.keep_marks, MemorySource.open_view

    def recorded(source: MemorySource, machine_id: str, keep: Sequence[Mark]) -> None:
        sent.append(list(keep))
        keep_marks(source, machine_id, keep)

    def fails(*_: object, **__: object) -> None:
        raise DriverFailed(operation="opening a view", site="a", detail="injected")

    monkeypatch.setattr(MemorySource, "keep_marks", recorded)
    monkeypatch.setattr(MemorySource, "open_view", fails)
    with pytest.raises(AsrError):
        rig.protect()
    assert rig.protection.mark is None
    assert rig.protection.attempt == 1
    for _ in range(2):
        with pytest.raises(AsrError):
            rig.engine.replicate("web")
    service = Scheduler(rig.engine.context, lambda kind, protection, arguments: None)
    service._release_left(rig.protection, Watch())
    assert [] not in sent
    monkeypatch.setattr(MemorySource, "open_view", open_view)
    rig.engine.replicate("web")
    assert sent[-1] == [rig.protection.mark]
    assert [] not in sent
    rig.engine.unprotect("web")
    assert sent[-1] == []
    assert rig.machine.marks == []
