"""Raw images are read without the page cache where possible, and correctly where it is not."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asr_storage.files.sparse import DirectFile
from asr_storage.replica.store import ReplicaKind
from asrcore.driver import digest_of, page_buffer
from asrcore.model.extent import Extent

KIB, MIB = 1024, 1024 * 1024
CONTENT = random.Random(7).randbytes(4 * MIB - 512)
"""A file of whole sectors, but not of whole pages."""
Make = Callable[..., Any]


@pytest.fixture
def opened() -> Iterator[Callable[[Path], DirectFile]]:
    """Opens files, and closes them."""
    found: list[DirectFile] = []

    def open_file(path: Path) -> DirectFile:
        found.append(DirectFile(path))
        return found[-1]

    yield open_file
    for file in found:
        file.close()
        file.close()


def _durable(path: Path, content: bytes) -> Path:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def _cached(path: Path) -> int:
    """The number of a file's pages in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        reported = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), reported)
        del start
        assert failed == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in reported)


def test_reads_without_the_page_cache(small: Path, opened: Callable[[Path], DirectFile]) -> None:
    path = _durable(small / "image", CONTENT)
    with page_buffer(len(CONTENT) // MIB * MIB) as buffer:
        opened(path).read_into(0, buffer)
        assert buffer == CONTENT[: len(buffer)]
    assert _cached(path) == 0


def test_leaves_in_memory_what_others_have_there(small: Path, opened: Callable[[Path], DirectFile]) -> None:
    path = _durable(small / "image", CONTENT)
    path.read_bytes()
    before = _cached(path)
    assert before > len(CONTENT) // mmap.PAGESIZE // 2  # otherwise the test would prove nothing
    with page_buffer(MIB) as buffer:
        opened(path).read_into(0, buffer)
    assert _cached(path) >= before


@pytest.mark.parametrize(
    ("offset", "length", "shift"),
    [
        (0, MIB, 1),  # memory that is not page-aligned
        (4096, MIB, 16),
        (512, MIB, 0),
        (100, 1000, 0),  # not sector-aligned
        (0, 1, 0),
        (len(CONTENT) - MIB, MIB, 0),
        (len(CONTENT) // 4096 * 4096, 4096, 0),  # extends beyond the end of the file
        (3 * MIB, 2 * MIB, 0),
        (len(CONTENT) + MIB, MIB, 0),  # completely beyond the end
    ],
)
def test_any_buffer_at_any_place(
    small: Path, opened: Callable[[Path], DirectFile], offset: int, length: int, shift: int
) -> None:
    path = _durable(small / "image", CONTENT)
    with page_buffer(length + shift) as memory:
        buffer = memory[shift:]
        buffer[:] = b"?" * length
        opened(path).read_into(offset, buffer)
        assert buffer == CONTENT[offset : offset + length].ljust(length, b"\0")


@pytest.mark.parametrize("refused", ["open", "preadv"])
def test_a_file_system_that_has_no_such_way(
    small: Path, opened: Callable[[Path], DirectFile], monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    path = _durable(small / "image", CONTENT)
    calls = []

    def open_none(name: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            calls.append(name)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os_open(name, flags, *rest, **options)

    def preadv_none(fd: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            calls.append(fd)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return os_preadv(fd, buffers, offset)

    os_open, os_preadv = os.open, os.preadv
    monkeypatch.setattr(os, refused, open_none if refused == "open" else preadv_none)
    with page_buffer(MIB) as buffer:
        opened(path).read_into(MIB, buffer)
        assert buffer == CONTENT[MIB : 2 * MIB]
    monkeypatch.undo()
    assert calls
    assert _cached(path) == 0  # nothing is left in the cache


def test_another_error_is_told(
    small: Path, opened: Callable[[Path], DirectFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = opened(_durable(small / "image", CONTENT))
    monkeypatch.setattr(os, "preadv", broken)
    with page_buffer(MIB) as buffer, pytest.raises(OSError, match=os.strerror(errno.EIO)):
        file.read_into(0, buffer)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Each read that returned data: whether it bypassed the page cache, and its bytes."""
    found: list[tuple[bool, int]] = []

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        count = os_preadv(fd, buffers, offset)
        found.append((bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT), count))
        return count

    os_preadv = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    return found


def test_private_memory_is_filled_by_the_page_cache(
    small: Path, opened: Callable[[Path], DirectFile], reads: list[tuple[bool, int]]
) -> None:
    """A concurrent fork would lose data that are read directly."""
    path = _durable(small / "image", CONTENT)
    memory = bytearray(MIB + mmap.PAGESIZE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % mmap.PAGESIZE  # direct reads need that
    buffer = memoryview(memory)[start : start + MIB]
    opened(path).read_into(MIB, buffer)
    assert buffer == CONTENT[MIB : 2 * MIB]
    assert reads == [(False, MIB)]


def test_of_a_disk_that_ends_within_a_sector_only_the_end_is_read_by_the_page_cache(
    small: Path, opened: Callable[[Path], DirectFile], reads: list[tuple[bool, int]]
) -> None:
    path = _durable(small / "image", CONTENT)
    with page_buffer(MIB + 100) as buffer:
        opened(path).read_into(0, buffer)
        assert buffer == CONTENT[: MIB + 100]
    assert reads == [(True, MIB), (False, 100)]


def test_no_descriptor_is_left(small: Path) -> None:
    path = _durable(small / "image", CONTENT)
    file = DirectFile(path)
    assert _descriptors(path) == 2
    file.close()
    assert _descriptors(path) == 0
    with pytest.raises(FileNotFoundError):
        DirectFile(small / "nothing")


def test_a_check_sees_what_the_disk_holds(bench: Make, tmp_path: Path, tools: Any) -> None:
    """A block of the replica is damaged below the file system while the page cache still has the old content."""
    with tools.small_file_system(tmp_path, ReplicaKind.REFLINK) as home:
        one = bench(home, {"vda": 4 * MIB})
        one.cycle([("vda", 0, CONTENT[: 2 * MIB])])
        (image,) = home.glob("replicas/r1/**/vda*.raw")
        block = Extent(MIB + 128 * KIB, 64 * KIB)
        good = CONTENT[block.offset : block.end]
        assert one.replica.digests("vda", block) == digest_of(good)
        assert image.read_bytes()[block.offset : block.end] == good  # now it is in the page cache
        with home.with_name("xfs.img").open("r+b") as below:
            below.seek(_place_on_disk(image, block.offset))
            below.write(b"rot")
        assert image.read_bytes()[block.offset : block.end] == good
        assert one.replica.digests("vda", block) == digest_of(b"rot" + good[3:])
        with one.replica.reader("vda") as reader, page_buffer(block.length) as buffer:
            reader.read_into(block.offset, buffer)
            assert buffer == b"rot" + good[3:]


def _descriptors(path: Path) -> int:
    """How many open descriptors of this process refer to the file."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of this loop itself
            found += link.readlink() == path
    return found


def _place_on_disk(path: Path, offset: int) -> int:
    """The physical place of this byte of a file, as filefrag reports it."""
    reported = subprocess.run(
        ["filefrag", "-e", "-b4096", path], check=True, capture_output=True, text=True, timeout=20
    ).stdout
    for start, end, place in re.findall(r"^\s*\d+:\s+(\d+)\.\.\s*(\d+):\s+(\d+)\.\.", reported, re.MULTILINE):
        if int(start) <= offset // 4096 <= int(end):
            return (int(place) - int(start)) * 4096 + offset
    raise AssertionError(f"no place of {offset} in\n{reported}")
