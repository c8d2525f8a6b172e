"""Looking for damage in a recovery point: its files and chain, and its content by the digests that were recorded."""

from __future__ import annotations

import errno
import logging
import os
import random
import stat
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import attrs

from asr_storage.files.sparse import rounded
from asr_storage.qemu import img
from asr_storage.qemu.process import QemuError
from asr_storage.replica import layers
from asr_storage.replica.blocks import Blocks, block_count
from asr_storage.replica.digests import UNKNOWN_DIGEST, PointDigests
from asr_storage.replica.store import Point, Record
from asrcore.driver import DIGEST_BLOCK, DIGEST_SIZE, Examination, examination_parts, zero_digest
from asrcore.errors import ReplicaDamaged
from asrcore.model.extent import Extent, split
from asrcore.model.watch import Watch
from asrcore.units import MiB

__all__ = ["damage_of_files", "examine_content", "forget_cached", "is_damage", "sample_content"]

_log = logging.getLogger(__name__)

SAMPLES = 48
"""Blocks of each disk that a quick look reads: half a second where each read costs 10 ms."""
_PIECE = 4 * MiB
_MOST_NAMED = 4  # places of damage that are named for each disk and part
CHECKED_LAYERS = 16
"""Newest layers of each disk whose tables are checked: each takes 0.03 s, with the replica's lock held."""
CHECK_SECONDS = 20.0
"""For the tables of all disks together: a failover waits for it. What is not checked then is read all the same."""
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EIO}
_OF_HOST = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE)
# Magic, version, backing file (offset, length), cluster bits, size, encryption, L1 table (entries, offset), refcount
# table (offset, clusters).
_HEADER = struct.Struct(">4sIQIIQIIQQI")


# -- files -----------------------------------------------------------------------------------------------------------


def damage_of_files(home: Path, record: Record, point: Point, *, tables: bool) -> list[str]:
    """What is wrong with the images of a point and all that they stand on; with `tables` QEMU's tools also look at the
    structure of the newest layers, as far as they get in CHECK_SECONDS. Nothing may write them meanwhile.

    Raises OSError where it is the host that could not look.
    """
    damage: list[str] = []
    sound: list[tuple[int, str, str]] = []
    for disk_id, image in sorted(point.images.items()):
        path = layers.path(record, image)
        for number, name in enumerate(path):
            layer = record.layers.get(name)
            size = point.stored.disks[disk_id] if number == 0 else layer.size if layer else 0
            wrong = _damage_of_image(home / name, size, path[number + 1 :])
            if wrong:
                damage.append(f"disk {disk_id}: {name}: {wrong}")
            elif tables and number < CHECKED_LAYERS and not name.endswith(".raw"):
                sound.append((number, disk_id, name))
    deadline = time.monotonic() + CHECK_SECONDS
    for _, disk_id, name in sorted(sound):  # the newest of each disk first
        seconds = deadline - time.monotonic()
        wrong = _damage_of_tables(home / name, seconds) if seconds > 0 else ""
        if wrong:
            damage.append(f"disk {disk_id}: {name}: {wrong}")
    return damage


def is_damage(problem: OSError) -> bool:
    """Whether a file is damaged that cannot be opened or read; else the host cannot do it now: it is out of files or of
    memory, its file system is not mounted, or asrcore may not."""
    return problem.errno in _DAMAGE


def _damage_of_image(path: Path, size: int, below: list[str]) -> str:
    """Whether it is there, long enough, and a layer on what the record says. "" if nothing is wrong."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            header = b"" if path.name.endswith(".raw") else os.pread(fd, _HEADER.size, 0)
            if len(header) == _HEADER.size:
                return _damage_of_header(fd, header, status.st_size, size, below)
        finally:
            os.close(fd)
    except OSError as problem:
        if is_damage(problem):
            return problem.strerror or str(problem)
        raise
    if not path.name.endswith(".raw"):
        return "is no qcow2 image"
    return "" if status.st_size >= rounded(size) else f"has {status.st_size} bytes instead of {rounded(size)}"


def _damage_of_header(fd: int, header: bytes, length: int, size: int, below: list[str]) -> str:
    """Of a qcow2 image: docs/interop/qcow2.txt of QEMU."""
    magic, version, name_at, name_length, _, virtual_size, _, l1_count, l1_at, table_at, _ = _HEADER.unpack(header)
    if magic != b"QFI\xfb" or version not in (2, 3):
        return "is no qcow2 image"
    if virtual_size < size:
        return f"is an image of {virtual_size} bytes instead of {size}"
    name = os.fsdecode(os.pread(fd, min(name_length, 1023), name_at)) if name_at else None
    # Not only the next one: a layer that is being merged is left out before the record says so.
    if name not in {Path(item).name for item in below}:
        return f"has the backing file {name!r}, which is no layer below it"
    if length < max(l1_at + 8 * l1_count, table_at + 8):
        return f"has {length} bytes and ends before its tables"
    return ""


def _damage_of_tables(path: Path, seconds: float) -> str:
    """What qemu-img finds in the tables of an image, which name clusters within the file; "" also if it cannot look."""
    try:
        info = img.info(path, "qcow2", in_use=True, timeout=seconds)
        found = img.check(path, "qcow2", in_use=True, timeout=seconds)
    except QemuError as problem:
        # Not started, killed or out of time.
        of_host = problem.exit_code is None or problem.exit_code < 0
        if of_host or any(os.strerror(number) in problem.output for number in _OF_HOST):
            _log.info("%s is not checked: %s", path, problem)
            return ""
        return str(problem)
    if info.corrupt or not found.sound:
        return f"qemu-img check finds {found.corruptions} corruptions"
    return ""


def forget_cached(
    home: Path, record: Record, point: Point, parts: Iterable[tuple[str, list[Extent]]], whole_layers: bool
) -> None:
    """Make the next reads of parts of a point come from the disk: QEMU reads the layers of a chain through the page
    cache. Where a part lies in a layer only its tables say: with `whole_layers` all of those is dropped."""
    for disk_id, extents in parts:
        for name in layers.path(record, point.images[disk_id]):
            raw = name.endswith(".raw")
            if not raw and not whole_layers:
                continue
            try:
                fd = os.open(home / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # it is missing or was merged: found where it is read
                continue
            try:
                for extent in extents if raw else [Extent(0, 0)]:  # 0 bytes: to the end
                    os.posix_fadvise(fd, extent.offset, extent.length, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


# -- content ---------------------------------------------------------------------------------------------------------


class Content(Protocol):
    """Points of a replica that can be read."""

    def stored_blocks(self, disk_id: str, extent: Extent, point_id: str | None) -> list[tuple[int, int]]:
        """Runs of whole blocks that hold data."""

    def stable_digests(self, disk_id: str, extent: Extent, point_id: str) -> bytes:
        """Digests of what the disk holds."""


def sample_content(replica: Content, point: Point, digests: Mapping[str, PointDigests]) -> Examination:
    """Compare both ends of each disk, and blocks at random, with what was recorded."""
    damage: list[str] = []
    read = proved = 0
    for disk_id, size in sorted(point.stored.disks.items()):
        try:
            for block in _samples(replica, disk_id, point.stored.id, size):
                piece = Extent(block * DIGEST_BLOCK, min(DIGEST_BLOCK, size - block * DIGEST_BLOCK))
                compared = _compare(replica, disk_id, point.stored.id, piece, digests[disk_id])
                read, proved = read + compared.read, proved + compared.proved
                if compared.damage:
                    damage += compared.damage
                    break
        except ReplicaDamaged as problem:
            damage.append(f"disk {disk_id}: {problem}")
    return Examination(tuple(damage), read, proved)


def _samples(replica: Content, disk_id: str, point_id: str, size: int) -> list[int]:
    """Blocks to be read: as many as can be of those that hold data."""
    count = block_count(size)
    chosen = {0, count - 1} if count else set()
    stored = replica.stored_blocks(disk_id, Extent(0, size), point_id)
    for _ in range(SAMPLES if stored else 0):
        start, end = random.choice(stored)
        chosen.add(random.randrange(start // DIGEST_BLOCK, block_count(end)))
    return sorted(chosen)


@attrs.define
class _Compared:
    """Of a part of a disk. `learned`: digests of blocks that had none."""

    damage: list[str] = attrs.field(factory=list)
    read: int = 0
    proved: int = 0
    learned: list[tuple[int, bytes]] = attrs.field(factory=list)


def examine_content(
    replica: Content, point: Point, digests: Mapping[str, PointDigests], start: int, limit: int | None, watch: Watch
) -> tuple[Examination, dict[str, Blocks]]:
    """Read a part of a point, and compare it with what was recorded. Also returns the digests of blocks that had none.

    Raises PointNotFound when the point is deleted meanwhile.
    """
    point_id = point.stored.id
    parts, end = examination_parts(point.stored.disks, start, limit)
    result = _Compared()
    learned: dict[str, Blocks] = {}
    for disk_id, extents in parts:
        blocks = Blocks(point.stored.disks[disk_id])
        try:
            for piece in split(extents, _PIECE):
                watch.check()
                compared = _compare(replica, disk_id, point_id, piece, digests[disk_id])
                result.damage += compared.damage
                result.read += compared.read
                result.proved += compared.proved
                for offset, found in compared.learned:
                    blocks.known(offset, memoryview(found))
                watch.advance(piece.length)
        except ReplicaDamaged as problem:
            result.damage.append(f"disk {disk_id}: {problem}")
        if blocks.runs:
            learned[disk_id] = blocks
    named = result.damage[:_MOST_NAMED]
    if len(result.damage) > len(named):
        named.append(f"and {len(result.damage) - len(named)} more places")
    return Examination(tuple(named), result.read, result.proved, end), learned


def _compare(replica: Content, disk_id: str, point_id: str, piece: Extent, digests: PointDigests) -> _Compared:
    """Blocks of a piece as they are now, against what was recorded."""
    found = replica.stable_digests(disk_id, piece, point_id)
    recorded = bytes(digests.look_up(piece))
    result = _Compared()
    for at in range(0, len(found), DIGEST_SIZE):
        offset = piece.offset + at // DIGEST_SIZE * DIGEST_BLOCK
        length = min(DIGEST_BLOCK, piece.end - offset)
        ours, theirs = recorded[at : at + DIGEST_SIZE], found[at : at + DIGEST_SIZE]
        if theirs != zero_digest():
            result.read += length
        if ours == UNKNOWN_DIGEST:
            result.learned.append((offset, theirs))
        elif ours == theirs:
            result.proved += length
        else:
            result.damage.append(f"disk {disk_id}: {length} bytes at {offset} are not as they were written")
    return result
