"""One engine per vault, where that is a file. The kernel releases the lock when the process dies."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asrcore.errors import VaultInUse

__all__ = ["STARTING", "UseLock", "holder_of_file", "lock_file"]

STARTING = "an engine that is just starting"
_TRIES, _PAUSE = 10, 0.02  # a process that asks for the holder has the lock shared for microseconds


@contextmanager
def lock_file(path: Path, holder: str) -> Iterator[None]:
    """Hold the lock, with the holder's text in the file. Raises VaultInUse, OSError.

    The file stays for ever: removing it would let two processes lock two files of one name.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _lock(descriptor):
            raise VaultInUse(holder=_text(descriptor))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode("utf-8", "replace"), 0)
        try:
            yield
        finally:
            with suppress(OSError):  # the text is only informative; the lock ends with the descriptor
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


class UseLock:
    """Shared by all that have a vault open; `vault move` needs it exclusively, so that nothing is written to the file
    that stays behind.

    It is a separate file: closing any descriptor of the database would drop SQLite's own locks on it (POSIX).
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError, and VaultInUse while the vault is being moved."""
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _lock(self._descriptor, fcntl.LOCK_SH):
            self.close()
            raise VaultInUse(holder="asr vault move")

    def alone(self) -> None:
        """Exclude all other processes until `close`. Raises VaultInUse while another one has the vault open."""
        if self._descriptor is None or not _lock(self._descriptor, fcntl.LOCK_EX):
            raise VaultInUse(holder="another `asr` command, or a program that has it open")

    def close(self) -> None:
        """Release; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            threading.Event().wait(_PAUSE)
        else:
            return True
    return False


def holder_of_file(path: Path) -> str | None:
    """Text of the process that holds the lock, or None. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _text(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 4096, 0).decode("utf-8", "replace") or STARTING
