"""The vault itself: creating, opening, closing, and the lock of the one engine."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import attrs
from sqlalchemy import Engine, inspect
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from asrcore.closing import Closing
from asrcore.errors import InvalidValue, NotAVault, VaultNotFound, VaultTooNew, VaultUnavailable
from asrcore.units import format_time
from asrcore.vault import _lock, _lock_server
from asrcore.vault._certificates import Certificates
from asrcore.vault._cycles import Cycles
from asrcore.vault._incarnation import Incarnation
from asrcore.vault._journal import Journal
from asrcore.vault._place import Place
from asrcore.vault._pooler import check_sessions
from asrcore.vault._store import make_engine, recorded_version, translated
from asrcore.vault._versions import REVISIONS

__all__ = ["Vault"]

T = TypeVar("T")

# Device and inode of the files that this process has open. Reading one of them would drop the locks that SQLite holds
# on it (POSIX: with the first descriptor that is closed), and another process might then fold its journal.
_open: Counter[tuple[int, int]] = Counter()

_SHAREABLE = "postgresql://USER@HOST/DATABASE where several process servers share it"


class Vault(Cycles, Journal, Certificates, Incarnation, Closing):
    """Everything that must survive a crash: sites, policies, protected machines, points, jobs, the log.

    Safe to use from several threads and processes; every method is one transaction, durable when it returns.
    Any method raises VaultUnavailable (disk full, read-only, database gone: nothing was recorded) and VaultDamaged.
    Times are seconds since the epoch, given by the caller.
    """

    _use: _lock.UseLock | None = None
    _opened: tuple[int, int] | None = None

    @classmethod
    def create(cls, url_or_path: str | os.PathLike[str]) -> Vault:
        """Make a new vault and open it. A file is made with its directories, readable by its owner only, since the
        settings of sites may be secret.

        Raises InvalidValue, VaultExists, NotAVault (something else is there), VaultUnavailable.
        """
        from asrcore.vault import _upgrade  # noqa: PLC0415 - Alembic is slow to import

        place = Place.of(url_or_path)
        if place.path is not None:
            _upgrade.create_file(place)
        else:
            _upgrade.create_on_server(place)
        return cls.open(url_or_path)

    @classmethod
    def open(cls, url_or_path: str | os.PathLike[str]) -> Vault:
        """Open a vault. An older one is upgraded; before that a copy of a SQLite file is kept beside it.

        Raises InvalidValue, VaultNotFound, NotAVault, VaultTooNew, VaultDamaged, VaultInUse (an engine works on a
        vault that must be upgraded), VaultUnavailable.
        """
        place = Place.of(url_or_path)
        use = None
        if place.path is not None:
            check = not _open[_opened_here(place) or (0, 0)]
            if check:
                place.check_file()
            try:
                use = _lock.UseLock(place.beside(".users"))
                if check:
                    place.check_file()  # it may have been moved while we waited
            except OSError as problem:
                raise place.unavailable(problem) from problem
        engine = make_engine(place)
        try:
            if place.path is None:
                _translated(place, lambda: check_sessions(place, engine))
            found = _version(place, engine)
            if found not in REVISIONS:
                raise VaultTooNew(url=place.shown, found=found, known=REVISIONS[-1])
            if found != REVISIONS[-1]:
                from asrcore.vault import _upgrade  # noqa: PLC0415 - Alembic is slow to import

                _upgrade.upgrade(place, found)
        except BaseException:
            engine.dispose()
            if use is not None:
                use.close()
            raise
        vault = cls(place, engine)
        vault._use = use
        vault._opened = _opened_here(place)
        if vault._opened is not None:
            _open[vault._opened] += 1
        return vault

    def for_others(self) -> Vault:
        """A handle on the same vault and its connections that works for no process server; it needs no close."""
        other = Vault(self._place, self._engine)
        other._writing = self._writing
        other._secrets = self._secrets
        return other

    def fold(self) -> None:
        """Fold SQLite's journal into the file and close the connections, so that the file alone is the vault."""
        if self._place.path is not None:
            with self._translated(), self._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").close()
        self._closed = True
        self._engine.dispose()

    @property
    def url(self) -> str:
        """Where the vault is, as it was named, without passwords."""
        return self._place.shown

    @property
    def jobs_url(self) -> URL:
        """Where the job engine keeps its own records: a file beside the SQLite file, or the same database."""
        if self._place.path is None:
            return self._place.url
        return self._place.url.set(database=str(self._place.beside(".jobs")))

    def jobs_unavailable(self, problem: BaseException) -> VaultUnavailable:
        """The error for a problem of the job engine's records: with the place as people see it, and no password."""
        place = self._place
        if place.path is not None:
            path = place.beside(".jobs")
            place = attrs.evolve(place, path=path, shown=str(path))
        return place.unavailable(problem)

    def close(self) -> None:
        """Close all connections; a second call does nothing."""
        self._closed = True
        self._engine.dispose()
        if self._use is not None:
            self._use.close()
        if self._opened is not None:
            _open[self._opened] -= 1
            self._opened = None

    @contextmanager
    def kept_from_others(self, holder: str) -> Iterator[None]:
        """Exclude all other processes, engine or not, until `close`. Raises VaultInUse."""
        with self.engine_lock(holder):
            if self._use is not None:
                self._use.alone()
            yield

    # -- one engine ------------------------------------------------------------------------------------------------

    @property
    def shareable(self) -> bool:
        """Whether several process servers may work on this vault: on a database server."""
        return self._place.path is None

    @contextmanager
    def engine_lock(self, holder: str, *, since: float | None = None, shared: bool = False) -> Iterator[None]:
        """Be the one engine of this vault, or (`shared`) one of the process servers that share it on a database server.
        `holder` is shown to others (`asr run`), with process, host and `since` (seconds since the epoch). The lock
        ends with the process, however that ends.

        Raises VaultInUse, naming the holder; InvalidValue when a file is to be shared.
        """
        with ExitStack() as stack:
            if shared or self.shareable:
                lock = self.session_lock(holder, since=since, shared=shared)
                stack.callback(lock.close)
                lock.keep()
            else:
                try:
                    reported = _reported(holder, since)
                    stack.enter_context(_lock.lock_file(self._place.beside(".lock"), reported))
                except OSError as problem:
                    raise self._place.unavailable(problem) from problem
            yield

    def session_lock(
        self, holder: str, *, since: float | None = None, shared: bool = False
    ) -> _lock_server.SessionLock:
        """The lock of `engine_lock` on a database server, for the holder to take, watch and release: there it ends with
        the session, also when the server is restarted. Raises InvalidValue for a vault in a file.
        """
        if not self.shareable:
            raise InvalidValue(what="vault", value=self.url, wanted=_SHAREABLE)
        return _lock_server.SessionLock(self._engine, _reported(holder, since), self._translated, shared=shared)

    def engine_holder(self) -> str | None:
        """The engine that works on this vault, as it describes itself; None if there is none."""
        try:
            if self._place.path is not None:
                return _lock.holder_of_file(self._place.beside(".lock"))
            with self._translated():
                return _lock_server.holder_of_server(self._engine)
        except OSError as problem:
            raise self._place.unavailable(problem) from problem


def _reported(holder: str, since: float | None) -> str:
    reported = f"{holder} (pid {os.getpid()} on {socket.gethostname()}"
    return reported + (f", since {format_time(since)})" if since is not None else ")")


def _opened_here(place: Place) -> tuple[int, int] | None:
    try:
        found = place.path.stat() if place.path is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_dev, found.st_ino)


def _translated(place: Place, work: Callable[[], T]) -> T:
    try:
        return work()
    except DBAPIError as problem:
        error = translated(place, problem)
        if error is None:
            raise
        raise error from problem


def _version(place: Place, engine: Engine) -> str:
    def look() -> tuple[str | None, bool]:
        with engine.connect() as connection:
            found = recorded_version(connection)
            return found, found is None and not inspect(connection).get_table_names()

    found, empty = _translated(place, look)
    if found is not None:
        return found
    if empty and place.path is None:
        raise VaultNotFound(url=place.shown)
    raise NotAVault(url=place.shown, detail="It has no schema version of a vault.")
