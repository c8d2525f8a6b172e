"""Jobs and the log."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from asrcore.errors import AmbiguousName, MachineBusy, NotFound
from asrcore.vault import Job, JobChanges, JobState, Vault, _journal


def job(number: int, machine: str = "web-1") -> Job:
    return Job(f"{number:04x}abcd", "failover", machine, arguments='{"point":"latest"}', created_at=5.0)


def test_a_job_is_what_was_put_in(vault: Vault) -> None:
    assert vault.add_job(job(1)) == job(1)
    vault.update_job(job(1).id, state=JobState.RUNNING)
    assert vault.add_job(job(1)).state is JobState.RUNNING
    assert vault.jobs() == [attrs.evolve(job(1), state=JobState.RUNNING)]


def test_every_changeable_field_of_a_job_changes(vault: Vault) -> None:
    vault.add_job(job(1))
    changes: dict[str, Any] = {
        "state": JobState.FAILED,
        "step": "boot",
        "progress_done": 1 << 45,
        "progress_total": 1 << 46,
        "progress_work": "copying",
        "result": "[]",
        "error": {"code": "target-full"},
        "started_at": 6.0,
        "ended_at": 7.0,
    }
    assert set(changes) == set(JobChanges.__annotations__)
    assert vault.update_job(job(1).id, **changes) == attrs.evolve(job(1), **changes)
    assert vault.job(job(1).id) == attrs.evolve(job(1), **changes)
    fixed: Any = {"kind": "x"}
    with pytest.raises(TypeError, match="kind"):
        vault.update_job(job(1).id, **fixed)
    with pytest.raises(NotFound):
        vault.update_job("nothing", step="x")


def test_a_job_is_found_by_the_beginning_of_its_id(vault: Vault) -> None:
    vault.add_job(Job("ab12", "x"))
    vault.add_job(Job("ab34", "x"))
    vault.add_job(Job("ab", "y"))
    assert vault.job("ab1").id == "ab12"
    assert vault.job("ab").kind == "y"
    with pytest.raises(AmbiguousName, match="'a' names more than one job") as caught:
        vault.job("a")
    assert "ab12, ab34" in caught.value.cause_text
    for wrong in ("", "b", "AB1", "%", "ab_", "_b12"):
        with pytest.raises(NotFound, match="job"):
            vault.job(wrong)


def test_jobs_are_listed_newest_first(vault: Vault) -> None:
    for number, machine in enumerate(["web-1", "web-2", "web-1", ""]):
        vault.add_job(job(number, machine))
    vault.update_job(job(2).id, state=JobState.DONE)
    assert [item.id[:4] for item in vault.jobs()] == ["0003", "0002", "0001", "0000"]
    assert [item.id[:4] for item in vault.jobs(limit=2)] == ["0003", "0002"]
    assert [item.id[:4] for item in vault.jobs(machine="web-1")] == ["0002", "0000"]
    assert [item.id[:4] for item in vault.jobs(machine="web-1", active=True)] == ["0000"]


def test_the_last_end_of_a_kind_is_known_by_machine_and_result(vault: Vault) -> None:
    for number, (machine, state, ended) in enumerate(
        [
            ("web-1", JobState.DONE, 20.0),
            ("web-1", JobState.DONE, 10.0),
            ("web-1", JobState.FAILED, 30.0),
            ("web-2", JobState.CANCELLED, 5.0),
        ]
    ):
        vault.add_job(attrs.evolve(job(number, machine), kind="verify"))
        vault.update_job(job(number).id, state=state, ended_at=ended)
    vault.add_job(attrs.evolve(job(8, "web-3"), kind="verify"))
    vault.add_job(attrs.evolve(job(9, "web-3"), kind="resync", ended_at=1.0, state=JobState.DONE))
    assert vault.last_ended("verify") == {
        "web-1": {JobState.DONE: 10.0, JobState.FAILED: 30.0},  # the last one, whatever time an earlier one claims
        "web-2": {JobState.CANCELLED: 5.0},
    }


def test_an_exclusive_job_waits_for_no_one(vault: Vault) -> None:
    vault.add_job(job(1))
    with pytest.raises(MachineBusy, match="'web-1' is busy with failover"):
        vault.add_job(job(2), exclusive=True)
    vault.add_job(job(3, "web-2"), exclusive=True)
    vault.update_job(job(1).id, state=JobState.CANCELLED)
    vault.add_job(job(2), exclusive=True)
    assert len(vault.jobs(active=True)) == 2


def test_a_cancel_request_is_for_jobs_that_go_on(vault: Vault) -> None:
    vault.add_job(job(1))
    assert not vault.cancel_requested(job(1).id)
    assert vault.request_cancel(job(1).id)
    assert vault.cancel_requested(job(1).id)
    vault.add_job(job(2))
    vault.update_job(job(2).id, state=JobState.DONE)
    assert not vault.request_cancel(job(2).id)
    assert not vault.cancel_requested(job(2).id)
    for action in (vault.request_cancel, vault.cancel_requested):
        with pytest.raises(NotFound):
            action("nothing")


def test_the_log_keeps_its_order(vault: Vault) -> None:
    vault.add_event(3.0, "web-1", "failover", "failed over to p1", {"point": "p1", "by": "root"})
    vault.add_event(2.0, "web-2", "health", "warning")
    vault.add_event(4.0, "", "engine", "started")
    assert [(item.machine, item.data) for item in vault.events()] == [
        ("web-1", {"point": "p1", "by": "root"}),
        ("web-2", {}),
        ("", {}),
    ]
    assert [item.text for item in vault.events(machine="web-1")] == ["failed over to p1"]
    assert [item.text for item in vault.events(kinds=["health", "engine"])] == ["warning", "started"]
    assert [item.text for item in vault.events(since=3.0, limit=1)] == ["started"]


def test_the_log_is_bounded_by_age_and_per_machine(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_journal, "LOG_ENTRIES", 3)
    vault.add_event(0.0, "gone", "x", "of a machine that is not there any more")
    for number in range(5):
        vault.add_event(10.0 + number, "web-1", "x", f"first {number}")
        vault.add_event(10.0 + number, "web-2", "x", f"second {number}")
    assert [item.text for item in vault.events(machine="web-1")] == ["first 2", "first 3", "first 4"]
    assert len(vault.events()) == 7
    vault.add_event(_journal.TRIM_AGE + 13.0, "", "x", "a quarter later")
    left = ["first 3", "second 3", "first 4", "second 4", "a quarter later"]
    assert [item.text for item in vault.events()] == left


def test_ended_jobs_are_bounded_by_age_and_per_machine(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_journal, "JOBS", 2)
    vault.add_job(Job("waits", "x", "web-1", created_at=0.0))
    for number in range(4):
        vault.add_job(Job(f"job-{number}", "x", "web-1", created_at=10.0 + number))
        vault.update_job(f"job-{number}", state=JobState.DONE)
    vault.add_job(Job("other", "x", "web-2", created_at=10.0, state=JobState.FAILED))
    vault.add_job(Job("job-4", "x", "web-1", created_at=14.0))
    assert {item.id for item in vault.jobs()} == {"waits", "job-2", "job-3", "other", "job-4"}
    vault.add_job(Job("late", "x", "web-3", created_at=_journal.TRIM_AGE + 13.0))
    assert {item.id for item in vault.jobs()} == {"waits", "job-3", "job-4", "late"}


def test_trimming_never_waits_for_many_rows(vault: Vault) -> None:
    """Rows that expire at the same time are deleted in portions, each together with an added row."""
    for number in range(25):
        vault.add_event(float(number), "web-1", "x", "old")
    counts = []
    for _ in range(4):
        vault.add_event(_journal.TRIM_AGE + 1000.0, "web-1", "x", "new")
        counts.append(len(vault.events()))
    assert counts == [16, 7, 3, 4]


def test_nothing_is_trimmed_by_age_while_the_clock_is_in_doubt(vault: Vault) -> None:
    vault.add_event(0.0, "web-1", "x", "old")
    vault.add_job(attrs.evolve(job(1), state=JobState.DONE, created_at=0.0))
    vault.doubt_clock(1.0, "set forward", boot="b", elapsed=0.0, anchors={}, gaps={})
    later = _journal.TRIM_AGE + 1000.0
    vault.add_event(later, "web-1", "x", "new")
    vault.add_job(attrs.evolve(job(2), created_at=later))
    assert [entry.text for entry in vault.events(machine="web-1")] == ["old", "new"]
    assert len(vault.jobs()) == 2
    assert vault.accept_clock(later, "right")
    vault.add_event(later, "web-1", "x", "newer")
    vault.add_job(attrs.evolve(job(3), created_at=later))
    assert [entry.text for entry in vault.events(machine="web-1")] == ["new", "newer"]
    assert len(vault.jobs()) == 2
