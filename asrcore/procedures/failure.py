"""What happens to a failed cycle: it is recorded with the machine, and retried (W6 in
docs/reference/site-recovery-map.md)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from asrcore.errors import (
    AsrError,
    Cancelled,
    JobFailed,
    NotAssigned,
    NotFound,
    StaleEpoch,
    TrackingLost,
    VaultUnavailable,
)
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.procedures.procedure import Work
from asrcore.replication import retry
from asrcore.replication.context import Context
from asrcore.vault import Changes

__all__ = ["recorded", "recorded_failure", "retried_if_passing", "tried_again"]

_log = logging.getLogger(__name__)


@contextmanager
def recorded_failure(
    context: Context, protection_id: str, *, of_a_job: bool = True, passing_only: bool = False
) -> Iterator[None]:
    """Record an error of the block with the machine and raise it again; success is recorded by the point itself.

    Lost tracking is a state, not an error to retry, and a machine that moved to another server is handled there. A
    vault that did not answer says nothing about the machine: its work continues as soon as the vault is back. A job
    is cancelled by a person and then not retried automatically; a cycle of the service (`of_a_job` False) is cancelled
    by a job that takes over, which is no failure. `passing_only`: what time alone does not repair is not retried.
    """
    try:
        yield
    except (TrackingLost, NotAssigned, VaultUnavailable):
        raise
    except Cancelled:
        if of_a_job:
            _record(context, protection_id, Cancelled(work="replication"), passing_only=passing_only)
        raise
    except Exception as error:
        _record(context, protection_id, error, passing_only=passing_only)
        raise


def recorded(run: Callable[[Work], None]) -> Callable[[Work], None]:
    """A step of a job whose failure is recorded with the machine: the service retries it as it retries cycles."""

    @functools.wraps(run)
    def step(work: Work) -> None:
        with recorded_failure(work.context, work.protection_id):
            run(work)

    return step


def retried_if_passing(run: Callable[[Work], None]) -> Callable[[Work], None]:
    """A step after which the machine is in a state that only this kind of job leaves. The service retries the job where
    the failure may pass; any other failure waits for a person, who is shown it."""

    @functools.wraps(run)
    def step(work: Work) -> None:
        with recorded_failure(work.context, work.protection_id, passing_only=True):
            run(work)

    return step


def tried_again(protection: Protection, state: State) -> Changes:
    """What a job records that brings the machine into this state: failures of other work do not count. While the job
    works, and if it is cancelled, it is not retried."""
    return Changes(error=None, retry_at=None, attempt=protection.attempt if protection.state is state else 0)


def _record(context: Context, protection_id: str, error: Exception, *, passing_only: bool) -> None:
    known = error if isinstance(error, AsrError) else JobFailed(job=protection_id, detail=repr(error))
    try:
        protection = context.vault.protection(protection_id)
        if isinstance(error, StaleEpoch) and error.attributes["epoch"] != protection.epoch:
            return  # the work was overtaken by a failover or by another server, which is no failure of the machine
        decision = retry.decide(error, protection.attempt)
        waits = passing_only and isinstance(error, AsrError) and not error.retry
        retry_at = None if waits else decision.at(context.clock())
        context.vault.update(protection_id, error=known.as_dict(), attempt=decision.attempt, retry_at=retry_at)
    except (NotFound, NotAssigned):
        pass  # unprotected meanwhile, or another server has taken over
    except AsrError as problem:
        _log.error("a failure could not be recorded: %s", problem)
