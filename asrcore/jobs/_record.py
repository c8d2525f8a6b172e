"""A job as a record in the vault: added and followed by any process, whoever runs it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import attrs

from asrcore.errors import EngineStopped, TimedOut, VaultUnavailable
from asrcore.jobs._failure import error_of
from asrcore.model.protection import Protection
from asrcore.procedures.procedure import Arguments
from asrcore.replication.ids import new_id
from asrcore.vault import Job, JobState, Vault

__all__ = ["Order", "arguments_of", "enqueue", "follow", "requested_by"]

LOOK = 0.1  # seconds between polls of a followed job: one indexed read
IDLE = 2.0  # seconds without a change after which it is said what a job waits for, and between two times
AWAY = 60.0  # seconds that a vault may not answer until whoever follows a job gives up; the job itself continues
PATIENCE = 10.0  # seconds without an engine until it counts as stopped: a service that restarts resumes the job


@attrs.frozen
class Order:
    """The durable input of a job. The protection's id, not its name: a name that is free may be used again."""

    protection_id: str
    arguments: Arguments
    who: str = ""
    """Who requested it: a person at a host, a component, or the service."""

    def to_json(self) -> str:
        """For the job's record."""
        given = {"protection": self.protection_id, "arguments": json.loads(self.arguments.to_json())}
        return json.dumps({**given, "who": self.who} if self.who else given)

    @classmethod
    def of(cls, job: Job) -> Order:
        """From the job's record. Raises ValueError, KeyError, TypeError if another version wrote it otherwise."""
        value = json.loads(job.arguments)
        return cls(value["protection"], Arguments.from_json(json.dumps(value["arguments"])), str(value.get("who", "")))


def arguments_of(job: Job) -> Arguments:
    """What was given with the verb."""
    return Order.of(job).arguments


def requested_by(job: Job) -> str:
    """Who requested the job; "" if that was not recorded."""
    try:
        return Order.of(job).who
    except (ValueError, KeyError, TypeError, AttributeError):  # of another version; the engine reports it
        return ""


def enqueue(vault: Vault, kind: str, protection: Protection, arguments: Arguments, *, now: float, who: str = "") -> Job:
    """Record a job; durable when it returns. The engine finds it, if need be at its next start."""
    job = Job(
        id=new_id("j"),
        kind=kind,
        machine=protection.name,
        state=JobState.QUEUED,
        arguments=Order(protection.id, arguments, who).to_json(),
        created_at=now,
    )
    return vault.add_job(job)


def follow(
    vault: Vault,
    job_id: str,
    on_change: Callable[[Job], None] | None = None,
    timeout: float | None = None,
    *,
    alive: Callable[[], bool] = lambda: True,
    pause: Callable[[float], object] | None = None,
    on_idle: Callable[[Job], None] | None = None,
) -> Job:
    """Wait until a job has ended; `on_change` gets every change that is seen, the first look and the last included, and
    `on_idle` the job every two seconds in which it has not changed.

    `alive` says whether an engine works on the vault; `pause` waits that many seconds, or less. Raises the error of a
    job that failed or was cancelled, TimedOut after `timeout` seconds (the job continues), EngineStopped when no engine
    is left.
    """
    began = time.monotonic()
    seen: Job | None = None
    missed_at: float | None = None
    answered_at = idle_at = began
    pause = pause or threading.Event().wait
    while True:
        try:
            job = vault.job(job_id)
            if job != seen:
                idle_at = time.monotonic()
            elif on_idle is not None and time.monotonic() - idle_at >= IDLE:
                idle_at = time.monotonic()
                on_idle(job)
            lives = job.state.ended or alive()
        except VaultUnavailable:
            now = time.monotonic()
            if now - answered_at >= AWAY or (timeout is not None and now - began >= timeout):
                raise
            pause(LOOK)
            continue
        answered_at = time.monotonic()
        if on_change is not None and job != seen:
            on_change(job)
        seen = job
        if job.state.ended:
            error = error_of(job) if job.state is not JobState.DONE else None
            if error is not None:
                raise error
            return job
        now = time.monotonic()
        if timeout is not None and now - began >= timeout:
            raise TimedOut(operation=f"job {job.id} ({job.kind})", seconds=timeout, detail="The job is still running.")
        if lives:
            missed_at = None
        elif missed_at is None:
            missed_at = now
        elif now - missed_at >= PATIENCE:
            raise EngineStopped(job=job.id)
        pause(LOOK)
