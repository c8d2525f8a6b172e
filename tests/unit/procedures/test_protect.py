"""Ending protection, on memory sites."""

from __future__ import annotations

import pytest

from asrcore.errors import MarksLeft
from asrcore.model.machine import PowerState
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
