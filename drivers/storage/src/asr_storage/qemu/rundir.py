"""Private directories for sockets, deleted with their process: what a killed one left is deleted by the next."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["private_directory"]

_PREFIX = "asr-qemu-"
_swept: set[Path] = set()
_sweeping = threading.Lock()


@contextmanager
def private_directory(parent: Path | None = None) -> Iterator[Path]:
    """A directory that only its owner may enter, under PARENT (default: the system's for temporary files).

    Raises OSError.
    """
    base = parent or Path(tempfile.gettempdir())
    _sweep_once(base)
    # Locked before it has its name: no other process deletes it in between.
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=base))
    directory = hidden
    handle = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        directory = hidden.rename(base / hidden.name[1:])
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(handle)


def _sweep_once(base: Path) -> None:
    """Delete what ended processes have left there; the kernel released their locks."""
    with _sweeping:
        if base in _swept:
            return
        _swept.add(base)
    for left in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or deleted meanwhile
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(handle).st_uid == os.geteuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
            finally:
                os.close(handle)
