"""Where a vault is: a file for SQLite, a URL for PostgreSQL. It is never shown with its password."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import quote, quote_plus

import attrs
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from asrcore.errors import InvalidValue, NotAVault, VaultMoved, VaultNotFound, VaultUnavailable
from asrcore.vault._versions import APPLICATION_ID, HEADER_SIZE, application_id

__all__ = ["Place"]

_WANTED = "a file path, sqlite:///PATH, or postgresql://USER@HOST/DATABASE"
IDLE_SECONDS = 10  # far longer than any transaction of asrcore pauses
_KEEPALIVE_SECONDS, _KEEPALIVES = 5, 3  # a host that is gone is noticed after 5 + 3 x 5 seconds without an answer
_GONE_SECONDS = 20  # the same where data is under way that is not acknowledged
_CONNECT_SECONDS = 10


@attrs.frozen
class Place:
    """`path` is the SQLite file, links resolved; None: a database server. `shown` is for people."""

    url: URL = attrs.field(repr=False)
    path: Path | None
    shown: str

    @classmethod
    def of(cls, url_or_path: str | os.PathLike[str]) -> Place:
        """From a path or URL as it was entered. Raises InvalidValue."""
        text = os.fspath(url_or_path)
        if "://" not in text:
            return cls._file(text, text)
        shown = _redact(text)
        try:
            url = make_url(text)
        except (ArgumentError, ValueError):
            url = None
        if url is None:  # outside of the handler: the parser's own message holds all of the text
            raise InvalidValue(what="vault", value=shown, wanted=_WANTED)
        if url.drivername in ("sqlite", "sqlite+pysqlite") and not url.query and not url.host:
            return cls._file(url.database or "", shown)
        if url.drivername in ("postgresql", "postgresql+psycopg") and url.database:
            return cls(_bounded(url.set(drivername="postgresql+psycopg")), None, shown)
        raise InvalidValue(what="vault", value=shown, wanted=_WANTED)

    @classmethod
    def _file(cls, text: str, shown: str) -> Place:
        if not text.isprintable() or text in ("", ":memory:") or text.startswith("file:"):
            raise InvalidValue(what="vault", value=shown, wanted=_WANTED)
        try:
            path = Path(os.path.realpath(Path(text).expanduser()))
        except RuntimeError:  # ~USER of an unknown user
            path = None
        if path is None:
            raise InvalidValue(what="vault", value=shown, wanted=_WANTED)
        return cls(URL.create("sqlite+pysqlite", database=str(path)), path, shown)

    def beside(self, suffix: str) -> Path:
        """A file beside the SQLite file: its name and a suffix."""
        if self.path is None:
            raise ValueError("a database server has no files")
        return self.path.with_name(self.path.name + suffix)

    def check_file(self) -> None:
        """Check that the file is a vault, by its header alone: SQLite does not open the file, so a foreign database
        and its journal are not touched.

        Raises VaultNotFound, NotAVault, VaultUnavailable.
        """
        assert self.path is not None
        try:
            mode = self.path.stat().st_mode
            if not stat.S_ISREG(mode):
                raise NotAVault(url=self.shown, detail="It is not a regular file.")
            with self.path.open("rb") as file:
                header = file.read(HEADER_SIZE)
        except (FileNotFoundError, NotADirectoryError) as problem:
            if self.beside(".moved").exists():
                raise VaultMoved(url=self.shown, left=str(self.beside(".moved"))) from problem
            raise VaultNotFound(url=self.shown) from problem
        except OSError as problem:
            raise self.unavailable(problem) from problem
        if not header:
            raise NotAVault(url=self.shown, detail="The file is empty.")
        found = application_id(header)
        if found is None:
            raise NotAVault(url=self.shown, detail="The file is not a database.")
        if found != APPLICATION_ID:
            raise NotAVault(url=self.shown, detail="It is a SQLite database of another program.")

    def unavailable(
        self, problem: BaseException | str, kind: type[VaultUnavailable] = VaultUnavailable
    ) -> VaultUnavailable:
        """The error for a problem below the vault, with the state of the file system."""
        detail = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem).strip()
        return kind(url=self.shown, detail=self._scrub(detail) + self._hint())

    def _hint(self) -> str:
        """SQLite says `disk I/O error` or `unable to open database file` for most; the file system knows more."""
        if self.path is None:
            return ""
        try:
            status = os.statvfs(self.path.parent)
        except OSError:
            return f" ({self.path.parent} does not exist)"
        if status.f_flag & os.ST_RDONLY:
            return " (its file system is mounted read-only)"
        if status.f_bavail == 0 or (status.f_files and status.f_favail == 0):
            return " (its file system is full)"
        return ""

    def _scrub(self, text: str) -> str:
        for secret in _secrets(self.url):
            for form in (secret, quote(secret, safe=""), quote_plus(secret)):
                text = text.replace(form, "***")
        return text


def _bounded(url: URL) -> URL:
    """A client that hangs in a transaction, or whose host is gone, must not keep its locks: the server ends its
    session. A client whose server is gone finds that out as soon. What the URL itself says comes first.

    By default Linux asks after two hours of silence whether the other host is still there.
    """
    at_server = {
        "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
        "tcp_keepalives_idle": _KEEPALIVE_SECONDS,
        "tcp_keepalives_interval": _KEEPALIVE_SECONDS,
        "tcp_keepalives_count": _KEEPALIVES,
        "tcp_user_timeout": f"{_GONE_SECONDS}s",
    }
    at_client = {
        "keepalives_idle": _KEEPALIVE_SECONDS,
        "keepalives_interval": _KEEPALIVE_SECONDS,
        "keepalives_count": _KEEPALIVES,
        "tcp_user_timeout": _GONE_SECONDS * 1000,
        "connect_timeout": _CONNECT_SECONDS,
    }
    given = url.query.get("options", ())
    options = [f"-c {name}={value}" for name, value in at_server.items()]
    options += [given] if isinstance(given, str) else list(given)
    query = {name: str(value) for name, value in at_client.items() if name not in url.query}
    return url.update_query_dict({**query, "options": " ".join(options)})


def _secrets(url: URL) -> list[str]:
    values = [url.password] if url.password else []
    values += [str(value) for key, value in url.query.items() if "pass" in key.lower()]
    return sorted(filter(None, map(str, values)), key=len, reverse=True)


def _redact(text: str) -> str:
    """Also works on text that cannot be parsed. A password may hold an unescaped @ or /."""
    text = re.sub(r"://([^:@/]*):.*@", r"://\1:***@", text, flags=re.DOTALL)
    return re.sub(r"([?&][^=&]*pass[^=&]*=)[^&]*", r"\1***", text, flags=re.IGNORECASE)
