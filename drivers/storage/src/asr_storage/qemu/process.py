"""Child processes that do not outlive this one, and one-shot commands with a time limit."""

import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from tempfile import TemporaryFile
from typing import IO

import attrs

from asrcore.errors import HostIncomplete

__all__ = ["QemuError", "QemuTimeout", "read_back", "run", "spawn"]

_TOLD = 2000  # characters of a tool's output that an error repeats, the last ones


class QemuError(Exception):
    """A QEMU tool failed. `exit_code` is None if it did not get so far; `output` is what it printed."""

    def __init__(self, what: str, *, command: Sequence[str], exit_code: int | None, output: str) -> None:
        reported = output.strip()[-_TOLD:]
        ended = "" if exit_code is None else f" (exit code {exit_code})"
        super().__init__(f"{what}{ended}: {reported or 'it printed nothing'}")
        self.what = what
        self.command = tuple(command)
        self.exit_code = exit_code
        self.output = output


class QemuTimeout(QemuError):
    """A QEMU tool did not finish within the time limit and was killed."""


@attrs.frozen(eq=False)
class _Order:
    command: list[str]
    output: IO[bytes]
    errors: IO[bytes]
    child: Future[subprocess.Popen[bytes]] = attrs.field(factory=Future)


class _Spawner:
    """Starts all children from one thread that lives as long as the process.

    The kernel's parent-death signal is sent when the *thread* that started the child ends, so a worker thread must
    not start them. The signal is set by setpriv (util-linux) rather than a preexec_fn, which may deadlock where
    there are threads.
    """

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)  # a fork does not inherit the thread

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._orders: queue.SimpleQueue[_Order] | None = None

    def start(self, order: _Order) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._orders is None:
                self._orders = queue.SimpleQueue()
                threading.Thread(target=_serve, args=(self._orders,), name="spawner", daemon=True).start()
            self._orders.put(order)
        return order.child.result()


def _serve(orders: queue.SimpleQueue[_Order]) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    while True:
        order = orders.get()
        try:
            child = subprocess.Popen(
                order.command,
                stdin=subprocess.DEVNULL,
                stdout=order.output,
                stderr=order.errors,
                env=environment,
                process_group=0,  # Ctrl-C at the terminal is for this process, which then ends the child cleanly
            )
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            order.child.set_exception(error)
        else:
            order.child.set_result(child)
            del child
        del order  # neither files nor children are kept until the next order


_spawner = _Spawner()


def _find(program: str, package: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise HostIncomplete(what=program, detail=f"On Debian: apt-get install {package}.")
    return path


def spawn(command: Sequence[str], output: IO[bytes], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start COMMAND with its standard output and errors going to files.

    The kernel kills it when this process ends, however that happens. (Only a parent that is killed in the millisecond
    before setpriv has made its call leaves it behind.) Raises HostIncomplete if it is not installed.
    """
    setpriv, tool = _find("setpriv", "util-linux"), _find(command[0], "qemu-utils")
    try:
        return _spawner.start(_Order([setpriv, "--pdeathsig", "KILL", tool, *command[1:]], output, errors))
    except OSError as error:
        raise QemuError(f"start {command[0]}", command=command, exit_code=None, output=str(error)) from error


def run(command: Sequence[str], *, what: str, timeout: float, accept: Sequence[int] = (0,)) -> tuple[int, str]:
    """Run COMMAND to its end; its exit code, one of ACCEPT, and its standard output.

    Raises QemuError on another exit code, QemuTimeout after TIMEOUT seconds. It never outlives the call.
    """
    with TemporaryFile() as output, TemporaryFile() as errors:
        process = spawn(command, output, errors)
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        reported, complaints = read_back(output), read_back(errors)
    if code is None:
        raise QemuTimeout(f"{what}: not done in {timeout:g} s", command=command, exit_code=None, output=complaints)
    if code not in accept:
        raise QemuError(what, command=command, exit_code=code, output=complaints or reported)
    return code, reported


def read_back(output: IO[bytes]) -> str:
    """What a child wrote to the file OUTPUT. (pread: the child shares the file's position.)"""
    return os.pread(output.fileno(), os.fstat(output.fileno()).st_size, 0).decode(errors="replace")
