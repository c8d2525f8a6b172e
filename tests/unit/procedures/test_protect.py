"""Ending protection, on memory sites."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from asrcore.driver import Source
from asrcore.errors import MarksLeft
from asrcore.model.machine import PowerState
from asrcore.model.point import Mark
from tests.unit.rig import Rig, facts


def test_unprotect_leaves_the_machine_and_removes_replica_and_marks(protected: Rig) -> None:
    replica = protected.protection.replica_id
    protected.engine.failover_test("web")
    protected.engine.unprotect("web")
    assert protected.engine.vault.protections() == []
    assert replica not in protected.engine.context.site("b").target.replicas()
    assert protected.machine.marks == []
    assert protected.power("a") is PowerState.RUNNING
    assert [machine.name for machine in protected.engine.machines("b")] == []


def test_protection_of_a_committed_machine_can_be_ended(protected: Rig) -> None:
    protected.engine.failover_planned("web")
    protected.engine.failover_commit("web")
    protected.engine.unprotect("web")
    assert protected.engine.vault.protections() == []
    assert protected.power("b") is PowerState.RUNNING


def test_the_source_learns_the_recorded_marks_before_all_are_released(
    protected: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver may recognise only by a mark what this vault left."""
    source = type(protected.engine.context.site("a").source)
    kept, keep_marks = [], source.keep_marks

    def noted(self: Source, machine_id: str, keep: Sequence[Mark]) -> None:
        kept.append(list(keep))
        keep_marks(self, machine_id, keep)

    monkeypatch.setattr(source, "keep_marks", noted)
    mark = protected.protection.mark
    protected.engine.unprotect("web")
    assert kept == [[mark], []]


def test_what_a_source_does_not_delete_is_reported_with_the_commands(
    protected: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MarksLeft(machine="web", site="a", marks="m1", detail="its image is away", commands="`delete m1`")

    monkeypatch.setattr(type(protected.engine.context.site("a").source), "keep_marks", refuse)
    job = protected.engine.unprotect("web")
    assert "`delete m1`" in str(facts(job)["source"])
    assert any("`delete m1`" in item.text for item in protected.engine.vault.events(machine="web"))
    assert protected.engine.vault.protections() == []
