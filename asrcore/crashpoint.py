"""Named places where the crash tests kill the process; nothing else happens in them.

`ASRCORE_CRASH_AT=cycle.sealed` kills (SIGKILL) at the first time that `cycle.sealed` is reached,
`ASRCORE_CRASH_AT=cycle.sealed:3` at the third. With `ASRCORE_CRASH_LOG=FILE` every name reached is appended to FILE,
so that a test can prove that it knows all of them.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

__all__ = ["reach"]

_seen: Counter[str] = Counter()


def reach(name: str) -> None:
    """Say that execution is at the named place."""
    log = os.environ.get("ASRCORE_CRASH_LOG")
    if log:
        with Path(log).open("a", encoding="ascii") as file:
            file.write(name + "\n")
    wanted = os.environ.get("ASRCORE_CRASH_AT")
    if not wanted:
        return
    place, _, count = wanted.partition(":")
    if place == name:
        _seen[name] += 1
        if _seen[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
