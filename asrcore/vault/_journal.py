"""Jobs, and the log of what happened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Unpack

import attrs
from sqlalchemy import ColumnElement, Connection, Table, delete, func, insert, select, update

from asrcore.errors import AmbiguousName, MachineBusy, NotFound
from asrcore.units import DAY
from asrcore.vault import _rows, _schema
from asrcore.vault._clock import clock_in_doubt
from asrcore.vault._servers import Servers
from asrcore.vault._store import row_of
from asrcore.vault._values import Job, JobChanges, JobState, LogEntry

__all__ = ["JOBS", "LOG_ENTRIES", "TRIM_AGE", "Journal"]

TRIM_AGE = 90 * DAY
"""Older entries are deleted: a quarter of a year, after which a test failover is due again as well."""
LOG_ENTRIES = 1000
"""Entries per machine that the log keeps at most; cycles are not logged, so this covers years of a quiet machine."""
JOBS = 200
"""Ended jobs per machine that are kept at most."""

_AGED_AT_ONCE = 10
"""Rows that are deleted for their age with each new one: a clock that is far ahead for a moment costs no more."""

_ACTIVE = tuple(state.value for state in JobState if not state.ended)
_CHANGEABLE = frozenset(JobChanges.__annotations__)


class Journal(Servers):
    """The part of the vault that knows jobs and the log."""

    # -- jobs ------------------------------------------------------------------------------------------------------

    def add_job(self, job: Job, *, exclusive: bool = False) -> Job:
        """Record a job; returns it as recorded. The same id again changes nothing.

        Ended jobs that are older than 90 days, or not among the newest 200 of the machine, are deleted with it.

        `exclusive`: raises MachineBusy while another job of the same machine has not ended, checked in the same
        transaction, so that of two simultaneous requests one is refused.
        """
        table = _schema.jobs
        with self._write("add-job") as connection:
            known = row_of(connection, table, id=job.id)
            if known is not None:
                return self._job(known)
            if exclusive and job.machine:
                row_of(connection, _schema.protections, name=job.machine)  # its lock keeps others out on PostgreSQL
                same = (table.c.machine == job.machine, table.c.state.in_(_ACTIVE))
                busy = connection.execute(select(table.c.kind, table.c.id).where(*same)).first()
                if busy is not None:
                    raise MachineBusy(machine=job.machine, work=f"{busy.kind} (job {busy.id})")
            connection.execute(insert(table).values(cancel_requested=False, **_rows.job_row(job)))
            _trim(connection, table, job.machine, JOBS, table.c.created_at < job.created_at - TRIM_AGE, _ended(table))
        return job

    def update_job(self, job_id: str, **changes: Unpack[JobChanges]) -> Job:
        """Change fields of a job. Raises NotFound, TypeError for other fields."""
        refused = sorted(set(changes) - _CHANGEABLE)
        if refused:
            raise TypeError(f"{', '.join(refused)} of a job never change")
        table = _schema.jobs
        with self._write("update-job") as connection:
            known = row_of(connection, table, id=job_id)
            if known is None:
                raise _no_job(job_id)
            job = attrs.evolve(self._job(known), **changes)
            self._check_my_job(connection, job.id, job.machine)
            row = _rows.job_row(job)
            if changes:
                values = {name: row[name] for name in changes}
                connection.execute(update(table).where(table.c.id == job_id).values(values))
        return job

    def job(self, id_or_prefix: str) -> Job:
        """By id, or by the beginning of one. Raises NotFound, AmbiguousName."""
        table = _schema.jobs
        with self._read() as connection:
            rows = [known] if (known := row_of(connection, table, id=id_or_prefix)) else []
            if not rows and id_or_prefix:
                begins = func.substr(table.c.id, 1, len(id_or_prefix)) == id_or_prefix
                rows = list(connection.execute(select(table).where(begins).limit(5)).mappings())
        if not rows:
            raise _no_job(id_or_prefix)
        if len(rows) > 1:
            raise AmbiguousName(kind="job", name=id_or_prefix, matches=", ".join(row["id"] for row in rows))
        return self._job(rows[0])

    def jobs(self, limit: int | None = None, *, machine: str | None = None, active: bool = False) -> list[Job]:
        """Newest first; of one machine, or only those that have not ended."""
        table = _schema.jobs
        statement = select(table).order_by(table.c.number.desc()).limit(limit)
        if machine is not None:
            statement = statement.where(table.c.machine == machine)
        if active:
            statement = statement.where(table.c.state.in_(_ACTIVE))
        with self._read() as connection:
            rows = connection.execute(statement).mappings().all()
        return [self._job(row) for row in rows]

    def last_ended(self, kind: str) -> dict[str, dict[JobState, float]]:
        """By machine and result: when the newest job of this kind ended. The newest is the one recorded last: an older
        one may claim a later time, if the clock was wrong then."""
        table = _schema.jobs
        newest = select(func.max(table.c.number)).where(table.c.kind == kind, table.c.ended_at.is_not(None))
        newest = newest.group_by(table.c.machine, table.c.state)
        statement = select(table.c.machine, table.c.state, table.c.ended_at).where(table.c.number.in_(newest))
        found: dict[str, dict[JobState, float]] = {}
        with self._read() as connection:
            for row in connection.execute(statement).mappings():
                found.setdefault(row["machine"], {})[JobState(row["state"])] = row["ended_at"]
        return found

    def my_jobs(self) -> list[Job]:
        """Jobs that have not ended and that this handle has to run, newest first: all, or those of a process server's
        machines. Jobs whose machine is no longer protected belong to one of the servers."""
        mine = self._mine()
        if mine is None:
            return self.jobs(active=True)
        table, machines = _schema.jobs, _schema.protections
        of_mine = table.c.machine.in_(select(machines.c.name).where(mine))
        of_nobody = table.c.machine.not_in(select(machines.c.name))
        with self._read() as connection:
            which = of_mine | of_nobody if self._leads(connection) else of_mine
            statement = select(table).where(table.c.state.in_(_ACTIVE), which).order_by(table.c.number.desc())
            rows = connection.execute(statement).mappings().all()
        return [self._job(row) for row in rows]

    def request_cancel(self, job_id: str) -> bool:
        """Ask a job to end at its next step; False if it has ended already. Raises NotFound."""
        table = _schema.jobs
        with self._write("request-cancel") as connection:
            known = row_of(connection, table, id=job_id)
            if known is None:
                raise _no_job(job_id)
            if self._job(known).state.ended:
                return False
            connection.execute(update(table).where(table.c.id == job_id).values(cancel_requested=True))
        return True

    def cancel_requested(self, job_id: str) -> bool:
        """Whether cancellation was requested. Raises NotFound."""
        with self._read() as connection:
            known = row_of(connection, _schema.jobs, id=job_id)
        if known is None:
            raise _no_job(job_id)
        return bool(known["cancel_requested"])

    def _job(self, row: _rows.Row) -> Job:
        return self._value(_rows.job_of, row, f"job {row['id']}")

    # -- the log ---------------------------------------------------------------------------------------------------

    def add_event(
        self, at: float, machine: str, kind: str, text: str, data: Mapping[str, object] | None = None
    ) -> None:
        """Append to the log. `data`: details for programs, as JSON. Raises NotAssigned as `update_job` does.

        Entries that are older than 90 days, or not among the newest 1,000 of the machine, are deleted with it.
        """
        table = _schema.events
        row = {"at": at, "machine": machine, "kind": kind, "text": text, "data": _rows.entry_data(data or {})}
        with self._write("add-event") as connection:
            self._check_my_job(connection, "the log", machine)
            connection.execute(insert(table).values(row))
            _trim(connection, table, machine, LOG_ENTRIES, table.c.at < at - TRIM_AGE)

    def events(
        self,
        *,
        machine: str | None = None,
        kinds: Iterable[str] | None = None,
        since: float | None = None,
        limit: int | None = None,
    ) -> list[LogEntry]:
        """The newest `limit` entries that match, oldest first."""
        table = _schema.events
        statement = select(table).order_by(table.c.number.desc()).limit(limit)
        if machine is not None:
            statement = statement.where(table.c.machine == machine)
        if kinds is not None:
            statement = statement.where(table.c.kind.in_(list(kinds)))
        if since is not None:
            statement = statement.where(table.c.at >= since)
        with self._read() as connection:
            rows = connection.execute(statement).mappings().all()
        return [self._value(_rows.entry_of, row, f"log entry {row['number']}") for row in reversed(rows)]


def _ended(table: Table) -> ColumnElement[bool]:
    return table.c.state.not_in(_ACTIVE)


def _trim(
    connection: Connection,
    table: Table,
    machine: str,
    most: int,
    aged: ColumnElement[bool],
    *which: ColumnElement[bool],
) -> None:
    """Delete the machine's rows beyond the limit, and rows of any machine that are too old."""
    its = (table.c.machine == machine, *which)
    surplus = select(table.c.number).where(*its).order_by(table.c.number.desc()).offset(most).limit(1)
    connection.execute(delete(table).where(*its, table.c.number <= surplus.scalar_subquery()))
    # By age only from the old end, so that no more than a few rows are looked at, and deleted, each time.
    if not clock_in_doubt(connection):
        oldest = select(table.c.number).order_by(table.c.number).limit(_AGED_AT_ONCE)
        connection.execute(delete(table).where(table.c.number.in_(oldest), aged, *which))


def _no_job(job_id: str) -> NotFound:
    return NotFound(kind="job", name=job_id, listing="asr job list")
