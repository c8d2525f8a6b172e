"""One job in the process that runs it: its locks, steps, progress and end. Knows nothing of DBOS.

The vault's record is what people see; the durable log says which steps are done. Each step writes its facts to the
vault before it is logged as done. After a kill between the two the step is run again, which every step allows.

A vault that does not answer is like a kill: the step is not logged, and it is run again when the vault is back. The job
keeps its machine meanwhile, so that no other job comes before it.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeVar, Unpack

from asrcore.crashpoint import reach
from asrcore.errors import JobFailed, NotAssigned, NotFound, VaultUnavailable
from asrcore.jobs._failure import Failure, caught, is_cancelled
from asrcore.jobs._record import Order, requested_by
from asrcore.logline import report
from asrcore.model.event import FinishedJob, Outcome
from asrcore.model.protection import Protection
from asrcore.model.watch import Stopped, Watch
from asrcore.procedures.procedure import Holds, Procedure, Step, Work
from asrcore.replication.context import Context
from asrcore.replication.locks import Lock, Turn
from asrcore.vault import Job, JobChanges, JobState

__all__ = ["Durably", "Run"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

Durably = Callable[[str, Callable[[], Failure | None]], Failure | None]
"""Runs a named step, or returns what it returned if it was done before the engine was killed."""

# The order is the same for all jobs, so that no two wait for each other.
_LOCKS = {
    Holds.MACHINE: (Lock.TESTS, Lock.REPLICATION),
    Holds.REPLICATION: (Lock.REPLICATION,),
    Holds.TEST: (Lock.TESTS,),
}
_RETRY = 1.0  # seconds between attempts to use a vault that does not answer, or whose disk is full
_OUTCOMES = {
    JobState.DONE: Outcome.SUCCEEDED,
    JobState.FAILED: Outcome.FAILED,
    JobState.CANCELLED: Outcome.CANCELLED,
}


class Run:
    """A job that this engine took up. Places in the machine's lines are taken here, so that jobs keep their order."""

    def __init__(self, context: Context, job: Job, procedure: Procedure | None) -> None:
        self.job = job
        self.active = False
        self.taken_at = time.monotonic()
        self.watch = Watch(self._report)
        self._context = context
        self._vault = context.vault
        self._procedure = procedure
        self._stopped = threading.Event()
        self._writing = threading.Lock()
        self._progress = ("", 0, 0)
        self._written = self._progress
        self._begun = False
        self._work: Work | None = None
        self._turns: Sequence[Turn] = ()
        self._trouble = ""
        self._problem: Failure | None = caught(job.id, self._prepare)

    def _prepare(self) -> None:
        job, procedure = self.job, self._procedure
        if procedure is None:
            raise JobFailed(job=job.id, detail=f"this engine knows no jobs of kind {job.kind!r}")
        order = Order.of(job)
        try:
            protection = self._vault.protection(order.protection_id)
        except NotFound:
            # The last step of ending protection removes the record; killed right after it, there is nothing left to do.
            if job.state is JobState.RUNNING and job.step == procedure.steps[-1].name:
                return
            raise NotFound(kind="machine", name=job.machine, listing="asr status") from None
        facts: dict[str, object] = json.loads(job.result) if job.result else {}
        self._work = Work(self._context, job.id, protection.id, order.arguments, self.watch, facts, self._save_facts)
        self._turns = self._line_up(procedure, protection)

    def _line_up(self, procedure: Procedure, protection: Protection) -> Sequence[Turn]:
        line_up = partial(self._context.locks.line_up, protection, procedure.kind, self.watch)
        return [line_up(lock=lock, preempt=procedure.preempts) for lock in _LOCKS[procedure.holds]]

    # -- from outside ------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """The engine ends, or the job has moved to another server, where it resumes: leave it as a kill would."""
        self._stopped.set()
        self.watch.stop()

    def leave(self) -> None:
        """Give up the places in line."""
        for turn in self._turns:
            turn.leave()

    def write_progress(self) -> None:
        """Write the progress down if there is any since the last call. Raises VaultUnavailable."""
        with self._writing:
            if self._progress != self._written and not self._stopped.is_set():
                self._written = work, done, total = self._progress
                changes = JobChanges(progress_work=work, progress_done=done, progress_total=total)
                if not self._begun:  # it still waits for the machine, and the work says for what
                    changes["step"] = work
                with suppress(NotAssigned):  # the next look finds that out, too
                    self._vault.update_job(self.job.id, **changes)

    def _report(self, work: str, done: int, total: int) -> None:
        self._progress = (work, done, total)  # written by the engine's thread: copying never waits for the vault

    # -- running -----------------------------------------------------------------------------------------------------

    def execute(self, durably: Durably) -> None:
        """Run the job to its end. Raises Stopped when the engine ends before it."""
        try:
            with ExitStack() as stack:
                failure = self._problem or caught(self.job.id, partial(self._all_steps, durably, stack))
                self._record_end(failure)
        except VaultUnavailable as problem:  # of the durable log: the engine takes the job up again
            self._log("job interrupted")
            raise Stopped from problem
        except Stopped:
            self._log("job interrupted")
            raise
        finally:
            self.leave()
        self._log("job ended")
        self._tell()

    def _log(self, event: str) -> None:
        job, error = self.job, self.job.error or {}
        report(
            _log,
            logging.INFO,
            event,
            machine=job.machine,
            job=job.id,
            kind=job.kind,
            who=requested_by(job),
            state=job.state.value,
            step=None if job.state is JobState.DONE else job.step,
            seconds=None if job.ended_at is None or job.started_at is None else job.ended_at - job.started_at,
            error=error.get("code"),
            happened=error.get("happened"),
        )

    def _all_steps(self, durably: Durably, held: ExitStack) -> Failure | None:
        work, procedure = self._work, self._procedure
        if work is None or procedure is None:
            return None
        for turn in self._turns:
            held.enter_context(turn.hold(math.inf))
        with self._writing:
            self._begun = True
        resumed = self.job.started_at is not None
        started = self.job.started_at if resumed else self._context.clock()
        self._when_vault_answers(lambda: self._update(state=JobState.RUNNING, started_at=started))
        self._log("job resumed" if resumed else "job started")
        for step in procedure.steps:
            failure = durably(step.name, partial(self._step, step, work))
            reach(f"job.{procedure.kind}.{step.name}.logged")
            if failure is not None:
                return failure
        return None

    def _step(self, step: Step, work: Work) -> Failure | None:
        def run() -> None:
            if not step.checks_itself:
                self.watch.check()
            self.watch.start(step.name, 0)
            self._update(step=step.name, progress_work=step.name, progress_done=0, progress_total=0)
            reach(f"job.{self.job.kind}.{step.name}.begun")
            step.run(work)

        failure = self._when_vault_answers(lambda: caught(self.job.id, run))
        # What a failed step found out is kept too: a verification says what differs, and then fails.
        unrecorded = self._when_vault_answers(lambda: caught(self.job.id, self._save_facts))
        reach(f"job.{self.job.kind}.{step.name}.done")
        return failure or unrecorded

    def _save_facts(self) -> None:
        if self._work is not None:
            self._update(result=json.dumps(self._work.facts, default=str))

    def _update(self, **changes: Unpack[JobChanges]) -> None:
        with self._writing:
            try:
                self.job = self._vault.update_job(self.job.id, **changes)
            except NotAssigned as problem:
                raise Stopped from problem  # the job continues at another server

    def _when_vault_answers(self, work: Callable[[], T]) -> T:
        """Do the work, again and again while the vault does not answer. Raises Stopped when the engine ends."""
        while True:
            try:
                done = work()
            except VaultUnavailable as problem:
                self._wait_for_vault(problem)
            else:
                self._trouble = ""
                return done

    def _wait_for_vault(self, problem: Exception) -> None:
        if str(problem) != self._trouble:  # logged once, not every second
            _log.error("job %s (%s) waits for the vault: %s", self.job.id, self.job.kind, problem)
        self._trouble = str(problem)
        if self._stopped.wait(_RETRY):
            raise Stopped from problem

    def _record_end(self, failure: Failure | None) -> None:
        state = JobState.DONE
        if failure is not None:
            state = JobState.CANCELLED if is_cancelled(failure) else JobState.FAILED
        while True:
            work, done, total = self._progress
            try:
                self._update(
                    state=state,
                    error=failure,
                    ended_at=self._context.clock(),
                    progress_work=work,
                    progress_done=done,
                    progress_total=total,
                )
            except NotFound as problem:  # its record was deleted: there is nothing left to end
                raise Stopped from problem
            except Exception as problem:  # noqa: BLE001 - a job that stays `running` would keep its machine for ever
                self._wait_for_vault(problem)
            else:
                break
        self._written = self._progress
        reach(f"job.{self.job.kind}.ended")

    def _tell(self) -> None:
        job = self.job
        ended = job.ended_at or self._context.clock()
        finished = FinishedJob(
            id=job.id,
            work=job.kind,
            machine=job.machine,
            outcome=_OUTCOMES[job.state],
            started_at=ended if job.started_at is None else job.started_at,
            ended_at=ended,
            error=job.error,
        )
        self._context.plugins.job_finished(finished)
