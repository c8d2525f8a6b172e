"""A vault that is known to be behind, while the target no longer answers or has nothing left to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asrcore.driver import Capability
from asrcore.errors import SiteUnreachable
from asrcore.model.health import Level
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.service.scheduler import Scheduler
from tests.faults.test_vault_behind import OFF, RUNNING, failed_back, go_on, refused, serve_fence
from tests.unit.rig import Rig, facts

pytestmark = pytest.mark.once


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    made.machine.write("vda", 0, b"in the copy")
    made.protect()
    yield made
    made.engine.close()


def refused_after_an_undo(rig: Rig) -> None:
    """The vault shows a failover that was undone since, and its quarantine of the source is refused."""
    rig.engine.failover_unplanned("web")
    copy = rig.backup()
    rig.engine.failover_undo("web")
    go_on(rig)
    rig.put_back(copy, directory=True)
    serve_fence(rig)


def test_a_refused_fence_stays_refused_when_the_target_no_longer_answers(rig: Rig) -> None:
    refused_after_an_undo(rig)
    rig.away.cut()
    for _ in range(2):
        serve_fence(rig)
        assert rig.power("a") is RUNNING
        assert (rig.protection.error or {})["code"] == "vault-behind"
    assert rig.engine.status()[0].health.level is Level.CRITICAL


def test_a_refused_fence_after_a_failback_stays_refused(rig: Rig) -> None:
    rig.engine.failover_unplanned("web")
    rig.engine.failover_commit("web")
    copy = rig.backup()
    rig.engine.reprotect("web")
    failed_back(rig)
    rig.put_back(copy, directory=True)
    serve_fence(rig)
    rig.away.cut()
    serve_fence(rig)
    assert rig.power("a") is RUNNING
    assert (rig.protection.error or {})["code"] == "vault-behind"


def test_a_target_that_does_not_answer_settles_nothing(rig: Rig) -> None:
    """Another error took the place of the refusal meanwhile."""
    refused_after_an_undo(rig)
    rig.engine.vault.update(rig.protection.id, error=SiteUnreachable(site="b", detail="down").as_dict())
    rig.away.cut()
    serve_fence(rig)
    assert rig.power("a") is RUNNING


def test_a_refused_undo_stays_refused_when_the_target_no_longer_answers(rig: Rig) -> None:
    rig.engine.failover_unplanned("web")
    copy = rig.backup()
    rig.engine.failover_undo("web")
    go_on(rig)
    rig.engine.failover_unplanned("web")
    rig.put_back(copy, directory=True)
    refused(rig, lambda: rig.engine.failover_undo("web"))
    rig.away.cut()
    with pytest.raises(SiteUnreachable):
        rig.engine.failover_undo("web")
    rig.away.restore()
    assert (rig.power("a"), rig.power("b")) == (OFF, RUNNING)
    assert rig.protection.state is State.FAILED_OVER


def test_an_undo_whose_target_agreed_is_completed_without_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.engine.failover_unplanned("web")
    rig.engine.vault.update(rig.protection.id, restored=True)
    with rig.killed_at("undo.begun", monkeypatch) as reached:
        rig.engine.failover_undo("web")
    assert reached
    assert not rig.protection.restored


def test_an_unprotect_starts_no_source_while_the_vault_is_known_to_be_behind(rig: Rig) -> None:
    rig.engine.failover_unplanned("web")
    rig.home.cut()
    rig.engine.failover_undo("web")
    assert rig.protection.undo_due
    copy = rig.backup()
    rig.home.restore()
    rig.engine.replicate("web")
    rig.engine.failover_unplanned("web")
    rig.put_back(copy, directory=True)
    Scheduler(rig.engine.context, lambda kind, protection, arguments: None)._finish_undo(rig.protection, Watch())
    rig.away.cut()
    done = facts(rig.engine.unprotect("web"))
    assert "earlier copy" in str(done["source"])
    rig.away.restore()
    assert (rig.power("a"), rig.power("b")) == (OFF, RUNNING)


# -- committed, and nothing is left to compare with ------------------------------------------------------------------


def committed_and_put_back(rig: Rig) -> None:
    rig.home.cut()
    rig.engine.failover_unplanned("web")
    rig.engine.failover_commit("web")
    rig.engine.vault.update(rig.protection.id, restored=True)


def test_a_committed_machine_that_is_gone_waits_for_a_person(rig: Rig) -> None:
    """The source may be the last machine that there is: it was failed back since, or protected from there."""
    committed_and_put_back(rig)
    with rig.away.change() as state:
        state.machines = {}
    rig.home.restore()
    serve_fence(rig)
    assert rig.power("a") is RUNNING
    (status,) = rig.engine.status()
    assert status.health.level is Level.CRITICAL
    (reason,) = [item for item in status.health.reasons if item.code == "vault-behind"]
    assert "asr unprotect web" in reason.action
    rig.engine.unprotect("web")
    assert rig.power("a") is RUNNING


def test_a_target_without_quarantines_leaves_a_committed_machine_to_a_person(rig: Rig) -> None:
    committed_and_put_back(rig)
    rig.home.restore()
    with rig.away.change() as state:
        capabilities = state.capabilities
        state.capabilities = capabilities - {Capability.FENCE}
    serve_fence(rig)
    assert rig.power("a") is RUNNING
    (reason,) = [item for item in rig.engine.status()[0].health.reasons if item.code == "vault-behind"]
    assert "asr unprotect web" in reason.action
    with rig.away.change() as state:
        state.capabilities = capabilities
    serve_fence(rig)
    assert rig.power("a") is OFF
    assert rig.protection.error is None


@pytest.mark.parametrize(
    "place", ["vault.adopt.points", "vault.adopt.written", "vault.adopt.committed", "adopt.recorded"]
)
def test_an_adoption_that_is_killed_is_repeated(rig: Rig, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = rig.backup()
    go_on(rig)
    rig.engine.failover_unplanned("web")
    rig.put_back(copy)
    with rig.killed_at(place, monkeypatch) as reached:
        rig.engine.adopt("web")
    assert reached
    rig.engine.adopt("web")
    assert rig.protection.state is State.FAILED_OVER
    replica = rig.engine.context.site("b").target.replica(rig.protection.replica_id).info()
    assert {point.id for point in rig.engine.points("web")} == {point.id for point in replica.points}
    assert (rig.power("a"), rig.power("b")) == (OFF, RUNNING)
