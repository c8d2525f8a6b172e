"""Raw sparse images: making, growing, applying a journal, reading."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from asr_storage.files.durable import fsync_directory
from asr_storage.files.sparse import DirectFile, SparseFile, copy_range, data_map, rounded
from asr_storage.replica.journal import Change, Kind
from asr_storage.replica.store import Shared
from asrcore.driver import DiskReader
from asrcore.errors import ReplicaDamaged
from asrcore.model.extent import Extent

__all__ = ["RawReader", "allocated", "apply", "create", "grow"]


def create(path: Path, size: int) -> None:
    """A new image of zeroes, durable; an existing one of that name (left by a crash) is emptied."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, rounded(size))
        os.fsync(fd)
    finally:
        os.close(fd)
    fsync_directory(path.parent)


def grow(path: Path, size: int) -> None:
    """Make an image large enough for `size` bytes, durably."""
    if path.stat().st_size >= rounded(size):
        return
    file = SparseFile(path, write=True)
    try:
        file.grow(rounded(size))
        os.fsync(file.fd)
    finally:
        file.close()


def apply(path: Path, changes: Sequence[Change], data: Path) -> None:
    """Bring data and zeroes into an image, durably."""
    if not any(change.kind in (Kind.DATA, Kind.ZERO) for change in changes):
        return
    source = -1
    file = SparseFile(path, write=True)
    try:
        for change in changes:
            if change.kind is Kind.ZERO:
                file.punch(change.offset, change.length)
            elif change.kind is Kind.DATA:
                if source < 0:
                    source = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
                copy_range(source, file.fd, change.offset, change.length)
        os.fsync(file.fd)
    finally:
        file.close()
        if source >= 0:
            os.close(source)


def allocated(path: Path, extent: Extent) -> list[Extent]:
    """All of the extent without gaps, holes as `zero`."""
    file = SparseFile(path, write=False)
    try:
        return data_map(file.fd, extent.offset, extent.end)
    finally:
        file.close()


class RawReader(DiskReader):
    """Reads a raw image; reopens it when the replica's images changed."""

    def __init__(self, home: Path, find: Callable[[], str], shared: Shared, replica_id: str) -> None:
        self._home, self._find, self._shared, self._replica_id = home, find, shared, replica_id
        self._file: DirectFile | None = None
        self._generation = -1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises ReplicaDamaged when the image is missing or cannot be read."""
        with self._shared.gate.reading() as generation:
            self.read_now(offset, buffer, generation)

    def read_now(self, offset: int, buffer: memoryview, generation: int) -> None:
        """The same, for a caller that is reading already."""
        try:
            if self._file is None or generation != self._generation:
                self.close()
                self._file = DirectFile(self._home / self._find())
                self._generation = generation
            self._file.read_into(offset, buffer)
        except OSError as problem:
            raise ReplicaDamaged(replica=self._replica_id, detail=str(problem)) from problem

    def close(self) -> None:
        """May be called twice."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
