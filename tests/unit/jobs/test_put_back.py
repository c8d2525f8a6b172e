"""Jobs that had not ended in an earlier copy of the vault wait for a person when it is put back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import asrcore.testing.memory
from asrcore.engine import Engine
from asrcore.errors import JobFromBackup
from asrcore.jobs import enqueue
from asrcore.model.machine import PowerState
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.state import Event, State
from asrcore.plugins import Plugins
from asrcore.procedures.procedure import Arguments
from asrcore.service.member import ServerIdentity
from asrcore.testing.memory import MemoryWorld
from asrcore.vault import Job, JobState, _schema
from tests.put_back import put_back, take_copy
from tests.unit.service.test_member import LONG, until


class Field:
    """A machine `web` that is protected from `a` to `b`, and engines that run jobs, one after another."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.home, self.away = MemoryWorld("home"), MemoryWorld("away")
        self.home.add_machine("web", {"vda": 1 << 16}).start()
        self.plugins = Plugins()
        assert self.plugins.register("memory", asrcore.testing.memory)
        with Engine.create(place, self.plugins) as engine:
            engine.add_site("a", "memory", {"world": "home"})
            engine.add_site("b", "memory", {"world": "away"})
            engine.vault.add_policy(Policy("gold", interval=3600.0, point_interval=3600.0, resync_window=ALWAYS))
            engine.start()
            engine.wait(engine.protect("web", source="a", target="b", policy="gold"), timeout=30)

    def open(self) -> Engine:
        return Engine.open(self.place, self.plugins)

    def order(self, engine: Engine, kind: str) -> Job:
        now = engine.context.clock()
        return enqueue(engine.vault, kind, engine.vault.protection("web"), Arguments(), now=now)

    @property
    def power(self) -> PowerState:
        return self.home.machine("web").value.power


@pytest.fixture
def field(tmp_path: Path) -> Field:
    return Field(str(tmp_path / "vault.db"))


def ended(engine: Engine, job: Job) -> Job:
    until(lambda: engine.vault.job(job.id).state.ended)
    return engine.vault.job(job.id)


@pytest.mark.parametrize("directory", [False, True], ids=["file", "killed"])
def test_a_job_of_the_copy_is_not_run(field: Field, tmp_path: Path, directory: bool) -> None:
    """`killed`: the same files as before: an engine that was killed is no reason to ask a person."""
    with field.open() as engine:
        job = field.order(engine, "failover-planned")
        copy = take_copy(Path(field.place), tmp_path / "copy.db")
        if not directory:
            engine.cancel(job)
            engine.start()
            assert ended(engine, job).state is JobState.CANCELLED
    put_back(copy, Path(field.place), directory=directory)
    with field.open() as engine:
        engine.start()
        found = ended(engine, job)
        if directory:
            assert (found.state, field.power) == (JobState.DONE, PowerState.OFF)
            return
        assert (found.state, field.power) == (JobState.FAILED, PowerState.RUNNING)
        with pytest.raises(JobFromBackup, match="earlier copy"):
            engine.wait(found)
        assert engine.vault.protection("web").restored
        texts = [entry.text for entry in engine.vault.events() if entry.kind == "vault"]
        assert len(texts) == 2, texts
        engine.wait(engine.replicate("web"), timeout=30)
        assert not engine.vault.protection("web").restored, "the target agreed"
    with field.open() as engine:  # and the next engine does not find it put back again
        engine.start()
        engine.wait(engine.replicate("web"), timeout=30)
        assert not engine.vault.protection("web").restored


def test_a_state_that_only_such_a_job_would_leave_says_so(field: Field, tmp_path: Path) -> None:
    with field.open() as engine:
        protection = engine.vault.protection("web")
        job = field.order(engine, "failover-unplanned")
        engine.vault.update_job(job.id, state=JobState.RUNNING, step="begin", started_at=time.time())
        engine.vault.transition(protection.id, Event.FAIL_OVER, failover_point=protection.head_point)
        copy = take_copy(Path(field.place), tmp_path / "copy.db")
        engine.start()
    put_back(copy, Path(field.place))
    with field.open() as engine:
        engine.start()
        assert ended(engine, job).state is JobState.FAILED
        (status,) = engine.status()
        codes = {reason.code: reason.action for reason in status.health.reasons}
        assert "asr failover undo web" in codes["failover-stuck"]
        assert "vault-put-back" in codes
        engine.wait(engine.failover_undo("web"), timeout=30)
        assert (engine.vault.protection("web").state, field.power) == (State.PROTECTED, PowerState.RUNNING)


def test_an_engine_killed_while_it_ends_such_jobs_leaves_none_to_run(
    field: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with field.open() as engine:
        jobs = [field.order(engine, "failover-planned") for _ in range(3)]
        copy = take_copy(Path(field.place), tmp_path / "copy.db")
        for job in jobs:
            engine.cancel(job)
        engine.start()
        for job in jobs:
            ended(engine, job)
    put_back(copy, Path(field.place))

    class Killed(BaseException):
        pass

    def die(name: str) -> None:
        if name == "jobs.left-to-person":
            raise Killed

    with monkeypatch.context() as patch, field.open() as engine:
        patch.setattr("asrcore.jobs._jobs.reach", die)
        with pytest.raises(Killed):
            engine.start()
    with field.open() as engine:
        engine.start()
        assert [ended(engine, job).state for job in jobs] == [JobState.FAILED] * 3
    assert field.power is PowerState.RUNNING


@pytest.fixture
def shared(url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Engine]:
    monkeypatch.setattr("asrcore.engine.ServerIdentity", partial(ServerIdentity, lease=LONG))
    MemoryWorld("home").add_machine("web", {"vda": 1 << 16}).start()
    MemoryWorld("away")
    plugins = Plugins()
    assert plugins.register("memory", asrcore.testing.memory)
    with Engine.open(url, plugins) as engine:
        engine.add_site("a", "memory", {"world": "home"})
        engine.add_site("b", "memory", {"world": "away"})
        engine.vault.add_policy(Policy("gold", interval=3600.0, point_interval=3600.0))
    return lambda: Engine.open(url, plugins)


def test_jobs_that_come_back_when_the_database_loses_transactions_are_not_run(shared: Callable[[], Engine]) -> None:
    """A standby became the primary and misses the last ones: a job that had been cancelled is active again."""
    stop = threading.Event()
    with shared() as asking, shared() as working:
        running = threading.Thread(target=working.run, args=[stop], daemon=True)
        running.start()
        until(lambda: working._jobs is not None)
        asking.wait(asking.protect("web", source="a", target="b", policy="gold"), timeout=30)
        with working._jobs._changed if working._jobs else threading.Lock():
            job = Job(id="j-lost", kind="failover-planned", machine="web", state=JobState.QUEUED, arguments="{}")
            asking.vault.add_job(job)
            with asking.vault._write("test") as connection:
                earlier = _schema.servers.c.beat_at - 1.0
                connection.execute(_schema.servers.update().values(beat_at=earlier))
            until(lambda: working.vault._went_back)
        until(lambda: asking.vault.job("j-lost").state.ended)
        assert (asking.vault.job("j-lost").error or {})["code"] == "job-from-backup"
        assert asking.vault.protection("web").state is State.PROTECTED
        asking.wait(asking.replicate("web"), timeout=30)
        assert not asking.vault.protection("web").restored
        stop.set()
        running.join(20)


def test_a_process_server_that_starts_beside_another_one_resumes_no_job_of_the_copy(
    shared: Callable[[], Engine],
) -> None:
    with shared() as engine:
        engine.start()
        engine.wait(engine.protect("web", source="a", target="b", policy="gold"), timeout=30)
    with shared() as other, shared() as starting:
        job = Job(id="j-old", kind="failover-planned", machine="web", state=JobState.QUEUED, arguments="{}")
        other.vault.add_job(job)
        with other.vault._write("test") as connection:  # as a restored dump: another transaction wrote it
            connection.execute(_schema.incarnation.update().values(number=1))
        other.vault.join("two", "s-two", host="h", sites=None, lease=60.0)  # it has looked at nothing yet
        stop = threading.Event()
        serving = threading.Thread(target=starting.serve, args=[ServerIdentity("one", "s-one", "h"), stop], daemon=True)
        serving.start()
        until(lambda: other.vault.job("j-old").state.ended)
        assert (other.vault.job("j-old").error or {})["code"] == "job-from-backup"
        stop.set()
        serving.join(20)
        assert other.vault.protection("web").state is State.PROTECTED
