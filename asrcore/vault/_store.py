"""The database behind the vault: connections, transactions, and its failures as errors of the catalogue."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Select, Table, bindparam, create_engine, event, inspect, select
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from asrcore.crashpoint import reach
from asrcore.errors import (
    AsrError,
    HostIncomplete,
    InvalidValue,
    NotAVault,
    VaultDamaged,
    VaultForbidden,
    VaultPooled,
    VaultReadOnly,
    VaultUnavailable,
)
from asrcore.vault._place import Place
from asrcore.vault._rows import Row
from asrcore.vault._secrets import Secrets
from asrcore.vault._versions import VERSION_TABLE

__all__ = ["Store", "make_engine", "recorded_version", "row_of", "translated"]

_BUSY_SECONDS = 30  # a write of another process takes milliseconds; an upgrade of a large vault some seconds
_CONNECTIONS = 16  # to a database server, kept open: as many as cycles run at a time; more are opened when needed

T = TypeVar("T")


def make_engine(place: Place, *, foreign_keys: bool = True) -> Engine:
    """An engine for the place; nothing is opened yet.

    SQLite: WAL, so that readers and the writer do not wait for each other; synchronous=FULL, because a recorded
    point must survive a power cut (NORMAL syncs only at checkpoints). BEGIN is sent here, because the driver would
    begin neither before a SELECT nor IMMEDIATE: a read-modify-write would fail or see an older state.
    """
    if place.path is None:
        try:
            return create_engine(
                place.url,
                hide_parameters=True,
                pool_pre_ping=True,
                pool_size=_CONNECTIONS,
                max_overflow=-1,  # a thread never waits for another's connection
            )
        except ImportError as problem:
            raise HostIncomplete(what="psycopg", detail=f"It is needed for PostgreSQL: {problem}.") from problem
    engine = create_engine(
        place.url,
        hide_parameters=True,  # parameters hold the settings of sites, and those hold passwords
        max_overflow=-1,  # a thread never waits for another's connection
        connect_args={"timeout": _BUSY_SECONDS},
    )

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None
        # secure_delete: a secret that was replaced is overwritten, not only unlinked from its page
        settings = ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", f"foreign_keys={int(foreign_keys)}")
        for pragma in settings:
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("asr_writes", False)
        # Without SQLAlchemy, which would treat it as a statement like others: a fifth of a small transaction's cost.
        driver_connection = connection.connection.driver_connection
        assert driver_connection is not None
        driver_connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN").close()

    return engine


class Store:
    """Base of the parts of `Vault`: read and write transactions on one engine, from any thread."""

    def __init__(self, place: Place, engine: Engine) -> None:
        self._place = place
        self._engine = engine
        self._closed = False
        self._secrets = Secrets(place)
        # SQLite has one writer at a time and lets the others poll; a lock is fair and wakes at once.
        self._writing = threading.Lock() if place.path is not None else nullcontext()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the vault throughout."""
        with self._translated(), self._connect() as connection:
            if self._place.path is None:  # there every statement would see another state
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def _write(self, name: str) -> Iterator[Connection]:
        """A transaction that is the only writer on SQLite; on PostgreSQL `_row` locks the rows it reads.

        Crash points `vault.NAME.written` and `vault.NAME.committed`.
        """
        with self._translated(), self._writing:
            with self._connect() as connection:
                connection.execution_options(asr_writes=True)
                with connection.begin():
                    yield connection
                    reach(f"vault.{name}.written")
            reach(f"vault.{name}.committed")

    def _connect(self) -> Connection:
        if self._closed:
            raise RuntimeError("the vault is closed")
        return self._engine.connect()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, sqlite3.Error) as problem:
            error = translated(self._place, problem)
            if error is None:
                raise
            if isinstance(error, VaultReadOnly):
                self._engine.dispose()  # another connection may find the primary: these stay with a server that is none
            raise error from problem
        except UnicodeDecodeError as problem:  # sqlite3 decodes texts, also of its messages, strictly
            raise self._damaged("a text in it is not UTF-8") from problem

    def _damaged(self, detail: str) -> VaultDamaged:
        return VaultDamaged(url=self._place.shown, detail=detail)

    def _value(self, make: Callable[[Row], T], row: Row, what: str) -> T:
        """The value of a row; raises VaultDamaged when the row does not make one."""
        try:
            return make(row)
        except (ValueError, KeyError, TypeError, InvalidValue) as problem:
            raise self._damaged(f"{what}: {problem}") from problem


def row_of(connection: Connection, table: Table, **equal: object) -> Row | None:
    """The row of a table with these values (not NULL), or None. A write transaction locks it where rows can be
    locked."""
    locks = bool(connection.get_execution_options().get("asr_writes"))
    return connection.execute(_row_statement(table, tuple(equal), locks), equal).mappings().one_or_none()


@cache
def _row_statement(table: Table, columns: tuple[str, ...], locks: bool) -> Select[Any]:
    # Cached, as all statements of a cycle are: building one and its cache key takes longer than SQLite needs for it.
    statement = select(table).where(*(table.c[name] == bindparam(name) for name in columns))
    return statement.with_for_update() if locks else statement


def recorded_version(connection: Connection) -> str | None:
    """The schema version that the database says it has; None if it does not say."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalars().all()
    return str(found[0]) if len(found) == 1 else None


def translated(place: Place, problem: DBAPIError | sqlite3.Error) -> AsrError | None:
    """The error of the catalogue for an error of the database, or None when it is a defect of asrcore."""
    cause = problem.orig if isinstance(problem, DBAPIError) else problem
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the class of an extended code
        if code == sqlite3.SQLITE_NOTADB:
            return NotAVault(url=place.shown, detail="The file is not a database.")
        if code == sqlite3.SQLITE_CORRUPT:
            return VaultDamaged(url=place.shown, detail=str(cause))
        if code in _SQLITE_UNAVAILABLE:
            return place.unavailable(cause)
        if code == sqlite3.SQLITE_ERROR and any(text in str(cause) for text in _SQLITE_DAMAGED):
            return VaultDamaged(url=place.shown, detail=str(cause))
        return None
    if any(text in str(cause) for text in _POOLER_SAYS):
        return VaultPooled(url=place.shown, detail=str(place.unavailable(cause or problem).attributes["detail"]))
    state = getattr(cause, "sqlstate", None) or ""
    passes = state[:2] in _UNAVAILABLE or state in (_NO_PRIVILEGE, *_OTHER_SCHEMA)
    if passes or isinstance(problem, OperationalError | InterfaceError):
        kinds = {_READ_ONLY: VaultReadOnly, _NO_PRIVILEGE: VaultForbidden}
        return place.unavailable(cause or problem, kinds.get(state, VaultUnavailable))
    return None


# Flipped bytes in the schema or in a text; the schema's version was checked when the vault was opened.
_SQLITE_DAMAGED = ("no such table", "no such column", "Could not decode to UTF-8")

# pgbouncer, of what PostgreSQL accepts from a client; the second one in statement mode.
_POOLER_SAYS = ("unsupported startup parameter", "transaction blocks not allowed in statement pooling mode")

# Of PostgreSQL, https://www.postgresql.org/docs/current/errcodes-appendix.html. SQLAlchemy passes some of them on as
# InternalError or ProgrammingError: what a standby answers, a transaction that was ended for its idleness, a privilege.
_READ_ONLY = "25006"
_NO_PRIVILEGE = "42501"
_OTHER_SCHEMA = ("42P01", "42703")  # the vault was upgraded while this server was paused: its next beat ends it
_UNAVAILABLE = frozenset(
    {
        "08",  # the connection
        "25",  # the transaction's state
        "40",  # rolled back, for example in a deadlock
        "53",  # memory, disk, connections
        "55",  # locked, or in use
        "57",  # ended or shutting down
        "58",  # input and output
    }
)
_SQLITE_UNAVAILABLE = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_AUTH,
    }
)
