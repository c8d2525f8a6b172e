"""A warmed-up process that forks one child per request, so that a case does not spend a second on imports.

It has one thread and opens nothing, so a child is equivalent to a new process. Requests are lines of JSON on its input:
verb, folder, chapter, place; the answer is the child's status, as in `subprocess`.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import asrcore.jobs._durable
import asrcore.procedures.failover
import asrcore.service.scheduler  # noqa: F401 - imported here once, not in every child
from tests.crash.memory import _work

LIMIT = 60  # seconds for a child


def main() -> None:
    """Serve until the input ends."""
    gc.disable()  # a child runs for a second; imported modules stay shared with it
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        verb, folder, chapter, place = json.loads(line)
        assert threading.active_count() == 1, "a fork copies only one thread"
        pid = os.fork()
        if pid == 0:
            _child(verb, folder, chapter, place)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(verb: str, folder: str, chapter: str, place: str) -> None:
    log = Path(folder + ".log").open("a")  # noqa: SIM115 - the fork's own output until its end
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    faulthandler.dump_traceback_later(LIMIT - 5, file=log)
    signal.alarm(LIMIT)
    status = 1
    try:
        _work.work(verb, folder, chapter, place)
        status = 0
    except BaseException:  # noqa: BLE001 - logged; the fork ends either way
        traceback.print_exc(file=log)
    finally:
        log.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
