"""One engine per vault, or some that share it, on PostgreSQL. The server releases the lock when the session ends.

So the lock is gone after a restart of the server, and whoever has it checks that again and again (`SessionLock.keep`).
It says who works on the vault, and keeps an upgrade away. That no two work on one machine does not depend on it: see
`_servers`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from asrcore.errors import VaultInUse
from asrcore.vault._lock import STARTING

__all__ = ["SessionLock", "holder_of_server", "keep_engines_out"]

_KEY = 0x41735256  # of PostgreSQL's advisory lock; such locks are per database
_GRANTED = (
    "l.locktype = 'advisory' AND l.granted AND l.classid = 0 AND l.objid = :key"
    " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


class SessionLock:
    """Held for as long as one connection lives; others see the holder by its application name.

    `shared`: beside others that share it, and not beside one that has it alone. `translated` turns errors of the
    database into those of the catalogue.
    """

    def __init__(
        self, engine: Engine, holder: str, translated: Callable[[], AbstractContextManager[None]], *, shared: bool
    ) -> None:
        self._engine = engine
        self._holder = holder
        self._translated = translated
        self._kind = "_shared" if shared else ""
        self._connection: Connection | None = None

    def keep(self) -> None:
        """Take the lock, or check that it is still held; one that was lost is taken again if nobody else has it.

        Raises VaultInUse, VaultUnavailable.
        """
        with self._translated():
            if self._connection is not None:
                with suppress(SQLAlchemyError):  # the session has ended
                    mine = f"SELECT EXISTS (SELECT FROM pg_locks l WHERE {_GRANTED} AND l.pid = pg_backend_pid())"
                    if self._connection.execute(text(mine), {"key": _KEY}).scalar():
                        return
                self.close()
            self._take()

    def _take(self) -> None:
        connection = self._engine.connect()
        try:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            if not connection.execute(text(f"SELECT pg_try_advisory_lock{self._kind}(:key)"), {"key": _KEY}).scalar():
                raise VaultInUse(holder=_server_holder(connection) or STARTING)
            name = {"name": self._holder[:63]}
            connection.execute(text("SELECT set_config('application_name', :name, false)"), name)
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        self._connection = connection

    def close(self) -> None:
        """Release it; a second call does nothing."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with suppress(SQLAlchemyError):  # at once, where the server would take a moment to see that the session ended
            connection.execute(text(f"SELECT pg_advisory_unlock{self._kind}(:key)"), {"key": _KEY})
        connection.invalidate()  # only closing the session is certain to release it
        connection.close()


def keep_engines_out(connection: Connection) -> None:
    """Until the connection's transaction ends. Raises VaultInUse while an engine or a server works on the vault.

    Those that have been silent for longer than their lease are ended: after a pause, they must not go on with a schema
    that they do not know.
    """
    if not connection.execute(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _KEY}).scalar():
        raise VaultInUse(holder=_server_holder(connection) or STARTING)
    if not inspect(connection).has_table("servers"):  # before schema version 0004
        return
    alive = "SELECT name, host FROM servers WHERE beat_at + lease > extract(epoch from clock_timestamp())"
    for name, host in connection.execute(text(alive)):
        raise VaultInUse(holder=f"{name} on {host}")
    connection.execute(text("DELETE FROM servers"))
    connection.execute(text("UPDATE assignments SET session = ''"))


def holder_of_server(engine: Engine) -> str | None:
    """The process that holds the lock, as it describes itself, or None."""
    with engine.connect() as connection:
        return _server_holder(connection)


def _server_holder(connection: Connection) -> str | None:
    statement = f"SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid WHERE {_GRANTED}"
    return connection.execute(text(statement), {"key": _KEY}).scalar()
