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
from asrcore.procedures.procedure import Work
from asrcore.replication import retry
from asrcore.replication.context import Context

__all__ = ["recorded", "recorded_failure"]

_log = logging.getLogger(__name__)


@contextmanager
def recorded_failure(context: Context, protection_id: str, *, of_a_job: bool = True) -> Iterator[None]:
    """Record an error of the block with the machine and raise it again; success is recorded by the point itself.

    Lost tracking is a state, not an error to retry, and a machine that moved to another server is handled there. A
    vault that did not answer says nothing about the machine: its work continues as soon as the vault is back. A job
    is cancelled by a person and then not retried automatically; a cycle of the service (`of_a_job` False) is cancelled
    by a job that takes over, which is no failure.
    """
    try:
        yield
    except (TrackingLost, NotAssigned, VaultUnavailable):
        raise
    except Cancelled:
        if of_a_job:
            _record(context, protection_id, Cancelled(work="replication"))
        raise
    except Exception as error:
        _record(context, protection_id, error)
        raise


def recorded(run: Callable[[Work], None]) -> Callable[[Work], None]:
    """A step of a job whose failure is recorded with the machine: the service retries it as it retries cycles."""

    @functools.wraps(run)
    def step(work: Work) -> None:
        with recorded_failure(work.context, work.protection_id):
            run(work)

    return step


def _record(context: Context, protection_id: str, error: Exception) -> None:
    known = error if isinstance(error, AsrError) else JobFailed(job=protection_id, detail=repr(error))
    try:
        protection = context.vault.protection(protection_id)
        if isinstance(error, StaleEpoch) and error.attributes["epoch"] != protection.epoch:
            return  # the work was overtaken by a failover or by another server, which is no failure of the machine
        decision = retry.decide(error, protection.attempt)
        retry_at = decision.at(context.clock())
        context.vault.update(protection_id, error=known.as_dict(), attempt=decision.attempt, retry_at=retry_at)
    except (NotFound, NotAssigned):
        pass  # unprotected meanwhile, or another server has taken over
    except AsrError as problem:
        _log.error("a failure could not be recorded: %s", problem)
