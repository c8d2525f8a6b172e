"""The process that holds a site's namespaces and is the parent of its daemons.

It reaps their children: libvirt treats a dead QEMU as running until it is reaped, and process 1 of a container may be
slow (1.2 s measured) or never do it. Run as a program: _anchor.py FIFO LOG; each line written to the FIFO is a command
to start.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys

PR_SET_CHILD_SUBREAPER = 36


def _reap(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main(fifo: str, log: str) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    signal.signal(signal.SIGCHLD, _reap)
    os.mkfifo(fifo)
    commands = os.fdopen(os.open(fifo, os.O_RDWR))  # also for writing, so that it never reaches its end
    print("ready", flush=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    for line in commands:
        argv = shlex.split(line)
        try:
            os.posix_spawnp(argv[0], argv, os.environ, setsid=True)
        except OSError as error:
            print(f"{line.strip()}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
