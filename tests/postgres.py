"""A PostgreSQL server for the tests: Debian's binaries, a temporary cluster, a unix socket in its directory.

The machine's own clusters are not changed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
from psycopg import sql

__all__ = ["Cluster", "cluster"]

_ACCOUNT = "postgres"  # the server refuses to run as root
# The tests cover asrcore's use of it, not its disk: without fsync a killed client still finds what it committed, and so
# does one whose server was stopped at once. With synchronous_commit off, that lost what had just been confirmed.
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "log_min_messages": "error",
}


class Cluster:
    """A running server. `url` names one of its databases."""

    def __init__(self, directory: Path, run: Callable[..., None], port: int | None) -> None:
        self._directory = directory
        self._run = run
        self._port = port

    def stop(self, mode: str = "immediate") -> None:
        """At once, as when its host loses power; `fast`: sessions are ended first, as at a restart by an operator."""
        self._run("pg_ctl", "stop", "-m", mode, "-s", "-D", str(self._directory / "data"))

    def copy(self) -> Path:
        """A copy of all databases as they are now, while they are in use: a standby that falls behind from now on."""
        copy = self._directory / f"copy-{uuid.uuid4().hex[:8]}"
        host, port = str(self._directory), [] if self._port is None else ["-p", str(self._port)]
        self._run("pg_basebackup", "-h", host, *port, "-U", _ACCOUNT, "-D", str(copy), "-c", "fast", "--no-sync")
        return copy

    def fail_over(self, copy: Path) -> None:
        """Stop at once, and run the copy in its place: what was committed since is lost."""
        self.stop()
        shutil.rmtree(self._directory / "data")
        copy.rename(self._directory / "data")
        self.start()

    @property
    def port(self) -> int:
        """Of a server that was made with TCP."""
        assert self._port is not None
        return self._port

    def start(self) -> None:
        """After `stop`; its databases are as they were."""
        # pg_ctl's pipes would stay open in the server and block this process, so its output goes to a file.
        self._run(
            "pg_ctl", "start", "-w", "-s", "-D", str(self._directory / "data"), "-l", str(self._directory / "log")
        )

    def tcp_url(self, database: str) -> str:
        """The same over TCP, of a server that was made with it."""
        return f"postgresql://{_ACCOUNT}@127.0.0.1:{self._port}/{database}"

    def url(self, database: str) -> str:
        """As `--vault` takes it."""
        port = "" if self._port is None else f"&port={self._port}"
        return f"postgresql://{_ACCOUNT}@/{database}?host={self._directory}{port}"

    def create(self, template: str = "template1") -> str:
        """A new database, a copy of another one that has no connections; returns its URL."""
        name = f"t{uuid.uuid4().hex[:12]}"
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        with closing(psycopg.connect(self.url("postgres"), autocommit=True)) as connection:
            connection.execute(statement)
        return self.url(name)

    def drop(self, url: str) -> None:
        """Delete a database, even if it has connections."""
        statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(self.name(url)))
        with closing(psycopg.connect(self.url("postgres"), autocommit=True)) as connection:
            connection.execute(statement)

    @staticmethod
    def name(url: str) -> str:
        """The name of the database in a URL of this server."""
        return url.partition("?")[0].rpartition("/")[2]


@contextmanager
def cluster(*, tcp: bool = False) -> Iterator[Cluster]:
    """Start a server, and stop it at the end. Its directory is short because the path of a socket is limited to 107
    characters. `tcp`: it listens on a port of the loopback interface as well."""
    binaries = _binaries()
    directory = Path(tempfile.mkdtemp(prefix="asr-pg-"))
    user, group = None, None
    if os.geteuid() == 0:
        account = pwd.getpwnam(_ACCOUNT)
        user, group = account.pw_uid, account.pw_gid
        os.chown(directory, user, group)

    def run(program: str, *arguments: str) -> None:
        command = [str(binaries / program), *arguments]
        done = subprocess.run(
            command,
            cwd=directory,
            user=user,
            group=group,
            extra_groups=None if user is None else [],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    data, port = directory / "data", None
    if tcp:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    try:
        run("initdb", "-D", str(data), "-U", _ACCOUNT, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
        with (data / "postgresql.conf").open("a", encoding="ascii") as file:
            file.write("".join(f"{name} = '{value}'\n" for name, value in _SETTINGS.items()))
            file.write(f"unix_socket_directories = '{directory}'\n")
            if tcp:
                file.write(f"listen_addresses = '127.0.0.1'\nport = {port}\n")
        made = Cluster(directory, run, port)
        made.start()
        try:
            yield made
        finally:
            run("pg_ctl", "stop", "-m", "immediate", "-s", "-D", str(data))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    assert found, "PostgreSQL is not installed: run `make packages`"
    return found[-1].parent
