"""The only place that knows DBOS: one generic workflow, and which workflows it has under way.

What is pinned, and why:
- `executor_id`: DBOS resumes interrupted workflows of the same executor id only. The vault's lock lets one engine at
  a time work on a vault, so the next engine is the same executor. With several process servers each session is an
  executor and has a separate queue that no other process reads. So DBOS resumes nothing automatically: the server that
  a machine was assigned to resumes the machine's workflows on its queue. With that, DBOS gives a workflow a new owner
  and refuses log entries of the former one.
- `application_version`: by default a hash of the workflow's source, and workflows of another version are not resumed.
  Ours is generic: what a job does is in its procedure's steps, which are idempotent, so a new release resumes the jobs
  of an old one. If a release changed the steps of a kind, DBOS finds that the logged names do not match and the job
  fails without undoing anything; the command can be run again. Only a changed workflow needs a new version.
- JSON instead of pickles: the log can be read by any release, and loading it runs no code.

Not to be used in a program that uses DBOS itself: DBOS is one per process.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, SetWorkflowID, WorkflowStatus
from dbos import error as dbos_error
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError

from asrcore.errors import VaultUnavailable
from asrcore.jobs._failure import Failure
from asrcore.jobs._run import Durably
from asrcore.model.watch import Stopped

__all__ = ["Durable"]

_log = logging.getLogger(__name__)

_ENGINE = "engine"
_VERSION = "asrcore-1"
_WORKFLOW = "asrcore.job"
_SCHEMA = "asrcore_jobs"  # on PostgreSQL; SQLite has a separate file
_GOES_ON = ("PENDING", "ENQUEUED")
_BUSY_MILLISECONDS = 30_000
# On Python 3.12 and newer DBOS counts on unixepoch('subsec'), its tables' defaults too; without it, rows are refused
# with `NOT NULL constraint failed`. Debian 12 has SQLite 3.40, whichever Python is built against it.
_SUBSEC_SINCE = (3, 42)
_POLL = 0.2  # seconds between looks into a server's queue
_SETTLE = 5.0  # seconds for threads that have nothing left to do but end

_AWAY = 5.0  # seconds between attempts to connect to a database server that is away
# PostgreSQL's of classes 28 and 3D, of a database that takes no connections, and libpq's own. What is not among them,
# such as `the database system is starting up` and `sorry, too many clients already`, passes.
_REFUSALS = (
    "authentication failed",
    "no password supplied",
    "pg_hba.conf",
    "does not exist",
    "is not permitted to log in",
    "permission denied",
    "is not currently accepting connections",
    "certificate",
)

_one_per_process = threading.Lock()


class _Awaits:
    """Whether connections wait for a database server that is away: from the launch to the end.

    DBOS repeats what failed because of it after 1, 2, 4 ... 60 seconds, up to half as long again; nothing sets that.
    After a long outage its next attempt would be up to 90 seconds off. One that waits for the server is there at once.
    Only what passes is waited for: what the server refuses is left to DBOS, which logs each attempt.
    """

    def __init__(self, unavailable: Callable[[BaseException], VaultUnavailable]) -> None:
        self._unavailable = unavailable
        self._ended = threading.Event()
        self._ended.set()
        self._impatient = threading.local()
        self._away = False
        self._saying = threading.Lock()

    def begin(self) -> None:
        """Connections wait."""
        self._ended.clear()

    @property
    def waiting(self) -> bool:
        """Whether they do now."""
        return not self._ended.is_set()

    def end(self) -> None:
        """They fail instead."""
        self._ended.set()

    @contextmanager
    def not_here(self) -> Iterator[None]:
        """In this thread connections neither wait nor are tried again by DBOS: the caller tries again."""
        self._impatient.yes = True
        try:
            yield
        finally:
            self._impatient.yes = False

    def connect(self, connect: Callable[[], DBAPIConnection], error: type[Exception]) -> DBAPIConnection:
        """Connect now, or when the server is back."""
        while True:
            try:
                made = connect()
            except error as problem:
                if getattr(self._impatient, "yes", False):
                    # DBOS tries again, without end, by these words.
                    raise error(str(problem).replace("connection failed", "no connection")) from problem
                if _is_refusal(problem) or self._ended.is_set():
                    raise
                self._say(problem)
                if self._ended.wait(_AWAY):
                    raise
            else:
                self._say(None)
                return made

    def _say(self, problem: Exception | None) -> None:
        """Log that the database is away, or that it is back: once, whichever connections wait."""
        with self._saying:
            if self._away == (problem is not None):
                return
            self._away = problem is not None
        if problem is None:
            _log.warning("the database of the jobs answers again")
        else:
            _log.warning("jobs wait, and connect again every %g seconds: %s", _AWAY, self._unavailable(problem))


def _is_refusal(problem: Exception) -> bool:
    """Whether the server refuses the connection for what does not pass. libpq gives no SQLSTATE for a connection, so
    its words must do; a server that speaks another language is waited for."""
    return any(words in str(problem) for words in _REFUSALS)


class Durable:
    """`body(job_id, durably)` is a job's workflow. It is resumed at the next launch only if it ends with a
    BaseException that is not an Exception; anything else ends it. `unavailable` makes the error of a problem of the
    database at `url`, for people; `server`: the session of a process server."""

    def __init__(
        self,
        url: URL,
        unavailable: Callable[[BaseException], VaultUnavailable],
        body: Callable[[str, Durably], None],
        server: str | None = None,
    ) -> None:
        self._executor = server or _ENGINE
        self._queue = f"asrcore-{server}" if server else None
        is_file = url.get_backend_name() == "sqlite"
        self._unavailable = unavailable
        self._body = body
        self._finishing: set[str] = set()  # the body has returned, DBOS has yet to log that
        self._before = set(threading.enumerate())
        self._awaits = _Awaits(unavailable)
        try:
            self._engine = _sqlite(url) if is_file else _on_a_server(url, self._awaits)
        except OSError as problem:
            raise unavailable(problem) from problem
        if not _one_per_process.acquire(blocking=False):
            raise RuntimeError("another engine runs in this process")
        self._open = True

    def launch(self) -> None:
        """Start; interrupted workflows resume within about a second. Raises VaultUnavailable."""
        _quiet()
        config: DBOSConfig = {
            "name": "asrcore",
            "system_database_engine": self._engine,
            "dbos_system_schema": _SCHEMA,
            "executor_id": self._executor,
            "application_version": _VERSION,
            "serializer": DBOSPortableJSONSerializer(),
            "enable_otlp": False,
            "log_level": "WARNING",
            "notification_listener_polling_interval_sec": 0.2,  # it sleeps that long before it sees that it has to end
        }
        DBOS(config=config)

        def workflow(job_id: str) -> None:  # DBOS marks what it wraps, and a method cannot be marked
            self._body(job_id, self._step)
            self._finishing.add(job_id)

        self._workflow = DBOS.workflow(name=_WORKFLOW, max_recovery_attempts=None)(workflow)
        try:
            if self._queue is not None:
                DBOS.listen_queues([self._queue])
            DBOS.launch()
            if self._queue is not None:
                DBOS.register_queue(self._queue, polling_interval_sec=_POLL)
        except DBAPIError as problem:
            raise self._unavailable(problem.orig or problem) from problem
        self._awaits.begin()

    def _step(self, name: str, work: Callable[[], Failure | None]) -> Failure | None:
        try:
            return DBOS.run_step({"name": name, "retries_allowed": False}, work)
        except DBAPIError as problem:  # steps raise nothing, so this is about the log
            raise self._unavailable(problem.orig or problem) from problem
        except dbos_error.DBOSWorkflowConflictIDError as problem:
            raise Stopped from problem  # another server resumed it meanwhile

    def begin(self, job_id: str) -> None:
        """Start the workflow of a job, or resume one that no process works on: an interrupted one, or one that ended
        here without its end being logged.

        Raises VaultUnavailable.
        """
        with self._translated():
            known = DBOS.get_workflow_status(job_id)
            if known is not None and not _goes_on(known):
                DBOS.delete_workflow(job_id)
                known = None
            if known is not None:
                DBOS.resume_workflow(job_id, queue_name=self._queue)
                return
            with SetWorkflowID(job_id):
                if self._queue is None:
                    DBOS.start_workflow(self._workflow, job_id)
                else:
                    DBOS.enqueue_workflow(self._queue, self._workflow, job_id)

    def elsewhere(self, job_id: str) -> bool:
        """Whether no workflow of the job is about to run in this process. Raises VaultUnavailable."""
        with self._translated():
            known = DBOS.get_workflow_status(job_id)
        if known is None or not _goes_on(known):
            return True
        if known.status == "ENQUEUED":
            return self._queue is not None and known.queue_name != self._queue
        return known.executor_id != self._executor

    def sort_out(self) -> set[str]:
        """Ids of the workflows that DBOS resumes automatically. Those that ended are deleted from its log.

        Raises VaultUnavailable.
        """
        with self._translated():
            known = DBOS.list_workflows(load_input=False, load_output=False)
            ended = [status.workflow_id for status in known if not _goes_on(status)]
            if ended:
                DBOS.delete_workflows(ended)
        return {item.workflow_id for item in known if _goes_on(item) and item.executor_id == self._executor}

    def close(self) -> None:
        """End; bodies must have returned. A second call does nothing."""
        if not self._open:
            return
        self._open = False
        self._awaits.end()
        try:
            self._settle()
            DBOS.destroy(destroy_registry=True)
            # DBOS does not wait for its threads; a connection they still hold would outlive the engine.
            for thread in threading.enumerate():
                if thread not in self._before and thread.name.startswith("dbos-executor-"):
                    thread.join(_SETTLE)
        finally:
            self._engine.dispose()
            _one_per_process.release()

    def _settle(self) -> None:
        """Let DBOS log the ends of workflows whose bodies have returned. One that it cannot log is run again at the
        next launch, and its body sees that the job has ended."""
        ends = time.monotonic() + _SETTLE
        pause = threading.Event()
        try:
            while self._finishing and time.monotonic() < ends:
                with self._translated():
                    known = DBOS.list_workflows(status=list(_GOES_ON), load_input=False, load_output=False)
                if self._finishing.isdisjoint(status.workflow_id for status in known):
                    break
                pause.wait(0.005)
        except VaultUnavailable as problem:
            _log.warning("%s", problem)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """A problem of the database is raised at once, as VaultUnavailable."""
        try:
            with self._awaits.not_here():
                yield
        except DBAPIError as problem:
            raise self._unavailable(problem.orig or problem) from problem


def _goes_on(status: WorkflowStatus) -> bool:
    return status.status in _GOES_ON and status.app_version == _VERSION


def _on_a_server(url: URL, awaits: _Awaits) -> sqlalchemy.Engine:
    engine = sqlalchemy.create_engine(url)

    @sqlalchemy.event.listens_for(engine, "do_connect")
    def connect(dialect: Dialect, _record: object, positional: list[Any], named: dict[str, Any]) -> DBAPIConnection:
        return awaits.connect(lambda: dialect.connect(*positional, **named), dialect.loaded_dbapi.OperationalError)

    return engine


def _sqlite(url: URL) -> sqlalchemy.Engine:
    """WAL and FULL as the vault has it: a step that is logged stays logged when the power fails."""
    if url.database is None:
        raise ValueError("jobs are kept in a file")
    Path(url.database).touch(mode=0o600)  # as private as the vault: errors name sites and paths
    engine = sqlalchemy.create_engine(url, max_overflow=-1)

    @sqlalchemy.event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = "IMMEDIATE"  # what DBOS counts on: a transaction that reads first may write
        settings = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_BUSY_MILLISECONDS}")
        for setting in settings:
            connection.execute(f"PRAGMA {setting}").close()
        if sqlite3.sqlite_version_info < _SUBSEC_SINCE:
            connection.create_function("unixepoch", 1, _unixepoch)

    return engine


def _unixepoch(modifier: str) -> float:
    if modifier != "subsec":
        raise ValueError(f"unixepoch({modifier!r}) is not known here")
    return time.time()


def _quiet() -> None:
    """DBOS installs a print handler unless its logger has a handler; this one sends its lines to the normal log."""
    logger = logging.getLogger("dbos")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    logger.propagate = True
