"""Process servers that share the vault: which are alive, and which of them works on and records each machine. An engine
that has the vault alone is one of them, with the name `engine`.

A handle that has joined works for one session of one server. Each of its transactions that changes a machine or its job
locks the machine's assignment and refuses if that names another session, so a server that was only paused records
nothing once its machines were taken over. The transaction that reassigns a machine also raises its epoch, so the
former server can no longer write to the replica.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence

import attrs
from sqlalchemy import ColumnElement, Connection, delete, exists, func, insert, literal_column, select, text, update

from asrcore.errors import NotAssigned, ServerNameTaken, ServerReplaced, VaultInUse
from asrcore.model.protection import Protection
from asrcore.model.server import AT_TARGET, ENGINE, Placement, Server
from asrcore.vault import _rows, _schema
from asrcore.vault._store import Store, row_of
from asrcore.vault._values import Assigned, JobState

__all__ = ["Planner", "Servers"]

Planner = Callable[[Sequence[Server], Sequence[Placement]], Mapping[str, str]]
"""Gives the changes to make: machine -> session."""

_PLANNING_KEY = 0x41735258  # of PostgreSQL's advisory lock
_ACTIVE = tuple(state.value for state in JobState if not state.ended)


@attrs.frozen
class _Member:
    name: str
    session: str


class Servers(Store):
    """The part of the vault that knows process servers. Times are the database's, so that hosts' clocks may differ."""

    _member: _Member | None = None
    _beat_at: float | None = None
    _went_back = False

    # -- being one ---------------------------------------------------------------------------------------------------

    @property
    def server_name(self) -> str:
        """Of the server that this handle works for; empty if it has not joined as one."""
        return "" if self._member is None else self._member.name

    def join(
        self,
        name: str,
        session: str,
        *,
        host: str,
        sites: Collection[str] | None,
        lease: float,
        version: str = "",
        alone: bool = False,
    ) -> None:
        """Work for a process server from now on. `lease`: seconds of silence after which its machines are given to
        others; `version`: of the software, for people; `alone`: no other server may work on the vault.

        Raises ServerNameTaken while another session of that name is alive, and VaultInUse while the vault is another's
        alone, or (`alone`) while another server is alive.
        """
        table = _schema.servers
        with self._write("join") as connection:
            if connection.dialect.name == "postgresql":  # one at a time: each sees those that joined before
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _PLANNING_KEY})
            for other in self._servers(connection):
                if not other.alive or other.session == session:
                    continue
                if alone or other.name == ENGINE:
                    raise VaultInUse(holder=f"{other.name} on {other.host}, last seen {other.silent:.0f} s ago")
                if other.name == name:
                    raise ServerNameTaken(server=name, host=other.host, seconds=lease)
            connection.execute(delete(table).where(table.c.name == name))
            if alone:
                connection.execute(delete(table))
            now = self._now(connection)
            row = {"name": name, "session": session, "host": host, "lease": lease, "beat_at": now, "version": version}
            row["sites"] = None if sites is None else json.dumps(sorted(sites))
            connection.execute(insert(table).values(row))
        self._member = _Member(name, session)

    def beat(self) -> None:
        """Renew this server's lease, and see whether the former beat is still recorded (`lost_transactions`). Raises
        ServerReplaced when others have taken over its machines."""
        member = self._member
        if member is None:
            raise RuntimeError("this handle has not joined as a process server")
        table = _schema.servers
        with self._write("beat") as connection:
            now = self._now(connection)
            mine = table.c.session == member.session
            former = connection.execute(select(table.c.beat_at).where(mine).with_for_update()).scalar()
            if former is None:
                raise ServerReplaced(server=member.name)
            connection.execute(update(table).where(mine).values(beat_at=now))
        if self._beat_at is not None and former < self._beat_at:
            self._went_back = True
        self._beat_at = now

    def leave(self) -> None:
        """Release all machines: the others take them at once. No work on them may be under way here any more. Nothing
        happens if this handle has not joined."""
        if self._member is None:
            return
        table = _schema.servers
        with self._write("leave") as connection:
            connection.execute(delete(table).where(table.c.session == self._member.session))

    # -- all of them -------------------------------------------------------------------------------------------------

    def servers(self) -> list[Server]:
        """All that are registered, by name."""
        with self._read() as connection:
            return self._servers(connection)

    def _others(self, connection: Connection) -> list[Server]:
        mine = None if self._member is None else self._member.session
        return [server for server in self._servers(connection) if server.session != mine]

    def _servers(self, connection: Connection) -> list[Server]:
        now = self._now(connection)
        rows = connection.execute(select(_schema.servers).order_by(_schema.servers.c.name)).mappings()
        return [self._value(lambda row: _server_of(row, now), row, f"server {row['name']!r}") for row in rows]

    def assigned(self) -> dict[str, str]:
        """Session of the server that works on it, by the machine's id."""
        table = _schema.assignments
        with self._read() as connection:
            return dict(connection.execute(select(table.c.protection_id, table.c.session)).tuples().all())

    def assign(self, plan: Planner, *, spare_silent: bool = False) -> list[Assigned]:
        """Delete the servers that are silent for longer than their lease, and make the changes that `plan` gives, in
        one transaction. A machine that a server had worked on also gets a higher epoch.

        `spare_silent`: those servers and their machines are left as they are. It is for a caller that could not reach
        the vault itself: the others may have been cut off as well.

        Returns the changes that were made: none while another process does the same, and not those of a machine that
        a transaction holds, which may be that of a paused server. They are made by a later call.
        """
        table, protections = _schema.assignments, _schema.protections
        done = []
        with self._write("assign") as connection:
            if connection.dialect.name == "postgresql":
                tried = connection.execute(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _PLANNING_KEY})
                if not tried.scalar():
                    return []
            servers = self._servers(connection)
            names = {server.session: server.name for server in servers}
            gone = {server.session for server in servers if not server.alive}
            placements = self._placements(connection)
            if spare_silent:
                placements = [item for item in placements if item.session not in gone]
            elif gone:
                connection.execute(delete(_schema.servers).where(_schema.servers.c.session.in_(gone)))
            held = {item.machine: item.session for item in placements}
            for machine, session in sorted(plan(servers, placements).items()):
                this = select(protections.c.name, protections.c.epoch).where(protections.c.id == machine)
                found = connection.execute(this.with_for_update(skip_locked=True)).first()
                former = select(table.c.session).where(table.c.protection_id == machine)
                before = connection.execute(former.with_for_update(skip_locked=True)).scalar()
                if found is None or before != held[machine]:
                    continue
                epoch = found.epoch + (before is not None)
                connection.execute(delete(table).where(table.c.protection_id == machine))
                connection.execute(insert(table).values(protection_id=machine, session=session))
                connection.execute(update(protections).where(protections.c.id == machine).values(epoch=epoch))
                done.append(Assigned(machine, found.name, names[session], names.get(before or "", ""), epoch))
        return done

    def _placements(self, connection: Connection) -> list[Placement]:
        machines, table = _schema.protections, _schema.assignments
        pending = select(_schema.pending_cycles.c.protection_id).where(
            _schema.pending_cycles.c.protection_id == machines.c.id
        )
        working = select(_schema.jobs.c.number).where(
            _schema.jobs.c.machine == machines.c.name, _schema.jobs.c.state.in_(_ACTIVE)
        )
        at_target = exists(working.where(_schema.jobs.c.kind.in_(sorted(AT_TARGET))))
        columns = (machines.c.id, machines.c.source_site, machines.c.target_site, table.c.session)
        statement = select(*columns, exists(pending) | exists(working), at_target).select_from(
            machines.outerjoin(table, table.c.protection_id == machines.c.id)
        )
        return [
            Placement(machine, source, target, session, bool(busy), bool(suffices))
            for machine, source, target, session, busy, suffices in connection.execute(statement)
        ]

    def check_assigned(self, protection: Protection) -> None:
        """Before a command that carries no epoch. Raises NotAssigned when the machine has moved to another server."""
        if self._member is not None:
            with self._write("whose a machine is") as connection:
                self._check_mine(connection, protection.id, protection.name)

    # -- this server's machines, for the other parts -----------------------------------------------------------------

    def _mine(self) -> ColumnElement[bool] | None:
        """For statements on `protections`: the machines that this handle works on; None: all."""
        if self._member is None:
            return None
        table = _schema.assignments
        mine = select(table.c.protection_id).where(table.c.session == self._member.session)
        return _schema.protections.c.id.in_(mine)

    def _check_mine(self, connection: Connection, protection_id: str, name: str) -> None:
        """In a transaction that changes a machine. Raises NotAssigned."""
        if self._member is None or not connection.get_execution_options().get("asr_writes"):
            return
        table = _schema.assignments
        held = select(table.c.session).where(table.c.protection_id == protection_id).with_for_update(read=True)
        if connection.execute(held).scalar() != self._member.session:
            raise NotAssigned(machine=name, server=self._member.name)

    def _check_my_job(self, connection: Connection, job_id: str, machine: str) -> None:
        """The same for a job or a line of the log. Any living server may change those of no protected machine."""
        if self._member is None:
            return
        protection = connection.execute(
            select(_schema.protections.c.id).where(_schema.protections.c.name == machine)
        ).scalar()
        if protection is not None:
            self._check_mine(connection, protection, machine)
        elif row_of(connection, _schema.servers, session=self._member.session) is None:
            raise NotAssigned(machine=machine or job_id, server=self._member.name)

    def _leads(self, connection: Connection) -> bool:
        """Whether this is the server that does work without an assigned machine: the first one by its session."""
        first = connection.execute(select(func.min(_schema.servers.c.session))).scalar()
        return self._member is not None and first == self._member.session

    def _now(self, connection: Connection) -> float:
        if connection.dialect.name == "postgresql":
            clock = "extract(epoch from clock_timestamp())"
        else:
            clock = "(julianday('now') - 2440587.5) * 86400.0"
        return float(connection.execute(select(literal_column(clock))).scalar_one())


def _server_of(row: _rows.Row, now: float) -> Server:
    sites = None if row["sites"] is None else frozenset(map(str, json.loads(row["sites"])))
    silent = max(0.0, now - row["beat_at"])
    return Server(row["name"], row["session"], row["host"], sites, silent <= row["lease"], silent, row["version"] or "")
