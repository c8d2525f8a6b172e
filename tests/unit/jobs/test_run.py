"""A job from start to end: its steps, facts, progress and result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from asrcore.errors import Cancelled, JobFailed, NotFound, VerifyFailed
from asrcore.jobs import Jobs, arguments_of
from asrcore.model.event import Outcome
from asrcore.plugins import Plugins
from asrcore.procedures.procedure import Arguments
from asrcore.replication.context import Context
from asrcore.vault import Job, JobState, Vault
from tests.unit.jobs import job_procedures

Until = Callable[[Callable[[], bool]], None]


def start(jobs: Jobs, path: Path, kind: str, machine: str = "web1") -> Job:
    with Vault.open(path) as vault:
        return jobs.submit(kind, vault.protection(machine))


def test_steps_run_in_order_and_facts_become_the_result(path: Path, trace: job_procedures.Trace) -> None:
    with job_procedures.engine(path) as jobs:
        job = jobs.wait(start(jobs, path, "count").id, timeout=20)
    assert trace.lines() == ["web1 count.one", "web1 count.two", "web1 count.three", "web1 count.four"]
    assert (job.state, job.step, json.loads(job.result or "")) == (JobState.DONE, "four", {"steps": 4})
    assert job.error is None
    assert job.created_at <= (job.started_at or 0) <= (job.ended_at or 0)


def test_arguments_reach_the_steps_as_given(path: Path) -> None:
    arguments = Arguments(point="p1", force_off=True, timeout=7.5, network="lan", keep=True)
    with Vault.open(path) as vault:
        job = Jobs(Context(vault, Plugins()), {}).submit("count", vault.protection("web1"), arguments)
        assert arguments_of(vault.job(job.id)) == arguments


def test_an_error_of_the_catalogue_fails_the_job_with_its_own_code(path: Path, trace: job_procedures.Trace) -> None:
    reported = job_procedures.Reported()
    with job_procedures.engine(path, reported.plugin()) as jobs:
        job = start(jobs, path, "verify")
        with pytest.raises(VerifyFailed, match="512 bytes of 'web1' differ") as raised:
            jobs.wait(job.id, timeout=20)
        assert raised.value.attributes == {"machine": "web1", "different": 512}
    with Vault.open(path) as vault:
        ended = vault.job(job.id)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error["code"] == "verify-failed"
    assert json.loads(ended.result or "") == {"different_bytes": 512}, "the facts of a failed step are kept"
    assert trace.lines() == ["web1 verify.compare"], "no step after the failed one"
    (finished,) = reported.finished
    assert (finished.id, finished.work, finished.machine) == (job.id, "verify", "web1")
    assert finished.outcome is Outcome.FAILED
    assert finished.error == ended.error


def test_a_defect_fails_the_job_with_its_traceback(path: Path) -> None:
    with job_procedures.engine(path) as jobs:
        job = start(jobs, path, "defect")
        with pytest.raises(JobFailed, match="ZeroDivisionError: a defect"):
            jobs.wait(job.id, timeout=20)
        healthy = jobs.wait(start(jobs, path, "count").id, timeout=20)
    assert healthy.state is JobState.DONE, "the engine keeps running"
    with Vault.open(path) as vault:
        error = vault.job(job.id).error
    assert error is not None
    assert "in break_down" in str(error["traceback"])


def test_an_unknown_kind_fails(path: Path) -> None:
    with job_procedures.engine(path) as jobs, pytest.raises(JobFailed, match="knows no jobs of kind 'dance'"):
        jobs.wait(start(jobs, path, "dance").id, timeout=20)


def test_a_job_of_a_machine_that_is_gone_fails(path: Path, trace: job_procedures.Trace) -> None:
    job = job_procedures.submit(path, "count")
    with Vault.open(path) as vault:
        vault.remove_protection("m-web1")
    with job_procedures.engine(path) as jobs, pytest.raises(NotFound, match="machine 'web1' is not in the vault"):
        jobs.wait(job.id, timeout=20)
    assert trace.lines() == []


def test_facts_that_are_no_json_are_written_as_text(path: Path) -> None:
    with job_procedures.engine(path) as jobs:
        job = jobs.wait(start(jobs, path, "unwritable").id, timeout=20)
    assert json.loads(job.result or "") == {"path": "/x"}


def test_progress_is_seen_but_written_seldom(path: Path) -> None:
    seen: list[Job] = []
    with job_procedures.engine(path) as jobs:
        job = jobs.wait(start(jobs, path, "copy").id, seen.append, timeout=20)
    assert (job.progress_done, job.progress_total, job.progress_work) == (1000, 1000, "copying")
    done = [job.progress_done for job in seen if job.progress_work == "copying"]
    assert done == sorted(done)
    took = (job.ended_at or 0) - (job.started_at or 0)
    assert 1 <= len(set(done)) <= took * 4 + 3, "about four times a second, not five hundred"
    assert any(0 < value < 1000 for value in done)


# -- cancelling --------------------------------------------------------------------------------------------------------


def test_a_running_job_is_cancelled_by_another_process(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    reported = job_procedures.Reported()
    with job_procedures.engine(path, reported.plugin()) as jobs:
        job = start(jobs, path, "wait")
        until(lambda: "web1 wait.wait" in trace.lines())
        with Vault.open(path) as other:  # as `asr` does, which has only the vault
            assert other.request_cancel(job.id)
        with pytest.raises(Cancelled):
            jobs.wait(job.id, timeout=20)
        assert not jobs.cancel(job.id), "it has ended"
    assert trace.lines() == ["web1 wait.begin", "web1 wait.wait"]
    assert [finished.outcome for finished in reported.finished] == [Outcome.CANCELLED]


def test_a_job_that_waits_for_its_machine_is_cancelled(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    with job_procedures.engine(path) as jobs:
        first, second = start(jobs, path, "wait"), start(jobs, path, "count")
        with Vault.open(path) as vault:
            until(lambda: vault.job(second.id).step == "waiting for wait")
            assert vault.job(second.id).state is JobState.QUEUED
        jobs.cancel(second.id)
        with pytest.raises(Cancelled):
            jobs.wait(second.id, timeout=20)
        trace.let_go("web1")
        jobs.wait(first.id, timeout=20)
    assert not [line for line in trace.lines() if "count" in line]


def test_a_job_cancelled_while_no_engine_ran_never_begins(path: Path, trace: job_procedures.Trace) -> None:
    job = job_procedures.submit(path, "count")
    with Vault.open(path) as vault:
        vault.request_cancel(job.id)
    with job_procedures.engine(path) as jobs, pytest.raises(Cancelled):
        jobs.wait(job.id, timeout=20)
    assert trace.lines() == []
