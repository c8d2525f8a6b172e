"""The vault: everything that must survive a crash, in SQLite (WAL) or PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asrcore.vault._values import (
    Assigned,
    Certificate,
    Changes,
    ClockAnchor,
    ClockDoubt,
    ClockState,
    CycleStats,
    Job,
    JobChanges,
    JobState,
    LogEntry,
)

if TYPE_CHECKING:
    from asrcore.vault._lock_server import SessionLock
    from asrcore.vault._move import move
    from asrcore.vault._status_reader import NeedsEngine, StatusReader
    from asrcore.vault._vault import Vault

__all__ = [
    "Assigned",
    "Certificate",
    "Changes",
    "ClockAnchor",
    "ClockDoubt",
    "ClockState",
    "CycleStats",
    "Job",
    "JobChanges",
    "JobState",
    "LogEntry",
    "NeedsEngine",
    "SessionLock",
    "StatusReader",
    "Vault",
    "move",
]


_PLACES = {
    "NeedsEngine": "_status_reader",
    "SessionLock": "_lock_server",
    "StatusReader": "_status_reader",
    "Vault": "_vault",
    "move": "_move",
}


def __getattr__(name: str) -> object:
    """Import these when they are first used: `Vault` imports SQLAlchemy, which takes most of a short command's time."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    value: object = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
