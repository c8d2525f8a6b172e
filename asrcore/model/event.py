"""Values of the events that plug-ins receive: kinds of failover, and jobs that ended."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import attrs

__all__ = ["FailoverKind", "FinishedJob", "Outcome"]


class FailoverKind(Enum):
    """Why a recovery point is turned into a machine."""

    TEST = "test"
    """Isolated and disposable; replication continues."""
    PLANNED = "planned"
    """The source is shut down first: nothing is lost."""
    UNPLANNED = "unplanned"
    """The source is lost, or given up."""


class Outcome(Enum):
    """How a job ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@attrs.frozen
class FinishedJob:
    """A job that ended. `work` is its verb (`failover-planned`), `machine` the name of the machine it worked on,
    "" if on none; times are seconds since the epoch; `error` is `AsrError.as_dict()` of a job that failed."""

    id: str
    work: str
    machine: str
    outcome: Outcome
    started_at: float
    ended_at: float
    error: Mapping[str, object] | None = None
