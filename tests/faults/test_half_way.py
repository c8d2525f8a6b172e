"""An undo, commit or unprotect that stopped half-way for a reason that passes is retried by the service."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asrcore.errors import AsrError, DriverFailed, ReplicaDamaged
from asrcore.jobs import requested_by
from asrcore.model.health import Level
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from asrcore.procedures import undo_commit
from asrcore.procedures.procedure import Work
from asrcore.service import scheduler
from asrcore.testing.faults import Faults, faulty_site
from asrcore.vault import Job
from tests.unit.service.test_scheduler import Service

PASSES = DriverFailed(operation="a call", site="b", detail="injected")
REMAINS = ReplicaDamaged(replica="r", detail="injected")
CALLS = ("failover.undo", "inventory.power_off", "failover.commit", "target.delete_replica")
HALF_WAY = {
    "failover_undo": State.UNDOING,
    "failover_commit": State.COMMITTING,
    "unprotect": State.DISABLING,
}


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(scheduler, "TICK", 0.05)
    made = Service(tmp_path)
    made.engine.wait(made.engine.protect("web", source="a", target="b", policy="gold"), timeout=60)
    yield made
    made.close()


@pytest.fixture
def target(service: Service, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Faults of the target."""
    faults, plain = Faults(), service.engine.context.site
    monkeypatch.setattr(
        service.engine.context, "site", lambda name: faulty_site(plain(name), faults) if name == "b" else plain(name)
    )
    return faults


def stop_half_way(service: Service, target: Faults, verb: str, error: AsrError) -> None:
    """It did not work at all before: that cycles failed is of no importance."""
    if verb != "unprotect":
        service.engine.wait(service.engine.failover_unplanned("web"), timeout=60)
    service.engine.vault.update(
        service.engine.vault.protection("web").id, attempt=4, retry_at=time.time() + 480, error=PASSES.as_dict()
    )
    for call in CALLS:
        target.add(call, error, times=10_000)
    with pytest.raises(type(error)):
        service.engine.wait(getattr(service.engine, verb)("web"), timeout=60)
    assert service.state is HALF_WAY[verb]


def jobs(service: Service) -> list[Job]:
    return [job for job in service.engine.vault.jobs() if requested_by(job) == "service"]


@pytest.mark.parametrize("verb", HALF_WAY)
def test_it_is_retried_as_every_other_error_is(verb: str, service: Service, target: Faults) -> None:
    stop_half_way(service, target, verb, PASSES)
    protection = service.engine.vault.protection("web")
    assert (protection.attempt, protection.error and protection.error["code"]) == (1, "driver-failed")
    assert protection.retry_at is not None
    assert 50 < protection.retry_at - time.time() <= 60
    (status,) = service.engine.status()
    assert status.health.level is Level.CRITICAL
    assert any("attempt 2 in" in reason.what for reason in status.health.reasons)
    service.replicate_soon()
    service.until(lambda: service.engine.vault.protection("web").attempt == 2)  # the ladder is climbed
    assert len(jobs(service)) == 1
    target.clear()
    service.replicate_soon()
    if verb == "unprotect":
        service.until(lambda: service.engine.vault.protections() == [])
        return
    service.until(lambda: service.state is not HALF_WAY[verb])
    after = service.engine.vault.protection("web")
    assert (after.attempt, after.retry_at, after.error) == (0, None, None)
    undone = verb == "failover_undo"
    assert after.state is (State.PROTECTED if undone else State.COMMITTED)
    assert (service.machine.value.power is PowerState.RUNNING) is undone


@pytest.mark.parametrize("verb", HALF_WAY)
def test_one_that_does_not_pass_waits_for_a_person(verb: str, service: Service, target: Faults) -> None:
    stop_half_way(service, target, verb, REMAINS)
    protection = service.engine.vault.protection("web")
    assert (protection.attempt, protection.retry_at) == (1, None)
    (status,) = service.engine.status()
    assert status.health.level is Level.CRITICAL
    what = [reason.what for reason in status.health.reasons]
    assert any("stopped half-way" in text for text in what)
    assert any("not retried automatically" in text for text in what)
    time.sleep(0.5)
    assert jobs(service) == []
    target.clear()
    service.engine.wait(getattr(service.engine, verb)("web"), timeout=60)


def test_one_that_was_cancelled_is_not_retried(
    service: Service, target: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that was a retry of the service."""
    stop_half_way(service, target, "failover_commit", PASSES)

    def cancelled(work: Work) -> None:
        service.engine.cancel(service.engine.vault.job(work.job_id))
        while True:
            work.watch.check()
            time.sleep(0.05)

    monkeypatch.setattr(undo_commit, "cleanup_tests", cancelled)
    service.replicate_soon()
    service.until(lambda: bool(jobs(service)) and jobs(service)[0].state.ended)
    assert service.engine.vault.protection("web").retry_at is None
    time.sleep(0.5)
    assert len(jobs(service)) == 1
