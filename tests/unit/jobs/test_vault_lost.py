"""A vault that does not answer for a while is like a kill: no job fails of it, none keeps its machine for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from dbos import DBOS

from asrcore.errors import VaultUnavailable
from asrcore.jobs import _run, enqueue
from asrcore.jobs._failure import Failure
from asrcore.procedures.procedure import Arguments, Procedure, Step, Work
from asrcore.vault import JobState, Vault
from tests.unit.jobs import job_procedures
from tests.unit.jobs.test_run import start

Until = Callable[[Callable[[], bool]], None]

COUNT = [f"web1 count.{step}" for step in ("one", "two", "three", "four")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "_RETRY", 0.02)


class Away:
    """The vault's answers to one method: `times` failures first."""

    def __init__(self, times: int, error: Callable[[], Exception]) -> None:
        self.left, self.error, self.asked = times, error, 0

    def around(self, method: Callable[..., Any], which: Callable[..., bool]) -> Callable[..., Any]:
        def answer(vault: Vault, *arguments: Any, **named: Any) -> Any:
            if which(*arguments, **named):
                self.asked += 1
                if self.left > 0:
                    self.left -= 1
                    raise self.error()
            return method(vault, *arguments, **named)

        return answer


def unavailable() -> Exception:
    return VaultUnavailable(url="postgresql://db/asr", detail="the server closed the connection")


def test_a_step_is_run_again_when_the_vault_is_back(
    path: Path, trace: job_procedures.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the step has commanded something already, as a failover that has stopped its source."""
    away = Away(3, unavailable)
    monkeypatch.setattr(Vault, "add_event", away.around(Vault.add_event, lambda **_: True))
    made = job_procedures.procedures(trace)

    def note(work: Work) -> None:
        trace.add("web1 note")
        work.note("test", "done")

    made["count"] = Procedure("count", (Step("note", note), *made["count"].steps))
    monkeypatch.setattr(job_procedures, "procedures", lambda _: made)
    with job_procedures.engine(path) as jobs:
        assert jobs.wait(start(jobs, path, "count").id, timeout=20).state is JobState.DONE
    assert trace.lines() == ["web1 note"] * 4 + COUNT
    assert away.asked == 4


@pytest.mark.parametrize("what", ["state", "result", "ended_at"])
def test_a_job_goes_on_wherever_the_vault_was_away(
    what: str, path: Path, trace: job_procedures.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(3, unavailable)
    monkeypatch.setattr(Vault, "update_job", away.around(Vault.update_job, lambda _, **changes: what in changes))
    with job_procedures.engine(path) as jobs:
        assert jobs.wait(start(jobs, path, "count").id, timeout=20).state is JobState.DONE
    assert away.left == 0
    assert trace.lines() == COUNT


def test_an_end_that_cannot_be_recorded_for_any_reason_is_recorded_later(
    path: Path, trace: job_procedures.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(3, lambda: sqlalchemy.exc.InternalError("UPDATE jobs", {}, Exception("cannot be translated")))
    monkeypatch.setattr(Vault, "update_job", away.around(Vault.update_job, lambda _, **changes: "ended_at" in changes))
    with job_procedures.engine(path) as jobs:
        assert jobs.wait(start(jobs, path, "count").id, timeout=20).state is JobState.DONE
        assert jobs.wait(start(jobs, path, "count").id, timeout=20).state is JobState.DONE
    assert trace.lines() == COUNT * 2


def test_a_vault_that_is_away_when_a_job_is_taken_up_does_not_fail_it(
    path: Path, trace: job_procedures.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with job_procedures.engine(path) as jobs:
        job = start(jobs, path, "wait")
        jobs._pause(0.3)
        away = Away(3, unavailable)
        monkeypatch.setattr(Vault, "protection", away.around(Vault.protection, lambda _: True))
        with Vault.open(path) as vault:
            web2 = next(item for item in vault.protections() if item.name == "web2")
            second = enqueue(vault, "count", web2, Arguments(), now=1000.0)
        assert jobs.wait(second.id, timeout=20).state is JobState.DONE
        trace.let_go("web1")
        assert jobs.wait(job.id, timeout=20).state is JobState.DONE
    assert away.left == 0


def test_a_job_that_could_not_be_taken_up_leaves_its_places_in_line(
    path: Path, trace: job_procedures.Trace, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it waits for itself at the next attempt, and its machine is not replicated any more."""
    away = Away(1, unavailable)
    with job_procedures.engine(path) as jobs:
        monkeypatch.setattr(Vault, "cancel_requested", away.around(Vault.cancel_requested, lambda _: True))
        job = start(jobs, path, "count")
        assert jobs.wait(job.id, timeout=5).state is JobState.DONE
        assert away.left == 0
        until(lambda: jobs._context.locks.busy("m-web1") is None)
    assert trace.lines() == COUNT


def test_a_job_that_began_although_the_log_did_not_confirm_it_keeps_its_places_in_line(
    path: Path, trace: job_procedures.Trace, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    with job_procedures.engine(path) as jobs:
        assert jobs._durable is not None
        begin, refused = jobs._durable.begin, list[str]()

        def unconfirmed(job_id: str) -> None:
            begin(job_id)
            if not refused:
                until(lambda: jobs._runs[job_id].active)
                refused.append(job_id)
                raise unavailable()

        monkeypatch.setattr(jobs._durable, "begin", unconfirmed)
        job = start(jobs, path, "wait")
        until(lambda: bool(trace.lines()) and bool(refused))
        jobs._wake.set()
        second = start(jobs, path, "count")
        until(lambda: second.id in jobs._runs)
        assert jobs._context.locks.busy("m-web1") == "wait"
        trace.let_go("web1")
        assert jobs.wait(job.id, timeout=5).state is JobState.DONE
        assert jobs.wait(second.id, timeout=5).state is JobState.DONE
    assert trace.lines() == ["web1 wait.begin", "web1 wait.wait", "web1 wait.end", *COUNT]


def test_a_step_that_the_log_does_not_take_is_run_again(
    path: Path, trace: job_procedures.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The durable log answers with an error that DBOS does not wait for, as a read-only database does."""
    run_step, left = DBOS.run_step, [1]

    def refuse(options: Any, work: Callable[[], Failure | None]) -> Failure | None:
        done = run_step(options, work)
        if options["name"] == "two" and left:
            raise sqlalchemy.exc.InternalError(f"INSERT {left.pop()}", {}, Exception("a read-only transaction"))
        return done

    monkeypatch.setattr(DBOS, "run_step", refuse)
    with job_procedures.engine(path) as jobs:
        job = start(jobs, path, "count")
        assert jobs.wait(job.id, timeout=20).state is JobState.DONE
        assert jobs.wait(start(jobs, path, "count").id, timeout=20).state is JobState.DONE, "it keeps no machine"
    assert trace.lines() == COUNT * 2


def test_a_job_whose_workflow_ended_elsewhere_is_started_again(
    path: Path, trace: job_procedures.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep its place in its machine's line for ever, and so stop the machine's replication."""
    monkeypatch.setattr("asrcore.jobs._jobs._BEGINS", 0.3)
    with job_procedures.engine(path) as jobs:
        assert jobs._durable is not None
        begin, first = jobs._durable.begin, [True]
        # The first time its workflow is taken by another process, which knows of no such job.
        monkeypatch.setattr(jobs._durable, "begin", lambda job_id: None if first and first.pop() else begin(job_id))
        job = start(jobs, path, "count")
        assert jobs.wait(job.id, timeout=20).state is JobState.DONE
    assert trace.lines() == COUNT


def test_an_engine_that_ends_meanwhile_leaves_the_job_as_a_kill_would(
    path: Path, trace: job_procedures.Trace, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(10**6, unavailable)
    with monkeypatch.context() as patch:
        patch.setattr(Vault, "update_job", away.around(Vault.update_job, lambda _, **changes: "ended_at" in changes))
        with job_procedures.engine(path) as jobs:
            job = start(jobs, path, "count")
            until(lambda: away.asked > 2)
    with Vault.open(path) as vault:
        assert vault.job(job.id).state is JobState.RUNNING
    with job_procedures.engine(path) as jobs:
        assert jobs.wait(job.id, timeout=20).state is JobState.DONE
    assert trace.lines() == COUNT, "no step is repeated"
