"""Sparse image files, and records that are replaced as a whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from asrcore.driver import DiskReader
from asrcore.errors import AsrError, DriverFailed, TargetFull, TargetReadOnly
from asrcore.model.extent import Extent, clip, subtract

__all__ = ["FileReader", "allocated", "build", "data", "load", "save", "storage_errors", "sync"]

T = TypeVar("T")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


def save(file: Path, value: object) -> None:
    """Replace a record at once and durably: after a crash it is the old one or the new one."""
    new = file.with_name(f".{file.name}.new")
    new.write_bytes(msgspec.json.encode(value))
    sync(new)
    new.replace(file)
    sync(file.parent)


def load(kind: type[T], file: Path) -> T | None:
    """The record that `save` wrote, or None if there is none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except FileNotFoundError:
        return None


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def data(image: Path) -> list[Extent]:
    """Where an image holds data. The rest are holes, which read as zeroes and take no space."""
    found: list[Extent] = []
    end = 0
    with image.open("rb") as opened:
        try:
            while True:
                start = os.lseek(opened.fileno(), end, os.SEEK_DATA)
                end = os.lseek(opened.fileno(), start, os.SEEK_HOLE)
                found.append(Extent(start, end - start))
        except OSError as problem:
            if problem.errno != errno.ENXIO:  # that one says: no data behind `end`
                raise
    return found


def allocated(image: Path, size: int) -> list[Extent]:
    """The whole disk without gaps: data, and holes as `zero`."""
    there = data(image)
    return sorted([*there, *subtract([Extent(0, size, zero=True)], there)])


def build(image: Path, size: int, *parts: tuple[Path, Iterable[Extent]]) -> None:
    """Make a durable image of extents of others. On XFS and btrfs it shares their blocks, and nothing is copied."""
    with image.open("wb") as out:
        out.truncate(size)
        for source, extents in parts:
            with source.open("rb") as opened:
                for extent in clip(extents, size):
                    _copy(opened.fileno(), out.fileno(), extent)
        os.fsync(out.fileno())


def _copy(source: int, target: int, extent: Extent) -> None:
    at = extent.offset
    while at < extent.end:
        copied = os.copy_file_range(source, target, extent.end - at, at, at)
        if not copied:
            raise OSError(errno.EIO, f"the image ended at {at} while it was copied")
        at += copied


@contextmanager
def storage_errors(site: str, where: Path) -> Iterator[None]:
    """Say in the catalogue's words why something could not be written."""
    try:
        yield
    except OSError as problem:
        if problem.errno in _FULL:
            raise TargetFull(where=where, detail=problem) from problem
        if problem.errno in _FORBIDDEN:
            raise TargetReadOnly(where=where, detail=problem) from problem
        raise DriverFailed(operation="writing", site=site, detail=problem) from problem


class FileReader(DiskReader):
    """Reads an image; `lost` makes the error for one that is not there, or too short."""

    def __init__(self, image: Path, lost: Callable[[str], AsrError]) -> None:
        self._lost = lost
        try:
            self._file = image.open("rb")
        except FileNotFoundError as problem:
            raise lost(f"{image} is gone") from problem

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._file.seek(offset)
        if self._file.readinto(buffer) != len(buffer):
            raise self._lost(f"{self._file.name} ends within {len(buffer)} bytes at {offset}")

    def close(self) -> None:
        self._file.close()
