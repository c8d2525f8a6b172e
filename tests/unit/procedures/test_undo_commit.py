"""Undo and commit of a failover, on memory sites."""

from __future__ import annotations

import pytest

from asrcore.errors import WrongState
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from tests.unit.rig import Rig


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
