"""Sparse files, clones of files, and reads past the page cache: what Python's `os` lacks for them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
from collections import deque
from pathlib import Path

from asrcore.model.extent import Extent
from asrcore.units import MiB

__all__ = [
    "DirectFile",
    "SparseFile",
    "clone_file",
    "clones_files",
    "copy_range",
    "count_extents",
    "data_map",
    "rounded",
]

_FICLONE = 0x40049409
_FIEMAP = 0xC020660B
_FIEMAP_HEADER = struct.Struct("=QQIIII")  # start, length, flags, mapped extents, room for extents, reserved
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4
_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}  # not aligned to sectors of the disk or in memory, or not supported
_BLOCK = 4096  # no disk has larger sectors
_NO_CLONES = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS}

# Written pages are sent to the disk as they arrive and dropped from the cache this many bytes later: a copy of a large
# disk then neither fills the page cache nor ends in one long sync (measured: 0.87 of the time it takes when left to the
# kernel).
_BEHIND = 32 * MiB
# They are sent this many bytes at a time: a call for each small write costs more than the write (measured: 305 MiB in
# pieces of 64 KiB take 0.46 s instead of 0.59 s).
_TOGETHER = 4 * MiB

_libc = ctypes.CDLL(None, use_errno=True)  # foreign calls release the GIL
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def rounded(size: int) -> int:
    """Size of the image of a disk of `size` bytes: QEMU knows whole sectors of 512 bytes only."""
    return -(-size // 512) * 512


def clones_files(directory: Path) -> bool:
    """Whether the file system of an existing directory clones files, found by trying. Raises OSError."""
    source, copy = directory / f".probe-{os.getpid()}-{threading.get_ident()}", None
    try:
        source.write_bytes(bytes(4096))
        copy = source.with_name(source.name + "-copy")
        try:
            clone_file(source, copy)
        except OSError as problem:
            if problem.errno in _NO_CLONES:
                return False
            raise
        return True
    finally:
        for path in (source, copy):
            if path is not None:
                path.unlink(missing_ok=True)


def clone_file(source: Path, copy: Path) -> None:
    """Make `copy` share all blocks of `source`; durable. Raises OSError, with EOPNOTSUPP or EXDEV if impossible."""
    from_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        to_fd = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.ioctl(to_fd, _FICLONE, from_fd)
            os.fsync(to_fd)
        finally:
            os.close(to_fd)
    finally:
        os.close(from_fd)


def copy_range(source: int, target: int, offset: int, length: int) -> None:
    """Copy a range to the same place of another file inside the kernel.

    On XFS and btrfs whole blocks are shared, not copied: it needs no space, and including the sync it is 2-4 times as
    fast as writing (measured: 64 MiB in pieces of 64 KiB 0.05 s instead of 0.13 s, of 1 MiB 0.017 s instead of 0.06 s).
    """
    end = offset + length
    while offset < end:
        copied = os.copy_file_range(source, target, end - offset, offset, offset)
        if copied == 0:
            raise OSError(errno.EIO, f"the file ends at {offset}, before {end}")
        offset += copied


def count_extents(path: Path) -> int:
    """In how many pieces a file lies on its disk; 0 where the file system does not report it. Raises OSError."""
    request = bytearray(_FIEMAP_HEADER.pack(0, 2**64 - 1, 0, 0, 0, 0))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _FIEMAP, request)
    except OSError as problem:
        if problem.errno in _NO_CLONES:
            return 0
        raise
    finally:
        os.close(fd)
    return int(_FIEMAP_HEADER.unpack(request)[3])


def data_map(fd: int, start: int, end: int) -> list[Extent]:
    """A range of a file without gaps, holes (and what lies behind its end) as `zero`."""
    result: list[Extent] = []
    at = start
    while at < end:
        try:
            data = min(os.lseek(fd, at, os.SEEK_DATA), end)
        except OSError as problem:
            if problem.errno != errno.ENXIO:  # ENXIO: no data from here on
                raise
            data = end
        if data > at:
            result.append(Extent(at, data - at, zero=True))
        at = min(os.lseek(fd, data, os.SEEK_HOLE), end) if data < end else end
        if at > data:
            result.append(Extent(data, at - data))
    return result


class SparseFile:
    """A raw sparse file, written and read at offsets by several threads."""

    def __init__(self, path: Path, *, write: bool) -> None:
        """With `write` the file is created where it is missing. Raises OSError."""
        self.path = path
        self.fd = os.open(path, (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY) | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._behind: deque[tuple[int, int]] = deque()
        self._behind_bytes = 0
        self._unsent = 0
        self._failed: OSError | None = None

    def grow(self, size: int) -> None:
        """Make the file at least `size` bytes long."""
        if os.fstat(self.fd).st_size < size:
            os.ftruncate(self.fd, size)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of it; the pages go to the disk soon, without waiting, and are dropped some time later."""
        length = len(data)
        at = offset
        while data:
            written = os.pwrite(self.fd, data, at)
            at += written
            data = data[written:]
        self._push(offset, length)

    def _push(self, offset: int, length: int) -> None:
        old: list[tuple[int, int]] = []
        with self._lock:
            self._unsent += length
            due = self._unsent >= _TOGETHER
            if due:
                self._unsent = 0
            self._behind.append((offset, length))
            self._behind_bytes += length
            while self._behind_bytes > _BEHIND:
                old.append(self._behind.popleft())
                self._behind_bytes -= old[-1][1]
        if due:
            _libc.sync_file_range(self.fd, 0, 0, _SYNC_WRITE)  # a hint: its failure shows in fdatasync
        for start, count in old:
            if _libc.sync_file_range(self.fd, start, count, _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER):
                self._note_failure(ctypes.get_errno())
            os.posix_fadvise(self.fd, start, count, os.POSIX_FADV_DONTNEED)

    def _note_failure(self, number: int) -> None:
        # Waiting for a write consumes its error: fdatasync on this descriptor would not report it again.
        if number not in (errno.EINVAL, errno.ESPIPE, errno.ENOSYS):
            self._failed = OSError(number, os.strerror(number), str(self.path))
            raise self._failed

    def punch(self, offset: int, length: int) -> None:
        """Make a range a hole: it reads as zeroes and takes no space. The size stays."""
        if length and _libc.fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self.path))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; what lies behind the end of the file is zeroes."""
        _read(self.fd, offset, buffer)

    def sync(self) -> None:
        """Make all that was written durable. After a failure it never succeeds again: the file must be reopened."""
        if self._failed is not None:
            raise self._failed
        os.fdatasync(self.fd)

    def close(self) -> None:
        """May be called twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class DirectFile:
    """A file that is read from end to end: into a `page_buffer` past the page cache, where its file system can do that.

    So a check reads what the disk holds, not what memory still has of it; other pages stay in the cache; and the
    processor copies less (measured, medians of 9 and 14 resyncs of 2 GiB: 0.85 and 0.90 s of processor time, through
    the page cache 1.41 and 1.47 s).
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # EINVAL: the file system has no direct reads (tmpfs before Linux 6.6); read through the cache
            self._direct = -1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; what lies behind the end of the file is zeroes."""
        done = self._past_cache(offset, buffer)
        left = len(buffer) - done
        if left:
            _read(self._cached, offset + done, buffer[done:])
            # What is read once must not push other pages out of memory.
            os.posix_fadvise(self._cached, offset + done, left, os.POSIX_FADV_DONTNEED)

    def _past_cache(self, offset: int, buffer: memoryview) -> int:
        """Bytes that were read directly: up to the end of the file or its last whole block, or none."""
        if self._direct < 0 or not isinstance(buffer.obj, mmap.mmap):  # see `page_buffer`: not into private memory
            return 0
        done, end = 0, len(buffer)
        while done < end:
            try:
                count = os.preadv(self._direct, [buffer[done:end]], offset + done)
            except OSError as problem:
                if problem.errno not in _NOT_DIRECT:
                    raise
                if end % _BLOCK == 0:
                    break
                end -= end % _BLOCK  # a disk may end within a block
                continue
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        """May be called twice."""
        for fd in (self._cached, self._direct):
            if fd >= 0:
                os.close(fd)
        self._cached = self._direct = -1


def _read(fd: int, offset: int, buffer: memoryview) -> None:
    while buffer:
        count = os.preadv(fd, [buffer], offset)
        if count == 0:
            buffer[:] = bytes(len(buffer))
            return
        buffer = buffer[count:]
        offset += count
