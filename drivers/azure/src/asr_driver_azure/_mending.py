"""The system disk of a machine that is being made: copied as it is uploaded, repaired, and what differs uploaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from asr_driver_azure._digests import DigestTable
from asr_driver_azure._pageblob import MOST
from asr_driver_azure._repair import plan
from asr_driver_azure._rootfs import Image, NotUnderstood, RootFs
from asrcore.driver import DIGEST_BLOCK, block_digests, different_blocks
from asrcore.model.extent import Extent, align, split, union
from asrcore.units import MiB, format_size

__all__ = ["Mending"]

_SPARE = 256 * MiB  # of the file system that the copy is in; repairs need a little


class Mending:
    """Of one disk. The copy is a file without a name in the directory for temporary files, as large as what is stored.

    `told`: what was done and what was left alone, for people. Whatever goes wrong leaves the upload as it was.
    """

    def __init__(self, size: int, stored: int) -> None:
        self.told: tuple[str, ...] = ()
        self._image = Image(size)
        self._problem = ""
        room = os.fstatvfs(self._image.file.fileno())
        if room.f_bavail * room.f_frsize < stored + _SPARE:
            self._problem = f"a copy of {format_size(stored)} has no room where temporary files are kept"

    def keep(self, offset: int, data: bytearray) -> None:
        """This is what was uploaded here. Thread-safe."""
        if self._problem:
            return
        try:
            self._image.put(offset, data)
        except OSError as problem:
            self._problem = f"the copy could not be written: {problem.strerror}"

    def finish(
        self,
        sent: Sequence[Extent],
        digests: Mapping[int, bytes],
        put: Callable[[int, bytes], None],
    ) -> DigestTable:
        """Repair the copy and upload what that changed; digests of the disk as it is then."""
        before = DigestTable(self._image.size, list(sent), digests)
        try:
            if self._problem:
                raise NotUnderstood(self._problem)
            root = RootFs(self._image)
            made = plan(root.look())
            root.write(made.changes)
        except NotUnderstood as problem:
            self.told = (f"the system was left as it is: {problem}",)
            return before
        self.told = (*(f"{item.path}: {item.what}" for item in made.changes), *(f"left: {item}" for item in made.left))
        return self._differing(sent, before, put) if made.changes else before

    def _differing(self, sent: Sequence[Extent], before: DigestTable, put: Callable[[int, bytes], None]) -> DigestTable:
        size = self._image.size
        pieces = list(split(align(union(sent, self._image.stored()), DIGEST_BLOCK, size), MOST))
        after = {}
        for piece in pieces:
            data = self._image.read(piece)
            digests = after[piece.offset] = block_digests(memoryview(data))
            former = b"".join(before.of(block) for block in range(piece.offset, piece.end, DIGEST_BLOCK))
            for run in different_blocks(piece, digests, former):
                put(run.offset, data[run.offset - piece.offset : run.end - piece.offset])
        return DigestTable(size, pieces, after)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._image.close()
