"""Digests of recovery points: what each cycle changed, block by block, in one file for each sealed point.

A file says of the blocks that its cycle touched which digest they have; of all others an older file does. So a point is
looked up from the oldest file to its own, and costs what its cycle wrote: 16 bytes for 64 KiB. The file of a point that
was deleted is merged into the next newer one.

Nothing depends on these files: one that is missing or damaged only means that the digests of the blocks that it covers,
or would cover, are not known. They are recorded again by the next cycle that writes the blocks, or by `learn`.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from asr_storage.files.durable import fsync_directory
from asr_storage.replica.blocks import Blocks, State, block_count
from asrcore.driver import DIGEST_BLOCK, DIGEST_SIZE, zero_digest
from asrcore.model.extent import Extent

__all__ = ["UNKNOWN_DIGEST", "DigestFile", "PointDigests", "merged", "to_merge", "unknown_runs", "write"]

UNKNOWN_DIGEST = bytes(DIGEST_SIZE)
"""In place of the digest of a block whose digest is not known; no block has it."""

_MAGIC = b"asr-digests 1\n"
_RUN = struct.Struct("<QQB7x")  # first block, the block behind the last, state
_LENGTH = struct.Struct("<I")
_MANY = 32  # files of deleted points: from here on the smallest pair is merged, whatever it costs
_WORTH = 4  # a file is merged into a newer one that is at least this share of it: each byte is then copied few times
_MAPPED = 16 << 20  # bytes of a file that is mapped and not read: digests of disks of 64 GiB and more
_CHECKED_SECONDS = 3600.0
_MOST_CHECKED = 4096
_checked: dict[tuple[int, ...], float] = {}
"""When the checksum of a version of a file was right: a point that is read in many parts is looked up in each."""


# -- files ---------------------------------------------------------------------------------------------------------


class _Disk(msgspec.Struct):
    disk: str
    size: int
    runs: int
    digests: int  # bytes


def write(path: Path, disks: Mapping[str, Blocks]) -> None:
    """Replace a file of digests, durably. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    tables: list[_Disk] = []
    body: list[bytes | memoryview] = []
    for disk_id, blocks in disks.items():
        runs, digests = bytearray(), list[memoryview]()
        for start, end, state, parts in blocks.joined():
            runs += _RUN.pack(start, end, state)
            digests += parts
        tables.append(_Disk(disk_id, blocks.size, len(runs) // _RUN.size, sum(len(part) for part in digests)))
        body += [bytes(runs), *digests]
    head = msgspec.json.encode(tables)
    checksum = 0
    with open(temporary, "wb", opener=_private) as file:
        for part in (_MAGIC, _LENGTH.pack(len(head)), head, *body):
            checksum = zlib.crc32(part, checksum)
            file.write(part)
        file.write(_LENGTH.pack(checksum))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_directory(path.parent)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


class DigestFile:
    """A file of digests that is read."""

    def __init__(self, disks: dict[str, Blocks], size: int) -> None:
        """Use `read` instead. `size`: bytes of the file."""
        self.disks = disks
        self.size = size

    @classmethod
    def read(cls, path: Path) -> DigestFile | None:
        """None where it is missing or damaged."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                # What is mapped stays open, and takes its space, until the last reader is forgotten.
                small = status.st_size < _MAPPED
                content = memoryview(file.read() if small else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            now = time.monotonic()
            checked = now - _checked.get(version, -_CHECKED_SECONDS) < _CHECKED_SECONDS
            found = cls(_parsed(content, checked=checked), len(content))
            if not checked:
                if len(_checked) >= _MOST_CHECKED:
                    _checked.clear()
                _checked[version] = now
            return found
        except (OSError, ValueError, struct.error):
            return None


def _parsed(content: memoryview, *, checked: bool) -> dict[str, Blocks]:
    """`checked`: its checksum is known to be right. Raises ValueError, struct.error."""
    end = len(content) - _LENGTH.size
    if bytes(content[: len(_MAGIC)]) != _MAGIC:
        raise ValueError("no file of digests")
    if not checked and zlib.crc32(content[:end]) != _LENGTH.unpack_from(content, end)[0]:
        raise ValueError("damaged")
    at = len(_MAGIC) + _LENGTH.size
    length: int = _LENGTH.unpack_from(content, len(_MAGIC))[0]
    tables = msgspec.json.decode(content[at : at + length], type=list[_Disk])
    at += length
    disks: dict[str, Blocks] = {}
    for table in tables:
        runs = content[at : at + table.runs * _RUN.size]
        at += len(runs)
        digests = content[at : at + table.digests]
        at += table.digests
        blocks, used = Blocks(table.size), 0
        for start, behind, number in _RUN.iter_unpack(runs):
            state = State(number)
            length = (behind - start) * DIGEST_SIZE if state is State.KNOWN else 0
            blocks.runs.append((start, behind, state, digests[used : used + length]))
            used += length
        disks[table.disk] = blocks
    return disks


def merged(older: DigestFile, newer: DigestFile) -> dict[str, Blocks]:
    """What both say together, as of the newer one."""
    result: dict[str, Blocks] = {}
    for disk_id, blocks in newer.disks.items():
        both = Blocks(blocks.size)
        if disk_id in older.disks:
            both.size = older.disks[disk_id].size
            both.runs = list(older.disks[disk_id].runs)
            both.resize(blocks.size)
            for run in blocks.runs:
                both.put(*run)
        else:  # it is new, or its content is: what lies below it is not its own
            both.put(0, block_count(blocks.size), State.UNKNOWN)
            for run in blocks.runs:
                both.put(*run)
        result[disk_id] = both
    return result


def to_merge(names: Sequence[str], alive: frozenset[str] | set[str], size: Callable[[str], int]) -> int | None:
    """Position of a file of a deleted point that is due to be merged into the next newer one; None if none is.

    `names` oldest first; `alive` have a point; `size` gives a file's bytes.
    """
    dead = [at for at, name in enumerate(names[:-1]) if name not in alive]
    if not dead:
        return None
    sizes = {at: (size(names[at]), size(names[at + 1])) for at in dead}
    due = min(dead, key=lambda at: sum(sizes[at]))
    worth = [at for at in dead if sizes[at][0] <= _WORTH * sizes[at][1]]
    if worth:
        return min(worth, key=lambda at: sum(sizes[at]))
    return due if len(dead) > _MANY else None


# -- looking up ------------------------------------------------------------------------------------------------------


class PointDigests:
    """Digests of a disk at a point: `files` are those of the points up to it, oldest first, None for one that is
    missing or damaged."""

    def __init__(self, files: Iterable[DigestFile | None], disk_id: str, size: int) -> None:
        self.size = size
        self._layers: list[Blocks] = []
        for file in files:
            blocks = file.disks.get(disk_id) if file is not None else None
            if blocks is None:
                self._layers.clear()  # from here on only what newer files say is known
            else:
                self._layers.append(blocks)
        if self._layers and self._layers[-1].size != size:
            self._layers.clear()

    def look_up(self, extent: Extent) -> bytearray:
        """DIGEST_SIZE bytes for each block of an extent that starts at a block; UNKNOWN_DIGEST where not known."""
        first, last = extent.offset // DIGEST_BLOCK, block_count(extent.end)
        table = bytearray(UNKNOWN_DIGEST * (last - first))
        size = None
        for blocks in self._layers:
            if size is not None and blocks.size != size:
                lost = max(first, min(size, blocks.size) // DIGEST_BLOCK)
                if lost < last:
                    table[(lost - first) * DIGEST_SIZE :] = UNKNOWN_DIGEST * (last - lost)
            size = blocks.size
            for start, end, state, digests in blocks.within(first, last):
                at, behind = (start - first) * DIGEST_SIZE, (end - first) * DIGEST_SIZE
                if state is State.KNOWN:
                    table[at:behind] = digests
                else:
                    table[at:behind] = (zero_digest() if state is State.ZERO else UNKNOWN_DIGEST) * (end - start)
        return table


def unknown_runs(digests: bytearray) -> list[tuple[int, int]]:
    """Runs of blocks, by number, whose digests are not known."""
    runs: list[tuple[int, int]] = []
    if UNKNOWN_DIGEST not in digests:
        return runs
    for at in range(0, len(digests), DIGEST_SIZE):
        if digests[at : at + DIGEST_SIZE] == UNKNOWN_DIGEST:
            block = at // DIGEST_SIZE
            if runs and runs[-1][1] == block:
                runs[-1] = (runs[-1][0], block + 1)
            else:
                runs.append((block, block + 1))
    return runs
