"""One cycle now."""

from __future__ import annotations

import pytest

from asrcore.errors import WrongState
from asrcore.model.state import Event
from asrcore.model.watch import Watch
from asrcore.procedures.procedure import Arguments, Work
from asrcore.procedures.replicate import REPLICATE
from tests.unit.rig import Rig


def test_a_cycle_that_the_state_forbids_is_no_failure_of_the_machine(protected: Rig) -> None:
    """The job was ordered before tracking was lost. The service would wait with the resync because of it."""
    protected.engine.vault.transition(protected.protection.id, Event.LOSE_TRACKING, resync_reason="lost")
    work = Work(protected.engine.context, "j1", protected.protection.id, Arguments(), Watch())
    with pytest.raises(WrongState):
        REPLICATE.steps[0].run(work)
    assert (protected.protection.attempt, protected.protection.error) == (0, None)
    protected.clock.now += 1000.0
    (status,) = protected.engine.status()
    actions = [reason.action for reason in status.health.reasons if reason.code == "rpo-exceeded"]
    assert "`asr resync web --now`" in actions[0]
    protected.engine.resync("web", now=True)
    assert protected.content() == protected.truth()
