"""What a source reports of a machine beside its data: recorded with the machine, shown with its health."""

from __future__ import annotations

import pytest

from asrcore.errors import TrackingLost
from asrcore.model.finding import Finding, Severity
from asrcore.service import status
from tests.unit.rig import Rig

SNAPSHOTS = Finding(
    "machine-has-snapshots", Severity.WARNING, "it has 1 snapshot", "A revert is refused.", "Delete it."
)


def reasons(rig: Rig) -> list[str]:
    (item,) = status.machines(rig.engine.vault, rig.clock.now)
    return [reason.code for reason in item.health.reasons]


def test_a_notice_is_shown_until_a_cycle_no_longer_has_it(rig: Rig) -> None:
    rig.protect()
    assert "machine-has-snapshots" not in reasons(rig)
    rig.machine.configure(findings=(SNAPSHOTS,))
    rig.engine.replicate("web")
    assert rig.engine.vault.protection(rig.protection.id).notices == (SNAPSHOTS,)
    (item,) = status.machines(rig.engine.vault, rig.clock.now)
    assert SNAPSHOTS in item.health.reasons
    rig.machine.configure(findings=())
    rig.engine.replicate("web")
    assert "machine-has-snapshots" not in reasons(rig)


def test_a_notice_is_recorded_also_by_a_cycle_that_loses_tracking(rig: Rig) -> None:
    rig.protect()
    rig.machine.configure(findings=(SNAPSHOTS,))
    rig.machine.lose_tracking()
    with pytest.raises(TrackingLost):
        rig.engine.replicate("web")
    assert "machine-has-snapshots" in reasons(rig)


def test_a_notice_is_not_shown_once_the_machine_runs_elsewhere(rig: Rig) -> None:
    rig.protect()
    rig.machine.configure(findings=(SNAPSHOTS,))
    rig.engine.replicate("web")
    rig.engine.failover_planned("web")
    assert "machine-has-snapshots" not in reasons(rig)
