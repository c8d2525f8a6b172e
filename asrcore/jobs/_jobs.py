"""Runs the jobs of a vault in the process that holds its engine lock, or those of a process server's machines.

The vault's record is written first and is the only thing that other processes write; the engine polls for records that
have no workflow yet. So no job is lost, whichever side is killed: a record without a workflow gets one at the next poll
or start, and a workflow's id is the job's id, so a job cannot get two.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING

from asrcore.crashpoint import reach
from asrcore.errors import AsrError, JobFromBackup
from asrcore.jobs._failure import failure_of
from asrcore.jobs._record import enqueue, follow
from asrcore.jobs._run import Durably, Run
from asrcore.model.protection import Protection
from asrcore.model.watch import Stopped
from asrcore.procedures.procedure import Arguments, Procedure
from asrcore.replication.context import Context
from asrcore.vault import Job, JobState

if TYPE_CHECKING:
    from asrcore.jobs._durable import Durable

__all__ = ["Jobs"]

_log = logging.getLogger(__name__)

LOOK = 0.2  # seconds between looks for new jobs and requests to cancel; `submit` does not wait for it
PROGRESS = 0.25  # seconds between writes of a job's progress
_SAY_SO = 5.0  # seconds that `close` waits for a step before it says what it waits for
_AGAIN = 1.0  # seconds until a job is taken up again that ended here without a record of its end
_RENEW = 60.0  # seconds after which the vault's token is renewed: an earlier copy is recognised by it
_BEGINS = 5.0  # seconds after which a job that has not begun is looked for in the durable log


class Jobs:
    """`procedures` by kind. Only `start` needs the engine lock; the caller holds it until after `close`.

    `server`: the session of the process server whose jobs these are; None: the one engine of the vault.

    One at a time in a process. Safe to use from several threads.
    """

    def __init__(self, context: Context, procedures: Mapping[str, Procedure], server: str | None = None) -> None:
        self._server = server
        self._context = context
        self._vault = context.vault
        self._procedures = procedures
        self._durable: Durable | None = None
        self._looker: threading.Thread | None = None
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._runs: dict[str, Run] = {}
        self._left: dict[str, float] = {}  # jobs that ended here without a record of it, and when
        self._wrote_at = self._renew_at = 0.0
        self._continuous = False  # whether the vault is known not to be an earlier copy
        self._trouble = ""

    # -- any process ---------------------------------------------------------------------------------------------------

    def submit(self, kind: str, protection: Protection, arguments: Arguments | None = None, *, who: str = "") -> Job:
        """Record a job, durable when it returns; it starts at once if this is the engine."""
        job = enqueue(self._vault, kind, protection, arguments or Arguments(), now=self._context.clock(), who=who)
        self._wake.set()
        return job

    def wait(self, job_id: str, on_change: Callable[[Job], None] | None = None, timeout: float | None = None) -> Job:
        """See `follow`."""
        return follow(self._vault, job_id, on_change, timeout, pause=self._pause)

    def _pause(self, seconds: float) -> None:
        """Wait, but not longer than until a job that runs here has ended."""
        with self._changed:
            self._changed.wait(seconds)

    def cancel(self, job_id: str) -> bool:
        """Ask a job to end at its next check; False if it has ended. Raises NotFound."""
        asked = self._vault.request_cancel(job_id)
        self._wake.set()
        return asked

    # -- the engine ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run this vault's jobs; interrupted ones resume. Raises VaultUnavailable."""
        if self._durable is not None:
            return
        if self._server is None and self._vault.engine_holder() is None:
            raise RuntimeError("jobs run only where the vault's engine lock is held")
        from asrcore.jobs._durable import Durable  # noqa: PLC0415 - DBOS takes long to import

        self._ready.clear()
        self._stopping.clear()
        self._left.clear()
        self._durable = Durable(self._vault.jobs_url, self._vault.jobs_unavailable, self._body, self._server)
        try:
            self._continuous = False
            self._begin_incarnation()
            # Places in line are taken before anything runs, so that jobs keep the order they were asked for in.
            interrupted = [self._take(job) for job in reversed(self._vault.my_jobs())]
            self._durable.launch()
            going_on = self._durable.sort_out()
            for run in interrupted:
                if run.job.id not in going_on:
                    self._durable.begin(run.job.id)
        except BaseException:
            self._stopping.set()
            self._shut()
            raise
        finally:
            self._ready.set()
        self._looker = threading.Thread(target=self._look_on, name="asr-jobs", daemon=True)
        self._looker.start()

    def _begin_incarnation(self) -> None:
        """Of a vault that was put back to an earlier copy no job is resumed: it may have ended or been cancelled since.

        The jobs come first: if this is killed, the next engine still sees that the vault was put back. Where it is not
        clear beside other servers, it is looked at again later. Servers that start together all do this: the jobs are
        read before it is judged, so none is among them that was ordered after another server did it.
        """
        active = self._vault.jobs(active=True)
        found = self._vault.was_put_back()
        self._renew_at = time.monotonic() + _RENEW
        if found is None:
            return
        self._continuous = True
        if found:
            with self._changed:
                here = set(self._runs)
            ended = self._leave_to_person([job for job in active if job.id not in here])
            text = "the vault was put back to an earlier copy; every machine is compared with its target first"
            _log.warning("%s; jobs that were not resumed: %s", text, ended)
            vault = self._vault.for_others()
            vault.add_event(at=self._context.clock(), machine="", kind="vault", text=f"{text}; jobs: {ended}")
        self._vault.begin_incarnation(put_back=found)

    def _leave_to_person(self, jobs: Sequence[Job]) -> int:
        vault = self._vault.for_others()  # also jobs of machines that are assigned to servers of the past
        for job in jobs:
            failure = failure_of(JobFromBackup(job=job.id))
            vault.update_job(job.id, state=JobState.FAILED, error=failure, ended_at=self._context.clock())
            reach("jobs.left-to-person")
            vault.add_event(
                at=self._context.clock(),
                machine=job.machine,
                kind="vault",
                text=f"{job.kind} (job {job.id}) was not resumed: the vault was put back to an earlier copy",
            )
        return len(jobs)

    def _watch_vault(self, active: Sequence[Job]) -> Sequence[Job]:
        """The database may have lost its last transactions, in a failover to a standby: jobs that are not at work here
        may have ended since. Returns those that are to be taken up."""
        if time.monotonic() >= self._renew_at:
            if self._continuous:
                self._renew_at = time.monotonic() + _RENEW
                self._vault.begin_incarnation()
            else:
                self._begin_incarnation()
                active = self._vault.my_jobs()
        if not self._vault.lost_transactions():
            return active
        _log.warning("the database has lost its last transactions; every machine is compared with its target first")
        self._vault.begin_incarnation(put_back=True)
        with self._changed:
            here = set(self._runs)
        self._leave_to_person([job for job in active if job.id not in here])
        return [job for job in active if job.id in here]

    def close(self) -> None:
        """Leave running jobs as a kill would leave them: they resume at the next start. A second call does nothing.

        Waits until running steps have stopped, because nothing may work on the vault after its lock is released. Each
        step has time limits; a process that cannot wait for them may simply exit.
        """
        if self._durable is None:
            return
        self._stopping.set()
        self._wake.set()
        if self._looker is not None:
            self._looker.join()
            self._looker = None
        self._shut()

    def _shut(self) -> None:
        runs = list(self._runs.values())
        for run in runs:
            run.stop()
        with self._changed:
            while active := [run for run in self._runs.values() if run.active]:
                if not self._changed.wait(_SAY_SO):
                    waiting = ", ".join(f"{run.job.id} ({run.job.kind}, {run.job.step})" for run in active)
                    _log.warning("waiting for running job steps: %s", waiting)
        for run in runs:
            run.leave()
        self._runs.clear()
        if self._durable is not None:
            self._durable.close()
            self._durable = None

    def _body(self, job_id: str, durably: Durably) -> None:
        self._ready.wait()
        with self._changed:
            if self._stopping.is_set():
                raise Stopped
            run = self._runs.get(job_id)
            if run is None or run.active:
                return  # it ended right before the kill, or belongs to a vault that was here before
            run.active = True
        ended = False
        try:
            run.execute(durably)
            ended = True
        finally:
            with self._changed:
                if not ended:
                    self._left[job_id] = time.monotonic()
                del self._runs[job_id]
                self._changed.notify_all()

    def _look_on(self) -> None:
        while not self._stopping.is_set():
            try:
                self._look()
                self._trouble = ""
            except AsrError as problem:  # the vault's disk is full, say; said once, not ten times a second
                if str(problem) != self._trouble:
                    _log.error("jobs are waiting: %s; %s", problem, problem.action_text)
                self._trouble = str(problem)
            except Exception:  # noqa: BLE001 - the engine keeps running; the next poll may succeed
                _log.exception("looking for jobs failed")
            self._wake.wait(LOOK)
            self._wake.clear()

    def _look(self) -> None:
        if self._durable is None:
            return
        with self._changed:
            # Before the vault is read: a job that ends meanwhile is still in the list, and is no new one.
            running = set(self._runs)
        active = self._watch_vault(self._vault.my_jobs())
        self._let_go(active)
        for job in self._untaken(active, running):
            run = self._take(job)
            reach("jobs.taken")
            try:
                self._durable.begin(job.id)
            except BaseException:
                with self._changed:
                    if not run.active:  # it began where only the answer of the durable log was lost
                        run.leave()
                        self._runs.pop(job.id, None)
                raise
            reach("jobs.begun")
        with self._changed:
            runs = list(self._runs.values())
        self._begin_again([run for run in runs if not run.active])
        for run in runs:
            if self._vault.cancel_requested(run.job.id):
                run.watch.cancel()
        if time.monotonic() - self._wrote_at >= PROGRESS:
            self._wrote_at = time.monotonic()
            for run in runs:
                run.write_progress()

    def _begin_again(self, waiting: Sequence[Run]) -> None:
        """A job keeps its machine from the moment it is taken up: one whose workflow another process has taken or ended
        meanwhile would keep it for ever."""
        now = time.monotonic()
        for run in waiting:
            if now - run.taken_at < _BEGINS or self._durable is None:
                continue
            run.taken_at = now
            if self._durable.elsewhere(run.job.id):
                _log.warning("job %s (%s) did not begin; it is started again", run.job.id, run.job.kind)
                self._durable.begin(run.job.id)

    def _let_go(self, active: Sequence[Job]) -> None:
        """Stop jobs of machines that have moved to another server."""
        mine = {job.id for job in active}
        with self._changed:
            lost = [run for run in self._runs.values() if run.job.id not in mine]
        for run in lost:
            if self._vault.job(run.job.id).state.ended:  # one that has just ended is in no list either
                continue
            run.stop()
            with self._changed:
                if not run.active:  # it never began here
                    run.leave()
                    self._runs.pop(run.job.id, None)

    def _untaken(self, active: Sequence[Job], running: Set[str]) -> list[Job]:
        """Jobs to take up, oldest first: also those that ended here without a record of it, because the vault or the
        durable log did not answer, or because the machine was at another server meanwhile."""
        with self._changed:
            since = time.monotonic() - _AGAIN
            self._left = {job: at for job, at in self._left.items() if at > since}
            waiting = running | set(self._left)
        return [job for job in reversed(active) if job.id not in waiting]

    def _take(self, job: Job) -> Run:
        run = Run(self._context, job, self._procedures.get(job.kind))
        try:
            if self._vault.cancel_requested(job.id):
                run.watch.cancel()
        except BaseException:  # the next look takes the job up again, and must not wait for this one's places in line
            run.leave()
            raise
        with self._changed:
            self._runs[job.id] = run
        return run
