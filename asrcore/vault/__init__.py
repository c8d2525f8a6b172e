"""The vault: all that must outlive a crash, in SQLite (WAL) or PostgreSQL."""

from asrcore.vault._move import move
from asrcore.vault._values import Assigned, Certificate, Changes, CycleStats, Job, JobChanges, JobState, LogEntry
from asrcore.vault._vault import Vault

__all__ = [
    "Assigned",
    "Certificate",
    "Changes",
    "CycleStats",
    "Job",
    "JobChanges",
    "JobState",
    "LogEntry",
    "Vault",
    "move",
]
