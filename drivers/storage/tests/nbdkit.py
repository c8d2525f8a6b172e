"""nbdkit for the tests of the NBD client: a real server that can be configured to be slow, to fail or to be small."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Self

import attrs
import pytest

from asr_storage.nbd.client import NbdClient, TlsFiles

Kind = Literal["tcp", "unix"]


@attrs.frozen
class Nbdkit:
    """A running nbdkit: its process, and where it listens (a unix socket, or a TCP port of this machine)."""

    pid: int
    where: Path | int

    def connect(self, timeout: float = 30, tls: TlsFiles | None = None, contexts: Sequence[str] = ()) -> NbdClient:
        """A client of it; `timeout` in seconds, `tls` over TCP only. Raises NbdError."""
        if isinstance(self.where, Path):
            return NbdClient.connect_unix(self.where, "", contexts=contexts, timeout=timeout)
        return NbdClient.connect_tcp("127.0.0.1", self.where, "", contexts=contexts, tls=tls, timeout=timeout)

    @classmethod
    @contextmanager
    def run(cls, kind: Kind, directory: Path, *words: str) -> Iterator[Self]:
        """WORDS are nbdkit's filters, plugin and parameters; its socket and pid file are in DIRECTORY. Stopped at the
        end of the block."""
        pid = directory / "nbdkit.pid"
        where: Path | int = directory / "nbdkit" if kind == "unix" else free_port()
        listen = ["-U", where] if isinstance(where, Path) else ["-i", "127.0.0.1", "-p", str(where)]
        with subprocess.Popen(["nbdkit", "-f", *listen, "-P", pid, *words]) as process:
            try:
                for _ in range(500):
                    if pid.exists():
                        break
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(0.01)
                        pytest.fail("nbdkit did not start")
                else:
                    pytest.fail("nbdkit does not listen after 5 s")
                yield cls(process.pid, where)
            finally:
                process.kill()
                pid.unlink(missing_ok=True)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process is stopped during the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        # The threads stop once one of them receives the signal: on a busy machine another one may answer before.
        deadline = time.monotonic() + 10
        while not _stands(pid):
            assert time.monotonic() < deadline, f"process {pid} does not stop"
            time.sleep(0.001)
        yield
    finally:
        with suppress(ProcessLookupError):  # killed in the meantime
            os.kill(pid, signal.SIGCONT)


def _stands(pid: int) -> bool:
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(") ")[2].startswith("T") for stat in stats)


def free_port() -> int:
    """A TCP port that is currently unused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
