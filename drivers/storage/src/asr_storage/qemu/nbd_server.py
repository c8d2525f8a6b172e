"""qemu-nbd serving one image file on a private unix socket."""

import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from asr_storage.nbd.client import NbdClient, NbdError, NbdExportMissing, NbdTimeout
from asr_storage.qemu.process import QemuError, QemuTimeout, read_back, spawn
from asr_storage.qemu.rundir import private_directory

__all__ = ["QemuNbd", "image_options"]

# First and longest pause between two attempts to reach a starting server, seconds (it takes 15-50 ms to be ready).
_PAUSE, _LONGEST_PAUSE = 0.002, 0.05
_MAX_SOCKET_PATH = 107  # bytes, of the kernel's sockaddr_un


def image_options(image: Path, fmt: str, *, force_share: bool = False, read_only: bool = False) -> str:
    """QEMU's --image-opts for a local file or block device, its format stated.

    A format that is probed lets a guest that writes a qcow2 header to its raw disk read the host's files; a plain
    file name such as "nbd:..." is taken for a protocol. Here neither is possible.
    """
    path = image.absolute()
    protocol = "host_device" if path.exists() and stat.S_ISBLK(path.stat().st_mode) else "file"
    options = [f"driver={fmt}", f"file.driver={protocol}", f"file.filename={str(path).replace(',', ',,')}"]
    if read_only:
        options.append("read-only=on")
    if force_share:
        options.append("force-share=on")
    return ",".join(options)


class QemuNbd:
    """Serves IMAGE (of format FMT, never probed) from `start` to `close`; a context manager does both.

    Read-only unless WRITABLE, when holes stay holes (discard and zeroes unmap). BITMAP exports a persistent dirty
    bitmap of a qcow2 as the context "qemu:dirty-bitmap:BITMAP", DEPTH exports the context "qemu:allocation-depth".
    FORCE_SHARE reads an image that a running guest has open: only for layers that the guest no longer writes. The
    server dies with this process.
    """

    def __init__(
        self,
        image: Path,
        fmt: str,
        *,
        writable: bool = False,
        bitmap: str | None = None,
        depth: bool = False,
        force_share: bool = False,
        export: str = "",
        runtime_dir: Path | None = None,
        start_timeout: float = 10.0,
        stop_timeout: float = 60.0,
    ) -> None:
        """RUNTIME_DIR (default: the system's for temporary files) must have a short path: the socket is under it.
        STOP_TIMEOUT (seconds) covers writing back what is not yet on disk."""
        if writable and (force_share or bitmap is not None):
            raise ValueError("a writable server takes neither force_share nor a bitmap")
        self._image = image
        self._export = export
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._runtime_dir = runtime_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._cleanup = ExitStack()
        self._socket: Path | None = None
        self._options = [f"--export-name={export}", "--persistent", "--shared=0"]
        if writable:
            self._options += ["--discard=unmap", "--detect-zeroes=unmap"]
        else:
            self._options.append("--read-only")
        if bitmap is not None:
            self._options.append(f"--bitmap={bitmap}")
        if depth:
            self._options.append("--allocation-depth")
        self._options += ["--image-opts", image_options(image, fmt, force_share=force_share, read_only=not writable)]

    @property
    def export(self) -> str:
        return self._export

    @property
    def socket(self) -> Path:
        """The unix socket; only while started."""
        if self._socket is None:
            raise ValueError(f"{self!r} is not started")
        return self._socket

    @property
    def pid(self) -> int:
        """Process id of the server; only while started."""
        if self._process is None:
            raise ValueError(f"{self!r} is not started")
        return self._process.pid

    def start(self) -> None:
        """Start the server and return when it answers. Raises QemuError with its output, QemuTimeout."""
        if self._process is not None:
            raise ValueError(f"{self!r} is already started")
        try:
            self._start()
        except BaseException:
            self._kill()
            raise

    def _start(self) -> None:
        self._socket = self._cleanup.enter_context(private_directory(self._runtime_dir)) / "s"
        if len(bytes(self._socket)) > _MAX_SOCKET_PATH:
            raise ValueError(f"socket path {self._socket} is longer than {_MAX_SOCKET_PATH} bytes")
        self._output = self._cleanup.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - it is one
        command = ["qemu-nbd", f"--socket={self._socket}", *self._options]
        self._process = spawn(command, self._output, self._output)
        deadline = time.monotonic() + self._start_timeout
        pause = _PAUSE
        while (left := deadline - time.monotonic()) > 0:
            try:
                NbdClient.connect_unix(self._socket, self._export, timeout=left).close()
            except NbdExportMissing:
                raise  # it answers, but not what we started
            except NbdTimeout:
                break
            except NbdError:  # no socket yet
                try:
                    code = self._process.wait(min(pause, left))
                except subprocess.TimeoutExpired:
                    pause = min(2 * pause, _LONGEST_PAUSE)
                else:
                    raise self._error("did not start", command, code) from None
            else:
                return
        raise QemuTimeout(
            f"qemu-nbd of {self._image} does not answer in {self._start_timeout:g} s",
            command=command,
            exit_code=None,
            output=read_back(self._output),
        )

    def connect(self, *, contexts: Sequence[str] = (), timeout: float = 30.0) -> NbdClient:
        """A new connection to the export; see NbdClient.connect_unix."""
        return NbdClient.connect_unix(self.socket, self._export, contexts=contexts, timeout=timeout)

    def close(self) -> None:
        """Stop the server and wait until it has written everything and closed the image; may be called twice.

        Raises QemuError if it failed (also if it had died before), QemuTimeout if it had to be killed.
        """
        process, output = self._process, self._output
        if process is None or output is None:
            return
        try:
            process.send_signal(signal.SIGTERM)  # does nothing if it has ended
            code = process.wait(self._stop_timeout)
            if code != 0:
                raise self._error("failed", process.args, code)
        except subprocess.TimeoutExpired as error:
            raise QemuTimeout(
                f"qemu-nbd of {self._image} does not stop in {self._stop_timeout:g} s",
                command=_words(process.args),
                exit_code=None,
                output=read_back(output),
            ) from error
        finally:
            self._kill()

    def _kill(self) -> None:
        process, self._process, self._output, self._socket = self._process, None, None, None
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        self._cleanup.close()

    def _error(self, what: str, command: object, code: int) -> QemuError:
        output = "" if self._output is None else read_back(self._output)
        return QemuError(f"qemu-nbd of {self._image} {what}", command=_words(command), exit_code=code, output=output)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except QemuError as failed:
            if error is None:
                raise
            error.add_note(f"and then: {failed}")

    def __repr__(self) -> str:
        return f"<QemuNbd {self._image} {'stopped' if self._process is None else self._process.pid}>"


def _words(command: object) -> list[str]:
    return [str(word) for word in command] if isinstance(command, list) else [str(command)]
