"""Runs commands with a time limit; an error contains their output."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMAND_SECONDS = 60.0


class LabError(Exception):
    """The lab cannot do what was requested; the message gives the reason."""


class CommandFailed(LabError):
    """A command failed or took too long."""

    def __init__(self, argv: Sequence[str], reason: str, printed: str) -> None:
        super().__init__(f"{shlex.join(argv)}: {reason}\n{printed.strip()}".rstrip())
        self.reason = reason
        self.printed = printed


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float = COMMAND_SECONDS,
    check: bool = True,
    text: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end, within `timeout` seconds. Raises CommandFailed; with `check` also for a non-zero exit status."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            check=False,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            cwd=cwd,
            env=env,
        )
    except subprocess.TimeoutExpired as late:
        printed = "".join(
            part.decode(errors="replace") if isinstance(part, bytes) else part or ""
            for part in (late.stdout, late.stderr)
        )
        raise CommandFailed(words, f"not done after {timeout:g} s", printed) from late
    except OSError as error:
        raise CommandFailed(words, str(error), "") from error
    if check and done.returncode:
        raise CommandFailed(words, f"exit status {done.returncode}", done.stdout + done.stderr)
    return done
