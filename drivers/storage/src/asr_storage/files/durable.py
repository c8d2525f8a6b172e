"""Files and directories that survive a crash whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["fsync_directory", "fsync_file", "remove_left_over", "remove_tree", "write_durably"]


def fsync_directory(directory: Path) -> None:
    """Make created, renamed and removed names of a directory durable."""
    fsync_file(directory)


def fsync_file(path: Path) -> None:
    """Make a file's content durable, whoever wrote it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file in one step: afterwards, and after a crash at any moment, it is the old one or the new."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)
    fsync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a directory, durably, and never half of it under its own name: it is renamed first.

    `remove_left_over` deletes what a crash leaves of it.
    """
    if not path.exists():
        return
    gone = path.with_name(f".gone-{path.name}")
    if gone.exists():
        shutil.rmtree(gone)
    path.rename(gone)
    fsync_directory(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def remove_left_over(directory: Path) -> None:
    """Delete what an interrupted `remove_tree` left in a directory."""
    for path in directory.glob(".gone-*"):
        shutil.rmtree(path, ignore_errors=True)
