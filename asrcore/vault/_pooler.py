"""Whether a connection pooler stands before the database that gives one session to several clients.

In transaction mode pgbouncer accepts everything and breaks later: a lock stays in its pool when its holder has ended,
and a prepared statement is another client's.
"""

from __future__ import annotations

from sqlalchemy import Connection, Engine

from asrcore.errors import VaultPooled
from asrcore.vault._place import Place

__all__ = ["check_sessions"]

_ROUNDS = 5  # beside other clients, a pooler may happen to give the same session again


def check_sessions(place: Place, engine: Engine) -> None:
    """Raises VaultPooled. Where no pooler is, that costs one short statement."""
    with engine.connect() as first:
        first.execution_options(isolation_level="AUTOCOMMIT")
        driver = first.connection.driver_connection
        assert driver is not None
        if driver.info.backend_pid == _session(first):
            return  # what the server said when the connection was made: nothing stands between
        for _ in range(_ROUNDS):
            before = _session(first)
            with engine.connect() as second, second.begin():
                others = _session(second)
                after = _session(first)
            if others == before or after != before:
                raise VaultPooled(url=place.shown, detail="two connections were given the same session")


def _session(connection: Connection) -> int:
    return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
