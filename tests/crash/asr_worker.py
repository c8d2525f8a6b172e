"""`asr` inside a site, repeatedly, from one warmed-up process that forks a child per command.

It has one thread and no connection, so a child is equivalent to a new process, but starts immediately. Requests are
lines of JSON on its input: `["start", words, environment, log]`, answered with the child's pid, and `["wait", pid,
seconds]`, answered with its status as in `subprocess`, or null while it runs.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import threading
import time
from typing import Any

import asrcore.jobs._durable
import asrcore.procedures.failover
import asrcore.procedures.reprotect
import asrcore.service.scheduler  # noqa: F401 - imported here once, not in every child
from asrcore.cli import main as asr


def main() -> None:
    """Serve until the input ends."""
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        verb, *rest = json.loads(line)
        print(json.dumps(_start(*rest) if verb == "start" else _wait(*rest)), flush=True)


def _start(words: list[str], environment: dict[str, str], log: str) -> int:
    assert threading.active_count() == 1, "a fork copies only one thread"
    pid = os.fork()
    if pid:
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    errors = os.open(log + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(errors, 2)
    faulthandler.dump_traceback_later(100)
    os.environ.update(environment)
    sys.argv = ["asr", *words]
    status = 1
    try:
        asr()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - printed, as the interpreter would do; the fork ends either way
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _wait(pid: int, seconds: float) -> Any:
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)


if __name__ == "__main__":
    main()
