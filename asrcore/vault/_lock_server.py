"""One engine per vault, or some that share it, on PostgreSQL. The server releases the lock when the session ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from asrcore.errors import VaultInUse
from asrcore.vault._lock import STARTING

__all__ = ["holder_of_server", "keep_engines_out", "lock_server"]

_KEY = 0x41735256  # of PostgreSQL's advisory lock; such locks are per database


@contextmanager
def lock_server(engine: Engine, holder: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock for as long as one connection lives; others see the holder by its application name.

    `shared`: beside others that share it, and not beside one that has it alone.
    """
    kind = "_shared" if shared else ""
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        if not connection.execute(text(f"SELECT pg_try_advisory_lock{kind}(:key)"), {"key": _KEY}).scalar():
            raise VaultInUse(holder=_server_holder(connection) or STARTING)
        connection.execute(text("SELECT set_config('application_name', :name, false)"), {"name": holder[:63]})
        try:
            yield
        finally:
            with suppress(DBAPIError):  # at once, where the server would take a moment to see that the session ended
                connection.execute(text(f"SELECT pg_advisory_unlock{kind}(:key)"), {"key": _KEY})
            connection.invalidate()  # only closing the session is certain to release it


def keep_engines_out(connection: Connection) -> None:
    """Until the connection's transaction ends. Raises VaultInUse while an engine works on the vault."""
    if not connection.execute(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _KEY}).scalar():
        raise VaultInUse(holder=_server_holder(connection) or STARTING)


def holder_of_server(engine: Engine) -> str | None:
    """The process that holds the lock, as it describes itself, or None."""
    with engine.connect() as connection:
        return _server_holder(connection)


def _server_holder(connection: Connection) -> str | None:
    statement = (
        "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid"
        " WHERE l.locktype = 'advisory' AND l.granted AND l.classid = 0 AND l.objid = :key"
        " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return connection.execute(text(statement), {"key": _KEY}).scalar()
