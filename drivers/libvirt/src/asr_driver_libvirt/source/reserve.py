"""How much space is kept free where scratch files are. The guard needs it too: standard library only."""

from __future__ import annotations

__all__ = ["FLOOR", "least", "limit", "usual"]

# Enough for what a disk takes during a look at a remote host and the end of the job, but no large share of a small file
# system.
_USUAL = 1 << 30
_SHARE = 20
FLOOR = 64 << 20
"""Views are opened down to this where the operator set no reserve: disks with all their space allocated often fill
their file system, and such a machine needs little for its scratch files."""


def usual(configured: int | None, total: int) -> int:
    """The operator's, or one by the file system's size."""
    return min(_USUAL, total // _SHARE) if configured is None else configured


def least(configured: int | None, total: int) -> int:
    """No view is opened with less."""
    return min(FLOOR, usual(None, total)) if configured is None else configured


def limit(reserve: int, least_: int, before: int) -> int:
    """Jobs end with less, given what was free when the first of them began."""
    return min(reserve, max(least_, before)) // 2
