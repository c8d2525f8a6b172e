"""The system disk of a machine that is being created: its root is copied as it is uploaded, repaired, and what differs
is uploaded again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import attrs

from asr_driver_azure.blobs.digests import DigestTable
from asr_driver_azure.blobs.pageblob import MOST
from asr_driver_azure.repair.plan import plan
from asr_driver_azure.repair.rootfs import Image, NotUnderstood, Partition, RootFs, partitions
from asrcore.driver import DIGEST_BLOCK, Closing, block_digests, different_blocks
from asrcore.model.extent import Extent, align, intersect, split, subtract, total, union
from asrcore.units import MiB, format_size

__all__ = ["Repair", "Repaired"]

_EXT = ("ext2", "ext3", "ext4")
_ODD = (NotUnderstood, OSError, ValueError, KeyError)
"""Errors that a guest's disk may cause; none of them prevents creating the machine."""
_SPARE = 256 * MiB  # left free in the file system of the copies; repairs need a little


@attrs.frozen
class Repaired:
    """`reported`: what was changed and what was not, for people. `differs`: where the copy is no longer what was
    uploaded, in pieces of at most one put. `digests`: of the disk with that."""

    reported: tuple[str, ...]
    differs: tuple[Extent, ...]
    digests: DigestTable


class Repair(Closing):
    """The repair of one disk. The copies are unnamed files in the directory for temporary files, only of stored data.

    Whatever goes wrong leaves the disk as it was uploaded.
    """

    def __init__(self, size: int, stored: Sequence[Extent], read: Callable[[int, memoryview], None]) -> None:
        self._size = size
        self._copies: list[tuple[Partition, Extent, Image]] = []
        self._partitions: list[Partition] = []
        self._problem = ""
        self._opened = ExitStack()
        try:
            self._partitions = partitions(size, read)
            for partition in self._partitions:
                if partition.kind in _EXT:
                    self._open(partition, stored)
        except _ODD as problem:
            self._problem = str(problem)

    def _open(self, partition: Partition, stored: Sequence[Extent]) -> None:
        if partition.start % DIGEST_BLOCK:
            raise NotUnderstood(f"partition {partition.number} does not start at a multiple of 64 KiB")
        (place,) = align([Extent(partition.start, partition.size)], DIGEST_BLOCK, self._size)
        image = self._opened.enter_context(Image(place.length))
        self._copies.append((partition, place, image))
        wanted = sum(total(intersect(stored, [item])) for _, item, _ in self._copies)
        room = os.fstatvfs(image.file.fileno())
        if room.f_bavail * room.f_frsize < wanted + _SPARE:
            raise NotUnderstood(f"no room for a copy of {format_size(wanted)} in the directory for temporary files")

    def keep(self, piece: Extent, data: bytearray) -> None:
        """This is what was uploaded there. Thread-safe."""
        if self._problem:
            return
        try:
            for _, place, image in self._copies:
                for part in intersect([piece], [place]):
                    at = part.offset - piece.offset
                    image.put(part.offset - place.offset, data[at : at + part.length])
        except OSError as problem:
            self._problem = f"the copy could not be written: {problem.strerror}"

    def finish(self, sent: Sequence[Extent], digests: Mapping[int, bytes]) -> Repaired:
        """Repair the copy; what has to be uploaded again, from `read`."""
        before = DigestTable(self._size, list(sent), digests)
        try:
            partition, place, image = self._root()
            system = RootFs(image)
            system.settle()
            made = plan(
                system.look(partition.number, {item.number: item.uuid for item in self._partitions if item.uuid})
            )
            system.write(made.changes)
        except _ODD as problem:
            return Repaired((f"the system was not changed: {problem}",), (), before)
        reported = (
            *(f"{item.path}: {item.what}" for item in made.changes),
            *(f"unchanged: {item}" for item in made.left),
        )
        return self._differing(reported, place, image, sent, before) if made.changes else Repaired(reported, (), before)

    def read(self, extent: Extent) -> bytes:
        """Of the copy, as it is now."""
        ((place, image),) = [(place, image) for _, place, image in self._copies if intersect([extent], [place])]
        return image.read(Extent(extent.offset - place.offset, extent.length))

    def _root(self) -> tuple[Partition, Extent, Image]:
        if self._problem:
            raise NotUnderstood(self._problem)
        roots = [copy for copy in self._copies if RootFs(copy[2]).is_root()]
        if len(roots) != 1:
            found = ", ".join(sorted({item.kind for item in self._partitions if item.kind})) or "no known file system"
            raise NotUnderstood(
                f"{len(roots)} partitions of its first disk are an ext root file system (the disk holds {found})"
            )
        return roots[0]

    def _differing(
        self, reported: tuple[str, ...], place: Extent, image: Image, sent: Sequence[Extent], before: DigestTable
    ) -> Repaired:
        def former(piece: Extent) -> bytes:
            return b"".join(before.of(block) for block in range(piece.offset, piece.end, DIGEST_BLOCK))

        outside = list(split(subtract(sent, [place]), MOST))
        after = {piece.offset: former(piece) for piece in outside}
        held = [Extent(place.offset + item.offset, item.length) for item in image.stored()]
        inside = list(split(align(union(intersect(sent, [place]), held), DIGEST_BLOCK, place.end), MOST))
        differs: list[Extent] = []
        for piece in inside:
            after[piece.offset] = block_digests(memoryview(self.read(piece)))
            differs += different_blocks(piece, after[piece.offset], former(piece))
        return Repaired(reported, tuple(differs), DigestTable(self._size, outside + inside, after))

    def close(self) -> None:
        """Delete the copies."""
        self._opened.close()
