"""Whether the vault is the one that the last engine left, or an earlier copy that was put back.

Its token is renewed by each engine that starts and once a minute. Outside of what a backup restores, the token is kept
a second time:

- Of a file, in a small file beside it: the present token, and while it is renewed the next one. They are durable
  before the vault's own record, so a kill or a power cut between the two is no mismatch.
- On PostgreSQL, the record says which database it was written in (cluster, timeline, number of the database) and by
  which transaction. A restored dump is written by another transaction, a promoted standby has another timeline.

A copy of the whole host, files beside the vault included, is not recognised here: there the targets are asked
(`replication.agreement`), as they always are.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from sqlalchemy import Connection, insert, literal_column, select, text, update
from sqlalchemy.exc import DBAPIError

from asrcore.crashpoint import reach
from asrcore.files import write_private
from asrcore.vault import _schema
from asrcore.vault._registry import Registry
from asrcore.vault._rows import Row

__all__ = ["BESIDE", "Incarnation"]

BESIDE = ".incarnation"
"""The file beside a vault in a file."""
_PLACE = {
    "cluster": "SELECT system_identifier::text FROM pg_control_system()",
    "timeline": "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)",
    "database": "SELECT oid::text FROM pg_database WHERE datname = current_database()",
}
_RENEWED_BY = "session"  # in the record beside the place
_KEY = 0x41735249  # of PostgreSQL's advisory lock
_MASK = 2**32 - 1  # a row shows the lower half of its transaction's number


class Incarnation(Registry):
    """The part of the vault that knows whether it was put back to an earlier copy."""

    def was_put_back(self) -> bool | None:
        """Whether this is an earlier copy of the vault, before `begin_incarnation`. Raises VaultUnavailable.

        None where only the server of the database is another one, and the server of the vault that renewed the token
        last seems to be alive: it may have worked without a break, while a standby became the primary. One that has
        just started and has not renewed the token says nothing: of several that start together each finds the same.
        """
        with self._read() as connection:
            if self._place.path is not None:
                row = self._incarnation(connection)
                return row is not None and row["token"] not in self._tokens_beside()
            # In one statement: another server may renew it at any time.
            statement = select(_schema.incarnation, literal_column("xmin::text::bigint").label("xmin"))
            row = connection.execute(statement).mappings().first()
            others = {server.session for server in self._others(connection) if server.alive}
        if row is None:
            return False
        place = self._database()
        then = dict(part.partition("=")[::2] for part in row["place"].split())
        moved = {name for name in then.keys() & place.keys() if then[name] != place[name]}
        if "database" in moved or (row["written_by"] is not None and row["written_by"] & _MASK != row["xmin"]):
            return True
        return None if moved and then.get(_RENEWED_BY) in others else bool(moved)

    def begin_incarnation(self, *, put_back: bool = False) -> None:
        """Renew the token. `put_back`: no record of a machine is trusted until its target has been asked."""
        token, table, place = uuid.uuid4().hex, _schema.incarnation, dict(self._database())
        if self._member is not None:
            place[_RENEWED_BY] = self._member.session
        with self._write("begin-incarnation") as connection:
            if self._place.path is None:  # one at a time: there is one row
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _KEY})
            row = self._incarnation(connection)
            if self._place.path is not None:
                self._write_beside(*([] if row is None else [row["token"]]), token)
                reach("vault.begin-incarnation.beside")
            values = {"token": token, "place": " ".join(f"{name}={value}" for name, value in place.items())}
            if self._place.path is None:
                values["written_by"] = connection.execute(text("SELECT txid_current()")).scalar_one()
            if row is None:
                connection.execute(insert(table).values(number=1, **values))
            else:
                connection.execute(update(table).values(values))
            if put_back:
                connection.execute(update(_schema.protections).values(restored=True))
        if self._place.path is not None:
            self._write_beside(token)  # from now on a copy with the former token is an earlier one

    def lost_transactions(self) -> bool:
        """Whether a heartbeat of this server found that the database has lost an earlier one; True once."""
        found, self._went_back = self._went_back, False
        return found

    def _incarnation(self, connection: Connection) -> Row | None:
        return connection.execute(select(_schema.incarnation)).mappings().first()

    def _write_beside(self, *tokens: str) -> None:
        try:
            write_private(self._place.beside(BESIDE), "".join(f"{token}\n" for token in tokens))
        except OSError as problem:
            raise self._place.unavailable(problem) from problem

    def _tokens_beside(self) -> list[str]:
        try:
            return self._place.beside(BESIDE).read_text("ascii").split()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as problem:
            raise self._place.unavailable(str(problem)) from problem

    def _database(self) -> Mapping[str, str]:
        """Which database this is, in the parts that the vault's role may read; empty for a file."""
        place: dict[str, str] = {}
        for name, statement in _PLACE.items() if self._place.path is None else ():
            try:
                with self._connect() as connection:
                    place[name] = str(connection.execute(text(statement)).scalar_one())
            except DBAPIError as problem:
                if getattr(problem.orig, "sqlstate", None) not in ("42501", "0A000"):  # not allowed, or not offered
                    with self._translated():
                        raise
        return place
