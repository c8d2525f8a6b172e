"""Failures of jobs as JSON: written by the engine, raised again by whoever follows the job."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping

from asrcore.errors import AsrError, Cancelled, JobFailed, NotAssigned, VaultUnavailable, catalogue
from asrcore.model.watch import Stopped
from asrcore.vault import Job

__all__ = ["Failure", "caught", "error_of", "failure_of", "is_cancelled"]

Failure = dict[str, object]
"""`AsrError.as_dict`, with `attributes` to rebuild the error, and `traceback` if it was a defect."""


def caught(job_id: str, work: Callable[[], Failure | None]) -> Failure | None:
    """The failure that the work returned or raised, or None.

    Raises Stopped if the job has moved to another server, and VaultUnavailable: that is no failure of the work, which
    may be repeated when the vault is back.
    """
    try:
        return work()
    except NotAssigned as error:
        raise Stopped from error  # the job continues at another server
    except VaultUnavailable:
        raise
    except AsrError as error:
        return failure_of(error)
    except Exception as error:  # noqa: BLE001 - a defect ends this job, never the engine
        defect = JobFailed(job=job_id, detail="".join(traceback.format_exception_only(error)).strip())
        return failure_of(defect) | {"traceback": "".join(traceback.format_exception(error))}


def failure_of(error: AsrError) -> Failure:
    """The error as recorded with a job."""
    # Only what the texts show anyway: other attributes may be secret, or not fit for JSON.
    attributes = {name: _plain(error.attributes[name]) for name in sorted(error.fields())}
    return error.as_dict() | {"attributes": attributes}


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str) else str(value)


def is_cancelled(failure: Mapping[str, object]) -> bool:
    """Whether the work was ended on request."""
    return failure.get("code") == Cancelled.code


def error_of(job: Job) -> AsrError | None:
    """The error that ended a job, or None. One of a driver that is not loaded here becomes a JobFailed."""
    recorded = job.error
    if recorded is None:
        return None
    kind = catalogue().get(str(recorded.get("code")))
    attributes = recorded.get("attributes")
    if kind is not None and isinstance(attributes, Mapping):
        try:
            return kind(**attributes)
        except (TypeError, ValueError, LookupError):  # of another version, with other attributes
            pass
    return JobFailed(job=job.id, detail=str(recorded.get("happened", recorded)))
