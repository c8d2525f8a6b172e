"""Jobs of several process servers: a machine's server runs them, and resumes those of a server that died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from asrcore.jobs import enqueue, follow
from asrcore.procedures.procedure import Arguments
from asrcore.vault import Job, JobState, Vault, _schema
from tests.postgres import Cluster
from tests.unit.jobs import job_procedures

Until = Callable[[Callable[[], bool]], None]

ROOT = Path(__file__).parents[3]
COUNT = [f"web1 count.{step}" for step in ("one", "two", "three", "four")]
PATIENCE = 60


class Field:
    """A vault on PostgreSQL, its servers, and the trace of their jobs."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.trace = job_procedures.Trace(folder / "vault")
        job_procedures.make_vault(url)
        self.vault = Vault.open(url)

    def submit(self, kind: str, machine: str = "web1") -> Job:
        return enqueue(self.vault, kind, self.vault.protection(machine), Arguments(), now=1000.0)

    @contextmanager
    def server(self, name: str, crash_at: str = "") -> Iterator[subprocess.Popen[str]]:
        environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONPATH": str(ROOT), "ASRCORE_CRASH_AT": crash_at}
        command = [sys.executable, "-m", "tests.unit.jobs.server_process", self.url, str(self.folder), name]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            try:
                assert child.stdout is not None
                assert child.stdout.readline() == "ready\n"
                yield child
            finally:
                child.kill()

    def owner(self, machine: str) -> str | None:
        return self.vault.assigned().get(f"m-{machine}")


def give(vault: Vault, machine: str, session: str) -> None:
    """As a planner would, whether the session is alive or not."""
    table = _schema.assignments
    with vault._write("test") as connection:
        connection.execute(table.update().filter_by(protection_id=machine).values(session=session))


@pytest.fixture
def field(postgres: Cluster, tmp_path: Path) -> Iterator[Field]:
    url = postgres.create()
    made = Field(url, tmp_path)
    yield made
    made.vault.close()
    postgres.drop(url)


def test_each_runs_the_jobs_of_its_own_machines(field: Field, until: Until) -> None:
    with field.server("one"), field.server("two"):
        until(lambda: {field.owner("web1"), field.owner("web2")} == {"s-one", "s-two"})
        jobs = [field.submit("count", name) for name in ("web1", "web2", "web1")]
        for job in jobs:
            assert follow(field.vault, job.id, timeout=PATIENCE).state is JobState.DONE
    assert sorted(field.trace.lines()) == sorted([*COUNT, *COUNT, *(line.replace("web1", "web2") for line in COUNT)])


@pytest.mark.parametrize(
    ("place", "ran", "facts"),
    [
        pytest.param("jobs.taken", COUNT, 4, id="not taken up"),
        pytest.param("job.count.three.done", [*COUNT[:3], *COUNT[2:]], 5, id="third step done, not logged"),
        pytest.param("job.count.three.logged", COUNT, 4, id="third step logged"),
        pytest.param("job.count.four.logged", COUNT, 4, id="last step logged, end not recorded"),
    ],
)
def test_another_server_goes_on_at_the_step(field: Field, place: str, ran: list[str], facts: int) -> None:
    with field.server("one", crash_at=place) as one:
        job = field.submit("count")
        assert one.wait(PATIENCE) == -signal.SIGKILL
    assert field.owner("web1") == "s-one"
    with field.server("two"):
        ended = follow(field.vault, job.id, timeout=PATIENCE)
    assert (field.trace.lines(), json.loads(ended.result or "")) == (ran, {"steps": facts})
    assert field.vault.protection("web1").epoch == 2


def test_a_paused_server_s_job_goes_on_elsewhere_and_not_twice(field: Field, until: Until) -> None:
    """It resumes in the middle of a step that another server has finished meanwhile."""
    with ExitStack() as stack:
        one = stack.enter_context(field.server("one"))
        job = field.submit("wait")
        until(lambda: "web1 wait.wait" in field.trace.lines())
        one.send_signal(signal.SIGSTOP)
        stack.enter_context(field.server("two"))
        field.trace.let_go("web1")
        assert follow(field.vault, job.id, timeout=PATIENCE).state is JobState.DONE
        after = field.vault.job(job.id), field.trace.lines()
        assert after[1] == ["web1 wait.begin", "web1 wait.wait", "web1 wait.wait", "web1 wait.end"]
        one.send_signal(signal.SIGCONT)
        assert one.stdout is not None
        assert one.stdout.readline() == "given up\n"
        assert one.wait(PATIENCE) == 0
        assert (field.vault.job(job.id), field.trace.lines()) == after


def test_a_job_whose_machine_went_away_and_came_back_goes_on(field: Field, until: Until) -> None:
    """The server that received the machine died before it had started the job."""
    with field.server("one") as one:
        job = field.submit("wait")
        until(lambda: "web1 wait.wait" in field.trace.lines())
        give(field.vault, "m-web1", "s-nobody")
        until(lambda: field.owner("web1") == "s-one")
        field.trace.let_go("web1")
        assert follow(field.vault, job.id, timeout=PATIENCE).state is JobState.DONE
        assert one.poll() is None
    assert field.trace.lines()[-1] == "web1 wait.end"
    assert field.trace.lines().count("web1 wait.end") == 1


def test_one_engine_goes_on_with_what_servers_left(field: Field, until: Until) -> None:
    with field.server("one", crash_at="job.count.two.logged") as one:
        job = field.submit("count")
        assert one.wait(PATIENCE) == -signal.SIGKILL
    from asrcore.jobs import Jobs
    from asrcore.plugins import Plugins
    from asrcore.replication.context import Context

    with field.vault.engine_lock("a test"):
        jobs = Jobs(Context(field.vault, Plugins()), job_procedures.procedures(field.trace))
        try:
            jobs.start()
            assert jobs.wait(job.id, timeout=PATIENCE).state is JobState.DONE
        finally:
            jobs.close()
    assert field.trace.lines() == COUNT
