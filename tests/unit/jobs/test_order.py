"""Which jobs run at the same time, and which run first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.errors import Cancelled, MachineBusy
from asrcore.jobs import Jobs
from asrcore.model.protection import Protection
from asrcore.model.watch import Watch
from asrcore.plugins import Plugins
from asrcore.replication.context import Context
from asrcore.replication.locks import MachineLocks
from asrcore.vault import Job, JobState, Vault
from tests.unit.jobs import job_procedures
from tests.unit.jobs.test_run import start

Until = Callable[[Callable[[], bool]], None]


def is_cancelled(watch: Watch) -> bool:
    try:
        watch.check()
    except Cancelled:
        return True
    return False


def test_jobs_of_one_machine_run_one_after_the_other_in_order(path: Path, trace: job_procedures.Trace) -> None:
    submitted = [job_procedures.submit(path, "count", now=1000.0 + number) for number in range(4)]
    with job_procedures.engine(path) as jobs:
        ended = [jobs.wait(job.id, timeout=20) for job in submitted]
    assert trace.lines() == [f"web1 count.{step}" for step in ("one", "two", "three", "four")] * 4
    times = [moment for job in ended for moment in (job.started_at or 0, job.ended_at or 0)]
    assert times == sorted(times)


def test_jobs_of_two_machines_run_beside_each_other(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    with job_procedures.engine(path) as jobs:
        both = [start(jobs, path, "wait", machine) for machine in job_procedures.MACHINES]
        until(lambda: {"web1 wait.wait", "web2 wait.wait"} <= set(trace.lines()))
        for machine in job_procedures.MACHINES:
            trace.let_go(machine)
        assert {jobs.wait(job.id, timeout=20).state for job in both} == {JobState.DONE}


def test_a_job_waits_for_a_cycle_and_says_so(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    with job_procedures.engine(path) as jobs, Vault.open(path) as vault:
        locks, web1 = jobs._context.locks, vault.protection("web1")
        with locks.hold(web1, "a replication cycle", Watch()):
            job = start(jobs, path, "count")
            until(lambda: vault.job(job.id).step == "waiting for a replication cycle")
            assert trace.lines() == []
        assert jobs.wait(job.id, timeout=20).state is JobState.DONE


def test_urgent_work_cancels_a_cycle(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    trace.let_go("web1")
    with job_procedures.engine(path) as jobs, Vault.open(path) as vault:
        watch, web1 = Watch(), vault.protection("web1")
        with jobs._context.locks.hold(web1, "a replication cycle", watch):
            job = start(jobs, path, "urgent")
            until(lambda: is_cancelled(watch))
        assert jobs.wait(job.id, timeout=20).state is JobState.DONE


def test_urgent_work_cancels_the_running_job_and_passes_the_waiting_one(
    path: Path, trace: job_procedures.Trace, until: Until
) -> None:
    with job_procedures.engine(path) as jobs:
        running = start(jobs, path, "wait")
        until(lambda: "web1 wait.wait" in trace.lines())
        waiting = start(jobs, path, "count")
        urgent = start(jobs, path, "urgent")
        with pytest.raises(Cancelled):
            jobs.wait(running.id, timeout=20)
        trace.let_go("web1")
        assert jobs.wait(urgent.id, timeout=20).state is JobState.DONE
        assert jobs.wait(waiting.id, timeout=20).state is JobState.DONE
    assert trace.lines()[2:4] == ["web1 urgent.wait", "web1 urgent.end"]


def test_urgent_work_waits_for_urgent_work(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    with job_procedures.engine(path) as jobs, Vault.open(path) as vault:
        first = start(jobs, path, "urgent")
        until(lambda: "web1 urgent.wait" in trace.lines())
        second = start(jobs, path, "urgent")
        until(lambda: vault.job(second.id).step == "waiting for urgent")
        trace.let_go("web1")
        assert jobs.wait(first.id, timeout=20).state is JobState.DONE
        assert jobs.wait(second.id, timeout=20).state is JobState.DONE


@pytest.mark.parametrize(
    ("holds", "wants", "beside"),
    [
        ("test", "resync", True),
        ("resync", "test", True),
        ("test", "count", False),
        ("resync", "count", False),
        ("test", "test", False),
        ("wait", "test", False),
    ],
)
def test_a_test_runs_beside_replication_only(
    path: Path, trace: job_procedures.Trace, until: Until, holds: str, wants: str, beside: bool
) -> None:
    def has_begun(vault: Vault, job: Job) -> bool:
        return vault.job(job.id).state is JobState.RUNNING

    with job_procedures.engine(path) as jobs, Vault.open(path) as vault:
        first = start(jobs, path, holds)
        until(lambda: has_begun(vault, first))
        second = start(jobs, path, wants)
        if beside:
            until(lambda: has_begun(vault, second))
        else:
            until(lambda: vault.job(second.id).step == f"waiting for {holds}")
        trace.let_go("web1")
        assert [jobs.wait(job.id, timeout=20).state for job in (first, second)] == [JobState.DONE] * 2


def test_a_cycle_runs_beside_a_test(path: Path, trace: job_procedures.Trace, until: Until) -> None:
    with job_procedures.engine(path) as jobs, Vault.open(path) as vault:
        job = start(jobs, path, "test")
        until(lambda: "web1 test.wait" in trace.lines())
        with jobs._context.locks.hold(vault.protection("web1"), "a replication cycle", Watch()):
            pass
        trace.let_go("web1")
        jobs.wait(job.id, timeout=20)


def test_what_was_cancelled_leaves_nothing_locked(path: Path, until: Until) -> None:
    with job_procedures.engine(path) as jobs, Vault.open(path) as vault:
        for job in [start(jobs, path, "wait"), start(jobs, path, "wait")]:
            jobs.cancel(job.id)
            with pytest.raises(Cancelled):
                jobs.wait(job.id, timeout=20)
        until(lambda: jobs._context.locks.busy(vault.protection("web1").id) is None)


def test_jobs_are_for_the_holder_of_the_lock(path: Path) -> None:
    with Vault.open(path) as vault:
        jobs = Jobs(Context(vault, Plugins()), {})
        with pytest.raises(RuntimeError, match="engine lock"):
            jobs.start()
        jobs.close()


def test_one_engine_in_a_process(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    job_procedures.make_vault(other)
    with job_procedures.engine(path) as jobs:
        with pytest.raises(RuntimeError, match="another engine runs in this process"), job_procedures.engine(other):
            pass
        assert jobs.wait(start(jobs, path, "count").id, timeout=20).state is JobState.DONE


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_lines_are_served_in_order_urgent_work_first(urgent: list[bool]) -> None:
    locks, watches = MachineLocks(), [Watch() for _ in urgent]
    machine = Protection("m", "web1", "gold", "north", "north", "web1", "south", "r")
    turns = [
        locks.line_up(machine, str(number), watch, preempt=preempt)
        for number, (watch, preempt) in enumerate(zip(watches, urgent, strict=True))
    ]
    served = []
    while (first := locks.busy("m")) is not None:
        with turns[int(first)].hold(0):
            served.append(int(first))
    wanted = sorted(range(len(urgent)), key=lambda number: (not urgent[number], number))
    assert served == wanted


def test_whoever_does_not_wait_passes_nobody() -> None:
    locks, machine = MachineLocks(), Protection("m", "web1", "gold", "north", "north", "web1", "south", "r")
    turn = locks.line_up(machine, "a job", Watch())
    with pytest.raises(MachineBusy, match="busy with a job"), locks.hold(machine, "a cycle", Watch()):
        pass
    turn.leave()
    turn.leave()
    with locks.hold(machine, "a cycle", Watch()):
        assert locks.busy("m") == "a cycle"
    assert locks.busy("m") is None
