"""Ending protection, on memory sites."""

from __future__ import annotations

from asrcore.model.machine import PowerState
from tests.unit.rig import Rig


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
