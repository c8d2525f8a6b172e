"""Errors of storage in the words of the catalogue."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from asrcore.errors import AsrError, DriverFailed, TargetFull, TargetReadOnly
from asrcore.units import format_size

__all__ = ["missing_space", "storage_error", "storage_errors"]

_LEAST = 1 << 20  # bytes: with less, space is short as well; some file systems make inodes of free space
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def storage_errors(site: str, where: Path, operation: str, wanted: int = 0) -> Iterator[None]:
    """Translate OSError: no space -> TargetFull, not permitted -> TargetReadOnly, others -> DriverFailed.

    `wanted`: bytes that the work needs, for the message.
    """
    try:
        yield
    except AsrError:
        raise
    except OSError as problem:
        raise storage_error(problem, site, where, operation, wanted) from problem


def storage_error(problem: OSError, site: str, where: Path, operation: str, wanted: int = 0) -> AsrError:
    """The catalogue's error for an OSError of storage."""
    if problem.errno in _FULL:
        return TargetFull(where=str(where), detail=missing_space(where, wanted, problem.errno))
    if problem.errno in _FORBIDDEN:
        return TargetReadOnly(where=str(problem.filename or where), detail=f"The system reports: {problem.strerror}.")
    return DriverFailed(operation=operation, site=site, detail=str(problem))


def missing_space(where: Path, wanted: int, reported: int | None = None) -> str:
    """What is missing, for people. `reported`: the system's error number, where it refused a write."""
    try:
        status = os.statvfs(where)
    except OSError:
        return "Its free space cannot be determined."
    if reported == errno.EDQUOT:
        return "The disk quota of the user that asrcore runs as is used up, whatever is free."
    free = status.f_bavail * status.f_frsize
    if status.f_files and not status.f_favail and free > max(wanted, _LEAST):
        return f"All inodes are in use: no further file can be made, though {format_size(free)} are free."
    text = f"{free} bytes ({format_size(free)}) are free"
    if wanted > free:
        text += f", {wanted} are needed: {wanted - free} bytes ({format_size(wanted - free)}) are missing"
    return text + "."
