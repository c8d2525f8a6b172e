"""Looking for damage in a recovery point: what is read, and what was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from asrcore.driver._buffer import page_buffer
from asrcore.driver._digests import DIGEST_BLOCK
from asrcore.driver._reader import DiskReader
from asrcore.model.extent import Extent, split, union
from asrcore.model.watch import Watch
from asrcore.units import MiB

__all__ = ["Examination", "examination_parts", "read_parts"]

_READ = 4 * MiB


@attrs.frozen
class Examination:
    """What an examination of a recovery point found. `damage`: what is wrong, for people, with the disk and the place;
    empty if nothing. `read`: bytes that were read of its disks. `proved`: bytes that are as they were recorded when
    they were written; of the others no digest is recorded, so only that they can be read is known. `end`: where the
    next part begins, None after the last."""

    damage: tuple[str, ...] = ()
    read: int = 0
    proved: int = 0
    end: int | None = None


def examination_parts(
    disks: Mapping[str, int], start: int | None, limit: int | None
) -> tuple[list[tuple[str, list[Extent]]], int | None]:
    """What an examination reads of each disk, and where the next part begins; see `Replica.examine`. The disks count
    one after the other, in the order of their ids. Parts begin at digest blocks."""
    if start is None:
        return [
            (disk_id, union(_block(0, size), _block((size - 1) // DIGEST_BLOCK, size)) if size else [])
            for disk_id, size in sorted(disks.items())
        ], None
    parts, base, left = [], 0, limit
    for disk_id, size in sorted(disks.items()):
        first = min(max(0, start - base), size)
        last = size if left is None else min(size, first + left)
        if last < size:
            last = max(first, last // DIGEST_BLOCK * DIGEST_BLOCK)
        parts.append((disk_id, [Extent(first, last - first)] if last > first else []))
        if last < size:
            return parts, base + last
        base += size
        left = None if left is None else left - (last - first)
    return parts, None


def _block(number: int, size: int) -> list[Extent]:
    start = number * DIGEST_BLOCK
    return [Extent(start, min(DIGEST_BLOCK, size - start))]


def read_parts(reader: DiskReader, extents: Iterable[Extent], watch: Watch) -> int:
    """Read these extents for nothing but to see that it can be done; returns the bytes."""
    done = 0
    with page_buffer(_READ) as buffer:
        for piece in split(extents, _READ):
            watch.check()
            reader.read_into(piece.offset, buffer[: piece.length])
            done += piece.length
            watch.advance(piece.length)
    return done
