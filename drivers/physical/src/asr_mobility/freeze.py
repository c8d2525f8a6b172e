"""Freezing the server's file systems for a moment, with a limit that holds even if this process is killed."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import time
from collections.abc import Iterable
from contextlib import suppress

from asr_mobility.disks import disks_below

__all__ = ["Freeze", "FreezeError", "Mount", "mounts_on", "thaw_all"]

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_MCL_CURRENT_AND_FUTURE = 3
_libc = ctypes.CDLL(None, use_errno=True)
_READY, _DONE = b"r", b"d"
_START_SECONDS = 10.0
_MARK = "/run/asr-mobility.freezing"
"""Exists while something may be frozen; on a memory file system, so that it can be deleted during a freeze."""


class FreezeError(Exception):
    """The freeze could not start, or did not hold; nothing is frozen any more."""


class Mount:
    """A mounted file system on the server's disks. `device` is the kernel's name of the block device."""

    def __init__(self, path: str, kind: str, device: str, read_only: bool) -> None:
        self.path, self.kind, self.device, self.read_only = path, kind, device, read_only


def mounts_on(disks: Iterable[str], table: str = "/proc/self/mountinfo") -> list[Mount]:
    """File systems on these disks (kernel names), one mount of each, deepest path first and `/` last."""
    wanted = set(disks)
    found: list[Mount] = []
    seen: set[str] = set()
    with open(table, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            mount = _mount(line)
            if mount is None or mount.device in seen:
                continue
            if disks_below(mount.device) & wanted:
                seen.add(mount.device)
                found.append(mount)
    return sorted(found, key=lambda mount: (mount.path != "/", len(mount.path)), reverse=True)


def _mount(line: str) -> Mount | None:
    left, _, right = line.partition(" - ")
    fields, (kind, source, super_options) = left.split(), [*right.split(), "", "", ""][:3]
    if not source.startswith("/dev/"):
        return None
    # btrfs and others give a mount a number that is no device's, so its source is used.
    name = os.path.basename(os.path.realpath(source))
    if source == "/dev/root":
        with suppress(OSError):
            name = os.path.basename(os.readlink("/sys/dev/block/" + fields[2]))
    path = (
        fields[4]
        .encode("utf-8", "surrogateescape")
        .decode("unicode_escape")
        .encode("latin-1")
        .decode(errors="surrogateescape")
    )
    return Mount(path, kind, name, "ro" in super_options.split(","))


def thaw_all(disks: Iterable[str]) -> None:
    """Thaw what a service that was killed together with its watchdog has left frozen; else do nothing."""
    if not os.path.exists(_MARK):
        return
    for mount in reversed(mounts_on(disks)):
        with suppress(OSError):
            fd = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.ioctl(fd, _FITHAW, 0)
            finally:
                os.close(fd)
    with suppress(OSError):
        os.unlink(_MARK)


class Freeze:
    """A context manager: file systems are frozen inside of it, for at most `limit` seconds.

    A second process thaws them when the limit has passed or this process has ended, even by SIGKILL. It is ready
    before the first file system is frozen, holds everything that it needs in memory, and is outside of the service's
    control group, so that what kills the whole service does not kill it.
    """

    def __init__(self, mounts: list[Mount], limit: float) -> None:
        self._mounts, self._limit = mounts, limit
        self.frozen: list[Mount] = []
        self.not_frozen: list[tuple[Mount, str]] = []
        self.began = 0.0
        """Monotonic clock, when the last file system was frozen: the instant."""
        self.held = 0.0
        """Seconds from the first freeze to the last thaw."""
        self._fds: list[int] = []
        self._pid = 0
        self._started = 0.0
        self._told = -1

    def __enter__(self) -> Freeze:
        os.sync()  # else the freeze itself would have to write all this while writers wait
        _lock_memory()
        try:
            for mount in self._mounts:
                self._fds.append(os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            self._start_dead_man()
            os.close(os.open(_MARK, os.O_WRONLY | os.O_CREAT, 0o600))
            self._started = time.monotonic()
            for mount, fd in zip(self._mounts, self._fds):
                self._freeze(mount, fd)
            self.began = time.monotonic()
        except BaseException as problem:
            self._end()
            if isinstance(problem, OSError):  # a file system that was unmounted meanwhile, no memory, no processes
                raise FreezeError(f"it could not start: {problem}") from problem
            raise
        return self

    def _freeze(self, mount: Mount, fd: int) -> None:
        if mount.read_only:
            return
        try:
            fcntl.ioctl(fd, _FIFREEZE, 0)
        except OSError as problem:  # vfat cannot; EBUSY: another program has frozen it
            self.not_frozen.append((mount, problem.strerror or str(problem)))
        else:
            self.frozen.append(mount)

    def left(self) -> float:
        """Seconds until the limit."""
        return self._limit - (time.monotonic() - self._started)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        late = self._end()
        if late and error is None:
            raise FreezeError(f"the freeze exceeded the limit of {self._limit:g} s: thawed without a recovery point")

    def _end(self) -> bool:
        """Thaw, in the reverse order. Returns whether something was thawed before."""
        late = False
        for mount, fd in reversed(list(zip(self._mounts, self._fds))):
            if mount in self.frozen:
                try:
                    fcntl.ioctl(fd, _FITHAW, 0)
                except OSError:
                    late = True
        if self._started:
            self.held = time.monotonic() - self._started
        if self._pid:
            late = self._dismiss() or late
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        with suppress(OSError):
            os.unlink(_MARK)
        _libc.munlockall()
        return late

    # -- the watchdog

    def _start_dead_man(self) -> None:
        ours, self._told = os.pipe()
        ready, tell = os.pipe()
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(self._told)
                    os.close(ready)
                    self._wait_and_thaw(ours, tell)
                finally:
                    os._exit(1)
            self._pid = pid
        except OSError:
            os.close(ready)
            os.close(self._told)
            raise
        finally:
            os.close(ours)
            os.close(tell)
        try:
            if not _readable(ready, _START_SECONDS) or os.read(ready, 1) != _READY:
                os.kill(self._pid, signal.SIGKILL)  # nothing is frozen yet, and it may never check whether it is needed
                raise FreezeError("the watchdog process that thaws after the limit did not start")
        finally:
            os.close(ready)

    def _wait_and_thaw(self, reported: int, tell: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.setsid()
        _leave_control_group()
        _lock_memory()
        end = time.monotonic() + self._limit
        os.write(tell, _READY)
        os.close(tell)
        if _readable(reported, max(0.0, end - time.monotonic())) and os.read(reported, 1) == _DONE:
            os._exit(0)
        for fd in reversed(self._fds):
            with suppress(OSError):
                fcntl.ioctl(fd, _FITHAW, 0)
        with suppress(OSError):
            os.unlink(_MARK)
        os._exit(1)

    def _dismiss(self) -> bool:
        with suppress(OSError):
            os.write(self._told, _DONE)
        os.close(self._told)
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return status != 0


def _readable(fd: int, seconds: float) -> bool:
    """Wait until there is something to read, or the writer is gone. poll() takes descriptors above 1023, too."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _lock_memory() -> None:
    """A page that had to be read from, or written to, a frozen disk would be a deadlock."""
    _libc.mlockall(_MCL_CURRENT_AND_FUTURE)


def _leave_control_group() -> None:
    for root in (
        "/sys/fs/cgroup/cgroup.procs",
        "/sys/fs/cgroup/systemd/cgroup.procs",
        "/sys/fs/cgroup/unified/cgroup.procs",
    ):
        with suppress(OSError):
            fd = os.open(root, os.O_WRONLY)
            try:
                os.write(fd, b"0\n")
            finally:
                os.close(fd)
