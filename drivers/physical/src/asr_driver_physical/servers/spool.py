"""The spool: what is kept of a server's view, so that it outlives the engine.

A directory for each server: one sparse file for each disk, and `view.json`, written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from asr_driver_physical.errors import SpoolFull

__all__ = ["Spool", "ViewRecord"]


@attrs.define
class ViewRecord:
    """A view as the spool keeps it. `disks`: as the agent reported them; `held`: ranges whose content is in the spool,
    none as long as it is `live`."""

    view_id: str
    live: bool
    taken_at: float
    consistency: str
    marks: dict[str, list[Any]]
    machine: dict[str, Any]
    disks: list[dict[str, Any]]
    held: dict[str, list[list[int]]]


class Spool:
    """The stored view of one server; at most one at a time."""

    def __init__(self, root: Path, server: str, limit: int) -> None:
        self._root, self._server, self._limit = root, server, limit
        self.path = root / server

    def load(self, view_id: str) -> ViewRecord | None:
        """The view of that id, if it is kept."""
        try:
            record = ViewRecord(**json.loads((self.path / "view.json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return record if record.view_id == view_id else None

    def save(self, record: ViewRecord) -> None:
        """Durable when it returns."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        fresh = self.path / "view.json.new"
        with fresh.open("w") as file:
            json.dump(attrs.asdict(record), file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path / "view.json")
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def clear(self) -> None:
        """Delete the view."""
        if self.path.exists():
            with contextlib.suppress(FileNotFoundError):
                (self.path / "view.json").unlink()  # first: an incomplete view is invalid
            shutil.rmtree(self.path, ignore_errors=True)

    def used(self) -> int:
        """Bytes that the spool's views take, of all servers."""
        files = (path for path in self._root.glob("*/*.data"))
        return sum(path.stat().st_blocks * 512 for path in files)

    def put(self, number: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Write pieces of a disk. Raises SpoolFull."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        with self._alone():
            if self.used() + sum(len(data) for _, data in pieces) > self._limit:
                raise SpoolFull(where=str(self._root), server=self._server, detail=f"its limit is {self._limit} bytes")
            fd = os.open(self._file(number), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                for offset, data in pieces:
                    done = 0
                    while done < len(data):
                        done += os.pwrite(fd, data[done:], offset + done)
            except OSError as problem:
                raise SpoolFull(where=str(self._root), server=self._server, detail=str(problem)) from problem
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other view, of this process or another, takes space meanwhile: each would see the same free space."""
        with (self._root / "room.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def sync(self, number: int) -> None:
        """Make a disk's pieces durable."""
        if self._file(number).exists():
            fd = os.open(self._file(number), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def reader(self, number: int) -> int:
        """A descriptor to read a disk's pieces with; the caller closes it."""
        return os.open(self._file(number), os.O_RDONLY | os.O_CLOEXEC)

    def _file(self, number: int) -> Path:
        return self.path / f"{number}.data"
