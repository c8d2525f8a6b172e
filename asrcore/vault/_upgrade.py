"""Making the schema and upgrading it. The only place that imports Alembic, which takes 0.2 s: not for `asr status`."""

from __future__ import annotations

import os
import sqlite3
import uuid
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from asrcore.crashpoint import reach
from asrcore.errors import NotAVault, VaultDamaged, VaultExists, VaultMoved, VaultNotFound
from asrcore.vault._lock import lock_file
from asrcore.vault._lock_server import keep_engines_out
from asrcore.vault._place import Place
from asrcore.vault._pooler import check_sessions
from asrcore.vault._store import make_engine, recorded_version, translated
from asrcore.vault._versions import APPLICATION_ID

__all__ = ["MIGRATIONS", "create_file", "create_on_server", "migrate", "upgrade"]

MIGRATIONS = Path(__file__).parent / "migrations"
_SETUP_KEY = 0x41735257  # of PostgreSQL's advisory lock


def create_file(place: Place) -> None:
    """Make a SQLite vault: complete under another name, then linked to its own, so that a crash leaves no partial one.

    Raises VaultExists, NotAVault, VaultUnavailable; existing files are not touched.
    """
    path = place.path
    assert path is not None
    _check_free(place)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            _fill(Place(place.url.set(database=str(temporary)), temporary, place.shown))
            reach("vault.create.filled")
            os.link(temporary, path)
        finally:
            for suffix in ("", "-wal", "-shm"):
                with suppress(OSError):
                    temporary.with_name(temporary.name + suffix).unlink()
        _sync_directory(path.parent)
    except OSError as problem:
        _check_free(place)  # another process may have made one meanwhile
        raise place.unavailable(problem) from problem


def _check_free(place: Place) -> None:
    try:
        place.check_file()
    except (VaultNotFound, VaultMoved):  # after a move the place is free for the vault that comes back
        return
    raise VaultExists(url=place.shown)


def _fill(place: Place) -> None:
    engine = make_engine(place)
    try:
        with engine.connect().execution_options(asr_writes=True) as connection, connection.begin():
            connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
            migrate(connection)
    except DBAPIError as problem:
        raise translated(place, problem) or problem from problem
    finally:
        engine.dispose()


def create_on_server(place: Place) -> None:
    """Make a vault in an empty PostgreSQL database. Raises VaultExists, NotAVault, VaultUnavailable."""
    engine = make_engine(place)
    try:
        check_sessions(place, engine)
        with engine.connect() as connection, connection.begin():
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SETUP_KEY})
            if recorded_version(connection) is not None:
                raise VaultExists(url=place.shown)
            if inspect(connection).get_table_names():
                raise NotAVault(url=place.shown, detail="The database has tables of another program.")
            migrate(connection)
    except DBAPIError as problem:
        raise translated(place, problem) or problem from problem
    finally:
        engine.dispose()


def migrate(connection: Connection) -> None:
    """Apply all migrations that are missing, within the connection's transaction."""
    config = Config()
    # ConfigParser reads %; a path may hold one.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def upgrade(place: Place, found: str) -> None:
    """Upgrade an older vault to the newest version, in one transaction. A copy of a SQLite file is kept beside it,
    named after its version.

    Raises VaultInUse while an engine works on it, VaultUnavailable; the vault is then as it was.
    """
    # Foreign keys off: SQLite alters a table by making it again, which must not cascade.
    engine = make_engine(place, foreign_keys=False)
    try:
        with (
            ExitStack() as stack,
            engine.connect().execution_options(asr_writes=True) as connection,
            connection.begin(),
        ):
            if place.path is None:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SETUP_KEY})
            if recorded_version(connection) != found:
                return  # another process upgraded it while this one waited for the lock
            if place.path is None:
                keep_engines_out(connection)
            if place.path is not None:
                stack.enter_context(lock_file(place.beside(".lock"), f"an upgrade of the vault, pid {os.getpid()}"))
                _copy(place, place.beside(f".version-{found}"))
                reach("vault.upgrade.copied")
            migrate(connection)
            if place.path is not None and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").first()):
                raise VaultDamaged(url=place.shown, detail=f"a row of {broken[0]} refers to nothing")
            reach("vault.upgrade.written")
        reach("vault.upgrade.committed")
    except (DBAPIError, sqlite3.Error) as problem:
        raise translated(place, problem) or problem from problem
    except OSError as problem:
        raise place.unavailable(problem) from problem
    finally:
        engine.dispose()


def _copy(place: Place, copy: Path) -> None:
    temporary = copy.with_name(copy.name + ".new")
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with closing(sqlite3.connect(str(place.path))) as source, closing(sqlite3.connect(temporary)) as target:
        source.backup(target)
    temporary.replace(copy)
    _sync_directory(copy.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
