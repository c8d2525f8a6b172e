"""The vault: all that must outlive a crash, in SQLite (WAL) or PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asrcore.vault._values import Assigned, Certificate, Changes, CycleStats, Job, JobChanges, JobState, LogEntry

if TYPE_CHECKING:
    from asrcore.vault._glance import Glance, NotAtAGlance
    from asrcore.vault._move import move
    from asrcore.vault._vault import Vault

__all__ = [
    "Assigned",
    "Certificate",
    "Changes",
    "CycleStats",
    "Glance",
    "Job",
    "JobChanges",
    "JobState",
    "LogEntry",
    "NotAtAGlance",
    "Vault",
    "move",
]


def __getattr__(name: str) -> Any:
    """`Vault` and `move` bring SQLAlchemy, whose import takes most of the time of a short command."""
    if name in ("Glance", "NotAtAGlance"):
        from asrcore.vault import _glance  # noqa: PLC0415

        return getattr(_glance, name)
    if name == "Vault":
        from asrcore.vault._vault import Vault  # noqa: PLC0415

        return Vault
    if name == "move":
        from asrcore.vault._move import move  # noqa: PLC0415

        return move
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
