"""What `asr status` shows, read from a vault's file by plain SQL (see docs/decisions/0050-status-at-a-glance.md).

Only the plain case is handled here: a file of the current version whose rows are valid. Everything else raises
`NeedsEngine`; then use `Vault`, which handles all cases and reports their errors.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from asrcore.errors import AsrError
from asrcore.model.point import RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection
from asrcore.model.server import Server
from asrcore.vault import _rows
from asrcore.vault._lock import UseLock, holder_of_file
from asrcore.vault._values import ClockState, CycleStats, Job, JobState
from asrcore.vault._versions import APPLICATION_ID, HEADER_SIZE, REVISIONS, VERSION_TABLE, application_id

__all__ = ["NeedsEngine", "StatusReader"]

_SECONDS = 5.0


class NeedsEngine(Exception):
    """Use `Vault` instead; the message gives the reason, for debugging."""


class StatusReader:
    """One state of a SQLite vault: its methods are those of `Vault`, and read the same."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """Use `open` instead."""
        self._connection = connection
        self._path = path

    @classmethod
    @contextmanager
    def open(cls, url_or_path: str | os.PathLike[str]) -> Iterator[Self]:
        """For the block. Raises NeedsEngine, in the block also where a row cannot be read.

        Not for a process that works on the vault: to read the file's header drops SQLite's locks of it (POSIX).
        """
        text = os.fspath(url_or_path)
        if "://" in text:
            raise NeedsEngine("a URL")
        try:
            path = Path(os.path.realpath(Path(text).expanduser()))
            if not path.is_file():
                raise NeedsEngine("no file")
            with path.open("rb") as file:  # before SQLite touches it, or a lock is made beside it
                if application_id(file.read(HEADER_SIZE)) != APPLICATION_ID:
                    raise NeedsEngine("no vault")
            use = UseLock(path.with_name(path.name + ".users"))
            try:
                # Not read-only: closing the last connection writes the journal back into the file.
                url = f"file:{quote(str(path))}?mode=rw"
                with closing(sqlite3.connect(url, timeout=_SECONDS, uri=True, isolation_level=None)) as connection:
                    connection.row_factory = _as_mapping
                    connection.execute("BEGIN").close()
                    _check(connection)
                    yield cls(connection, path)
            finally:
                use.close()
        except (sqlite3.Error, OSError, RuntimeError, ValueError, KeyError, TypeError, AsrError) as problem:
            raise NeedsEngine(str(problem)) from problem

    def _rows(self, statement: str, *values: object) -> list[dict[str, Any]]:
        return self._connection.execute(statement, values).fetchall()

    def policies(self) -> list[Policy]:
        """All, by name."""
        return [_rows.policy_of(row) for row in self._rows("SELECT * FROM policies ORDER BY name")]

    def protections(self) -> list[Protection]:
        """All, by name."""
        pending = {
            row["protection_id"]: _rows.pending_of(row, ValueError)
            for row in self._rows("SELECT * FROM pending_cycles")
        }
        rows = self._rows("SELECT * FROM protections ORDER BY name")
        return [_rows.protection_of(_with_truth(row, "planned", "fence_due"), pending.get(row["id"])) for row in rows]

    def jobs(self, limit: int, *, active: bool) -> list[Job]:
        """Newest first; `active`: only those that have not ended."""
        states = [state.value for state in JobState if not (active and state.ended)]
        marks = ", ".join("?" * len(states))
        rows = self._rows(f"SELECT * FROM jobs WHERE state IN ({marks}) ORDER BY number DESC LIMIT ?", *states, limit)
        return [_rows.job_of(row) for row in rows]

    def heads(self) -> dict[str, RecoveryPoint]:
        """The newest point of each machine that has one, by the machine's id."""
        rows = self._rows(
            "SELECT points.* FROM protections"
            " JOIN points ON points.protection_id = protections.id AND points.id = protections.head_point"
        )
        return {row["protection_id"]: _rows.point_of(_with_truth(row, "kept", "pinned")) for row in rows}

    def clock_state(self) -> ClockState:
        """The newest doubt about the clock of the engine's host, or that it was accepted."""
        rows = self._rows(
            "SELECT * FROM events WHERE machine = '' AND kind IN (?, ?) ORDER BY number DESC LIMIT 1",
            _rows.CLOCK_DOUBTED,
            _rows.CLOCK_ACCEPTED,
        )
        return _rows.clock_state_of(rows[0]) if rows else ClockState()

    def heads_until(self, number: int) -> set[str]:
        """Ids of the machines whose newest point is not newer than the point of that number."""
        rows = self._rows(
            "SELECT protection_id FROM protections JOIN points ON points.protection_id = protections.id"
            " AND points.id = protections.head_point WHERE points.number <= ?",
            number,
        )
        return {row["protection_id"] for row in rows}

    def point_counts(self) -> dict[str, int]:
        """How many points each machine has, by the machine's id; those that are being deleted do not count."""
        rows = self._rows(
            "SELECT protection_id, count(*) AS number FROM points WHERE NOT dropping GROUP BY protection_id"
        )
        return {row["protection_id"]: row["number"] for row in rows}

    def damaged_counts(self) -> dict[str, int]:
        """How many points of each machine are damaged, by the machine's id; machines without any are left out."""
        rows = self._rows(
            "SELECT protection_id, count(*) AS number FROM points WHERE NOT dropping AND damaged != ''"
            " GROUP BY protection_id"
        )
        return {row["protection_id"]: row["number"] for row in rows}

    def last_cycles(self) -> dict[str, CycleStats]:
        """Statistics of each machine's newest cycle, by the machine's id."""
        rows = self._rows(
            "SELECT cycles.* FROM protections JOIN cycles ON cycles.protection_id = protections.id AND cycles.number ="
            " (SELECT max(number) FROM cycles AS newest WHERE newest.protection_id = protections.id)"
        )
        return {row["protection_id"]: _rows.cycle_of(row) for row in rows}

    def last_ended(self, kind: str) -> dict[str, dict[JobState, float]]:
        """By machine and result: when the newest job of this kind ended."""
        found: dict[str, dict[JobState, float]] = {}
        for row in self._rows(
            "SELECT machine, state, ended_at FROM jobs WHERE number IN"
            " (SELECT max(number) FROM jobs WHERE kind = ? AND ended_at IS NOT NULL GROUP BY machine, state)",
            kind,
        ):
            found.setdefault(row["machine"], {})[JobState(row["state"])] = row["ended_at"]
        return found

    def servers(self) -> list[Server]:
        """None: several share a vault on a database server only. Raises NeedsEngine where some are recorded."""
        if self._rows("SELECT 1 FROM servers LIMIT 1"):
            raise NeedsEngine("process servers are recorded")
        return []

    def engine_holder(self) -> str | None:
        """The engine that works on this vault, as it describes itself; None if there is none."""
        return holder_of_file(self._path.with_name(self._path.name + ".lock"))


def _check(connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA application_id").fetchall() != [{"application_id": APPLICATION_ID}]:
        raise NeedsEngine("no vault")  # the file was replaced since its header was read
    versions = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall()
    if versions != [{"version_num": REVISIONS[-1]}]:
        raise NeedsEngine("another version")


def _as_mapping(cursor: sqlite3.Cursor, values: tuple[Any, ...]) -> dict[str, Any]:
    return {column[0]: value for column, value in zip(cursor.description, values, strict=True)}


def _with_truth(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """SQLite stores booleans as numbers."""
    return {**row, **{name: bool(row[name]) for name in names}}
