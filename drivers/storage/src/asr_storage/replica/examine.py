"""Looking for damage in a recovery point: its files and chain, and its content by the digests that were recorded."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator, Mapping
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

__all__ = ["damage_of_files", "examine_content", "forget_cached", "sample_content"]

SAMPLES = 48
"""Blocks of each disk that a quick look reads: half a second where each read costs 10 ms."""
_PIECE = 4 * MiB
_MOST_NAMED = 4  # places of damage that are named for each disk and part
# Metadata of an image: 8 bytes for each 64 KiB, at 5 MiB/s.
_CHECK_SECONDS = 120.0


# -- files -----------------------------------------------------------------------------------------------------------


def damage_of_files(home: Path, record: Record, point: Point, *, tables: bool) -> list[str]:
    """What is wrong with the images of a point and all that they stand on; with `tables` also with the structure of
    layers, for which QEMU's tools need a tenth of a second each. Nothing may write them meanwhile."""
    damage: list[str] = []
    for disk_id, image in sorted(point.images.items()):
        path = layers.path(record, image)
        for number, name in enumerate(path):
            layer = record.layers.get(name)
            size = point.stored.disks[disk_id] if number == 0 else layer.size if layer else 0
            wrong = _damage_of_image(home, name, size, path[number + 1 :] if tables else None)
            damage += [f"disk {disk_id}: {name}: {text}" for text in wrong]
    return damage


def _damage_of_image(home: Path, name: str, size: int, below: list[str] | None) -> Iterator[str]:
    path = home / name
    try:
        status = path.lstat()
        os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError as problem:
        yield problem.strerror or str(problem)
        return
    if not stat.S_ISREG(status.st_mode):
        yield "is not a regular file"
    elif name.endswith(".raw"):
        if status.st_size < rounded(size):
            yield f"has {status.st_size} bytes instead of {rounded(size)}"
    elif below is not None:
        yield from _damage_of_qcow2(path, size, below)


def _damage_of_qcow2(path: Path, size: int, below: list[str]) -> Iterator[str]:
    """Its header, the backing file that it names, and its tables, which name clusters within the file."""
    try:
        info = img.info(path, "qcow2", in_use=True)
        if info.virtual_size < size:
            yield f"is an image of {info.virtual_size} bytes instead of {size}"
        # Not only the next one: a layer that is being merged is left out before the record says so.
        if info.backing_file not in {Path(name).name for name in below}:
            yield f"has the backing file {info.backing_file!r}, which is no layer below it"
        found = img.check(path, "qcow2", in_use=True, timeout=_CHECK_SECONDS)
    except QemuError as problem:
        yield str(problem)
        return
    if info.corrupt or not found.sound:
        yield f"qemu-img check finds {found.corruptions} corruptions"


def forget_cached(home: Path, record: Record, point: Point) -> None:
    """Make the next reads of a point come from the disk: QEMU reads the layers of a chain through the page cache."""
    for image in point.images.values():
        for name in layers.path(record, image):
            try:
                fd = os.open(home / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # it is missing or was merged: found where it is read
                continue
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
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
