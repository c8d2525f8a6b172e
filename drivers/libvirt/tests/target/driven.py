"""Commands of `drive.py`, each in a separate process, forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

COMMAND = (sys.executable, str(Path(__file__).with_name("drive.py")))
"""The command to start, with pipes for its input and output."""


class Driven:
    """The process that forks. A context manager."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            self._process.kill()

    def __call__(
        self, *words: str | Path, crash_at: str = "", log: Path | None = None, timeout: float = 120
    ) -> tuple[int, str, str]:
        """Run a command, killed at a crash point if given; returns its status as in `subprocess`, its output and its
        errors."""
        environment = {"ASRCORE_CRASH_AT": crash_at, "ASRCORE_CRASH_LOG": str(log or "")}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([environment, [str(word) for word in words]]).encode() + b"\n")
        self._process.stdin.flush()
        status, output, errors = json.loads(self._line(timeout))
        return int(status), str(output), str(errors)

    def _line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            assert more, f"no answer within {timeout:g} s"
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line
