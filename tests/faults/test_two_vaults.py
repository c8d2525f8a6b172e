"""Two vaults may protect one machine: neither takes the other's quarantine for its own, whatever their epochs are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asrcore import driver
from asrcore.driver import Fence
from asrcore.errors import AsrError, SiteUnreachable
from asrcore.model.finding import Severity
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.service.scheduler import Scheduler
from tests.unit.rig import Rig

ANOTHERS = Fence(1, "failed over to c [record m0123456789ab]")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    made.protect()
    yield made
    made.engine.close()


def inventory(rig: Rig) -> driver.Inventory:
    return rig.engine.context.site("a").inventory


def error(rig: Rig) -> object:
    return (rig.protection.error or {}).get("code")


def lost_fence(rig: Rig) -> Fence:
    """Fail over without a quarantine at the source; returns the one that was sent."""
    sent: list[Fence] = []

    def no_answer(_inventory: object, _machine: str, fence: Fence) -> None:
        sent.append(fence)
        raise SiteUnreachable(site="a", detail="injected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(inventory(rig)), "fence", no_answer)
        rig.engine.failover_unplanned("web")
    return sent[-1]


@pytest.mark.parametrize("reason", [ANOTHERS.reason, "failed over to c"])
def test_replication_does_not_start_a_machine_that_another_vault_has_failed_over(rig: Rig, reason: str) -> None:
    """Its epoch is not later than this vault's. Nor is it started where the quarantine does not say whose it is."""
    fence = Fence(1, reason)
    inventory(rig).fence("web", fence)
    for _ in range(2):
        with pytest.raises(AsrError, match="no failover of this vault"):
            rig.engine.replicate("web")
    assert (rig.power("a"), inventory(rig).fenced("web")) == (PowerState.OFF, fence)
    (status,) = rig.engine.status()
    actions = {reason.code: reason.action for reason in status.health.reasons if reason.severity is Severity.ERROR}
    assert "asr unprotect web" in actions["quarantined-by-another"]
    assert [item.kind for item in rig.engine.vault.events(machine="web")].count("quarantine") == 1
    inventory(rig).unfence("web", 1)  # the other vault undoes it
    inventory(rig).power_on("web")
    rig.engine.replicate("web")
    assert rig.protection.error is None


def test_an_undo_does_not_start_a_machine_that_another_vault_has_failed_over(rig: Rig) -> None:
    rig.engine.failover_planned("web")
    inventory(rig).unfence("web", rig.protection.epoch)
    inventory(rig).fence("web", ANOTHERS)
    rig.engine.failover_undo("web")
    assert (rig.power("a"), inventory(rig).fenced("web")) == (PowerState.OFF, ANOTHERS)
    assert rig.protection.undo_due
    inventory(rig).unfence("web", 1)
    rig.engine.replicate("web")
    assert (rig.power("a"), rig.protection.undo_due) == (PowerState.RUNNING, False)


def test_an_undo_of_a_failover_that_did_not_stop_the_machine_leaves_it_off(rig: Rig) -> None:
    lost_fence(rig)
    inventory(rig).fence("web", ANOTHERS)
    rig.engine.failover_undo("web")
    assert (rig.power("a"), inventory(rig).fenced("web")) == (PowerState.OFF, ANOTHERS)
    assert not rig.protection.undo_due


def test_a_quarantine_does_not_replace_another_vaults(rig: Rig) -> None:
    """With it, the record would be gone that the other vault has stopped the machine: an undo would start it."""
    inventory(rig).fence("web", ANOTHERS)
    rig.engine.failover_unplanned("web")
    scheduler = Scheduler(rig.engine.context, lambda kind, protection, arguments: None)
    scheduler._fence(rig.protection, Watch())
    assert inventory(rig).fenced("web") == ANOTHERS
    assert rig.engine.context.fencing == {}
    assert (rig.protection.fence_due, error(rig)) == (True, "quarantined-by-another")
    rig.engine.failover_commit("web")
    with pytest.raises(AsrError, match="no failover of this vault"):
        rig.engine.reprotect("web")
    assert rig.protection.state is State.COMMITTED
    assert inventory(rig).fenced("web") == ANOTHERS
    inventory(rig).unfence("web", 1)
    inventory(rig).power_on("web")
    scheduler._fence(rig.protection, Watch())
    assert rig.power("a") is PowerState.OFF
    assert (rig.protection.fence_due, error(rig)) == (False, None)


def test_another_vaults_quarantine_does_not_block_the_end_of_protection(rig: Rig) -> None:
    rig.engine.failover_planned("web")
    inventory(rig).unfence("web", rig.protection.epoch)
    inventory(rig).fence("web", ANOTHERS)
    rig.engine.failover_undo("web")
    rig.engine.unprotect("web")
    assert rig.engine.status() == []
    assert inventory(rig).fenced("web") == ANOTHERS


def test_a_late_quarantine_is_withdrawn_also_by_a_vault_that_was_put_back(rig: Rig) -> None:
    """The copy is from before the failover: it does not know that one, but the machine's record is the same."""
    copy = rig.backup()
    sent = lost_fence(rig)
    rig.engine.failover_undo("web")
    rig.put_back(copy)
    inventory(rig).fence("web", sent)
    rig.engine.adopt("web")
    rig.engine.resync("web", now=True)
    rig.engine.replicate("web")
    assert (rig.power("a"), inventory(rig).fenced("web")) == (PowerState.RUNNING, None)
