"""Engines that stop, are killed and restart: nothing is lost, and nothing logged as done is done again."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asrcore.errors import EngineStopped, JobFailed, TimedOut, VaultUnavailable
from asrcore.jobs import Jobs, _record, follow
from asrcore.plugins import Plugins
from asrcore.procedures.procedure import Procedure
from asrcore.replication.context import Context
from asrcore.vault import JobState, Vault
from tests.unit.jobs import job_procedures
from tests.unit.jobs.test_run import start

Until = Callable[[Callable[[], bool]], None]

ROOT = Path(__file__).parents[3]
COUNT = [f"web1 count.{step}" for step in ("one", "two", "three", "four")]


@contextmanager
def process(path: Path, *arguments: str, crash_at: str = "") -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONPATH": str(ROOT)}
    if crash_at:
        environment["ASRCORE_CRASH_AT"] = crash_at
    command = [sys.executable, "-m", "tests.unit.jobs.job_procedures", str(path), *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def killed(path: Path, crash_at: str) -> None:
    with process(path, "run", crash_at=crash_at) as child:
        assert child.wait(timeout=30) == -signal.SIGKILL


def log_of(path: Path) -> dict[str, str]:
    connection = sqlite3.connect(f"{path}.jobs")
    try:
        return dict(connection.execute("SELECT workflow_uuid, status FROM workflow_status").fetchall())
    finally:
        connection.close()


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "ran", "facts"),
    [
        pytest.param("jobs.taken", COUNT, 4, id="recorded, not taken up"),
        pytest.param("jobs.begun", COUNT, 4, id="taken up"),
        pytest.param("job.count.one.begun", COUNT, 4, id="before the first step"),
        pytest.param("job.count.three.begun", COUNT, 4, id="before the third step"),
        pytest.param("job.count.three.done", [*COUNT[:3], *COUNT[2:]], 5, id="third step done, not logged"),
        pytest.param("job.count.three.logged", COUNT, 4, id="third step logged"),
        pytest.param("job.count.four.logged", COUNT, 4, id="last step logged, end not recorded"),
    ],
)
def test_a_killed_job_goes_on_at_its_step(
    path: Path, trace: job_procedures.Trace, until: Until, place: str, ran: list[str], facts: int
) -> None:
    with process(path, "run", crash_at=place) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        job = job_procedures.submit(path, "count")
        assert child.wait(timeout=30) == -signal.SIGKILL
    with Vault.open(path) as vault:
        assert not vault.job(job.id).state.ended
        assert vault.engine_holder() is None
    with job_procedures.engine(path) as jobs:
        ended = jobs.wait(job.id, timeout=20)
    assert (trace.lines(), json.loads(ended.result or "")) == (ran, {"steps": facts})


def test_killed_after_the_end_was_recorded(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    job = job_procedures.submit(path, "count")
    killed(path, "job.count.ended")
    assert log_of(path) == {job.id: "PENDING"}
    with job_procedures.engine(path):
        until(lambda: log_of(path) == {job.id: "SUCCESS"})
    assert trace.lines() == COUNT
    with job_procedures.engine(path):
        assert log_of(path) == {}, "the log of ended jobs does not grow"


def test_killed_while_a_step_works(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    job = job_procedures.submit(path, "wait")
    with process(path, "run") as child:
        until(lambda: "web1 wait.wait" in trace.lines())
        child.kill()
        child.wait(timeout=30)
    trace.let_go("web1")
    with job_procedures.engine(path) as jobs:
        jobs.wait(job.id, timeout=20)
    assert trace.lines() == ["web1 wait.begin", "web1 wait.wait", "web1 wait.wait", "web1 wait.end"]


def test_killed_again_and_again(path: Path, trace: job_procedures.Trace) -> None:
    job = job_procedures.submit(path, "count")
    for step in ("one", "two", "three", "four"):
        killed(path, f"job.count.{step}.begun")
    with job_procedures.engine(path) as jobs:
        ended = jobs.wait(job.id, timeout=20)
    assert trace.lines() == COUNT
    assert (ended.started_at or 0) < (ended.ended_at or 0)


def test_killed_right_after_the_record_of_the_machine_was_removed(path: Path, trace: job_procedures.Trace) -> None:
    job = job_procedures.submit(path, "unprotect")
    killed(path, "job.unprotect.remove.done")
    with job_procedures.engine(path) as jobs:
        assert jobs.wait(job.id, timeout=20).state is JobState.DONE
    assert trace.lines() == ["web1 unprotect.begin", "web1 unprotect.remove"]


def test_a_submitter_killed_right_after_its_record_loses_nothing(path: Path, trace: job_procedures.Trace) -> None:
    with process(path, "submit", "count", "web1", crash_at="vault.add-job.committed") as child:
        assert child.wait(timeout=30) == -signal.SIGKILL
    with job_procedures.engine(path) as jobs:
        (job,) = jobs._vault.jobs()
        jobs.wait(job.id, timeout=20)
    assert trace.lines() == COUNT


def test_jobs_of_other_processes_are_picked_up(path: Path, trace: job_procedures.Trace) -> None:
    with job_procedures.engine(path) as jobs:
        with process(path, "submit", "count", "web2") as child:
            out, _ = child.communicate(timeout=30)
        assert jobs.wait(out.strip(), timeout=20).state is JobState.DONE
    assert trace.lines() == [line.replace("web1", "web2") for line in COUNT]


def test_interrupted_jobs_keep_their_order(path: Path, trace: job_procedures.Trace) -> None:
    first = job_procedures.submit(path, "count")
    second = job_procedures.submit(path, "copy")
    killed(path, "job.count.two.begun")
    third = job_procedures.submit(path, "copy")
    with job_procedures.engine(path) as jobs:
        for job in (third, second, first):
            jobs.wait(job.id, timeout=20)
    assert trace.lines() == [*COUNT, "web1 copy.copy", "web1 copy.copy"]


# -- ended on purpose --------------------------------------------------------------------------------------------------


def test_an_engine_that_ends_leaves_its_jobs_as_a_kill_would(
    path: Path, trace: job_procedures.Trace, until: Until
) -> None:
    reported = job_procedures.Reported()
    with job_procedures.engine(path, reported.plugin()) as jobs:
        running, waiting = start(jobs, path, "wait"), start(jobs, path, "count")
        until(lambda: "web1 wait.wait" in trace.lines())
    with Vault.open(path) as vault:
        assert vault.job(running.id).state is JobState.RUNNING
        assert vault.job(waiting.id).state is JobState.QUEUED
    assert reported.finished == []
    trace.let_go("web1")
    with job_procedures.engine(path, reported.plugin()) as jobs:
        assert jobs.wait(running.id, timeout=20).state is JobState.DONE
        assert jobs.wait(waiting.id, timeout=20).state is JobState.DONE
    assert trace.lines() == ["web1 wait.begin", "web1 wait.wait", "web1 wait.wait", "web1 wait.end", *COUNT]
    assert len(reported.finished) == 2


def test_ending_waits_for_a_step_that_does_not_look(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    with job_procedures.engine(path) as jobs:
        job = start(jobs, path, "deaf")
        until(lambda: "web1 deaf.wait" in trace.lines())
        threading.Timer(0.5, trace.let_go, ["web1"]).start()
    assert trace.may_go("web1"), "nothing works on the vault after its lock was given up"
    with Vault.open(path) as vault:
        state = vault.job(job.id).state
    with job_procedures.engine(path) as jobs:
        jobs.wait(job.id, timeout=20)
    assert state in (JobState.RUNNING, JobState.DONE)
    assert trace.lines() == ["web1 deaf.wait", "web1 last.end"], "the step that ended while closing is not run again"


def test_a_second_start_and_a_second_close_do_nothing(path: Path) -> None:
    with job_procedures.engine(path) as jobs:
        jobs.start()
        jobs.close()
        jobs.close()
        jobs.start()
        assert jobs.wait(start(jobs, path, "count").id, timeout=20).state is JobState.DONE


# -- the log is lost, damaged, or of another time ----------------------------------------------------------------------


def test_without_its_log_a_job_begins_anew(path: Path, trace: job_procedures.Trace) -> None:
    job = job_procedures.submit(path, "count")
    killed(path, "job.count.three.begun")
    for left in path.parent.glob("vault.db.jobs*"):
        left.unlink()
    with job_procedures.engine(path) as jobs:
        ended = jobs.wait(job.id, timeout=20)
    assert trace.lines() == [*COUNT[:2], *COUNT]
    assert json.loads(ended.result or "") == {"steps": 6}


def test_a_log_that_says_more_than_the_vault_is_not_believed(path: Path, trace: job_procedures.Trace) -> None:
    job = job_procedures.submit(path, "count")
    backup = path.with_name("backup.db")
    with sqlite3.connect(path) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    source.close()
    target.close()
    with job_procedures.engine(path) as jobs:
        jobs.wait(job.id, timeout=20)
    for left in path.parent.glob("vault.db-*"):
        left.unlink()
    backup.replace(path)
    with job_procedures.engine(path) as jobs:
        assert jobs.wait(job.id, timeout=20).state is JobState.DONE
    assert trace.lines() == [*COUNT, *COUNT]


def test_a_workflow_of_a_job_that_the_vault_does_not_know_does_nothing(path: Path, trace: job_procedures.Trace) -> None:
    job_procedures.submit(path, "count")
    killed(path, "job.count.two.begun")
    other = path.with_name("other.db")
    job_procedures.make_vault(other)
    for left in [path, *path.parent.glob("vault.db-*")]:
        left.unlink()
    other.rename(path)
    with job_procedures.engine(path) as jobs:
        assert jobs.wait(start(jobs, path, "count", "web2").id, timeout=20).state is JobState.DONE
    assert [line for line in trace.lines() if line.startswith("web1")] == COUNT[:1]


def test_a_damaged_log_is_an_error_of_the_catalogue(path: Path) -> None:
    Path(f"{path}.jobs").write_bytes(b"this is no database" * 100)
    with pytest.raises(VaultUnavailable, match=r"vault\.db\.jobs.*not a database"), job_procedures.engine(path):
        pass
    Path(f"{path}.jobs").unlink()
    with job_procedures.engine(path) as jobs:
        assert jobs.wait(start(jobs, path, "count").id, timeout=20).state is JobState.DONE


def test_steps_changed_by_an_upgrade_fail_the_job(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    job = job_procedures.submit(path, "wait")
    killed(path, "job.wait.wait.begun")
    changed = job_procedures.procedures(trace)
    changed["wait"] = Procedure("wait", (*changed["count"].steps[:1], *changed["wait"].steps))
    with Vault.open(path) as vault, vault.engine_lock("a test"):
        jobs = Jobs(Context(vault, Plugins()), changed)
        jobs.start()
        try:
            with pytest.raises(JobFailed, match="begin"):
                jobs.wait(job.id, timeout=20)
        finally:
            jobs.close()
    assert trace.lines() == ["web1 wait.begin"]


# -- following ---------------------------------------------------------------------------------------------------------


def test_following_ends_after_its_time(path: Path) -> None:
    job = job_procedures.submit(path, "count")
    with Vault.open(path) as vault, pytest.raises(TimedOut, match="did not finish within"):
        follow(vault, job.id, timeout=0.2)


def test_following_ends_when_no_engine_is_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record, "PATIENCE", 0.3)
    job = job_procedures.submit(path, "count")
    with Vault.open(path) as vault, pytest.raises(EngineStopped, match=job.id):
        follow(vault, job.id, timeout=20, alive=lambda: vault.engine_holder() is not None)


# -- a good neighbour --------------------------------------------------------------------------------------------------

_QUIET = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        sys.stderr.write(f"network: {event} {arguments}\\n")

sys.addaudithook(refuse)
from pathlib import Path
from tests.unit.jobs import job_procedures
path = Path(sys.argv[1])
assert "dbos" not in sys.modules, "only a starting engine imports DBOS"
job = job_procedures.submit(path, "count")
assert "dbos" not in sys.modules
with job_procedures.engine(path) as jobs:
    jobs.wait(job.id, timeout=20)
"""


def test_an_engine_prints_nothing_and_calls_nobody(path: Path) -> None:
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", _QUIET, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_log_is_private(path: Path) -> None:
    with job_procedures.engine(path):
        pass
    assert Path(f"{path}.jobs").stat().st_mode & 0o077 == 0
