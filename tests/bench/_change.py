"""Which blocks of the disk a round changes, and to what. Pure."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence

import attrs

from asrcore.units import KiB, MiB

__all__ = ["BLOCK", "Change", "contents", "plan_change", "total"]

BLOCK = 64 * KiB
PIECE = 1 * MiB


@attrs.frozen
class Change:
    """Bytes from `offset` on become `content(pool)`; `seed` makes one round's change differ from another's."""

    offset: int
    length: int
    seed: int

    def content(self, pool: bytes) -> bytes:
        """A stretch of the pool with a stamp in each block, so that every block differs from its former content."""
        start = random.Random(f"{self.seed}/{self.offset}").randrange(max(1, len(pool) - self.length))
        data = bytearray(pool[start : start + self.length].ljust(self.length, b"."))
        for at in range(0, self.length, BLOCK):
            struct.pack_into("<QQ", data, at, self.seed, self.offset + at)
        return bytes(data)


def plan_change(
    blocks: Sequence[int], size: int, seed: int, *, scattered: int, sequential: int = 0, first: int = 0
) -> list[Change]:
    """`scattered` bytes in random blocks of 64 KiB and, apart from them, `sequential` bytes in a row.

    `blocks`: offsets of the blocks that contain data: a disk in use is overwritten where it has data. `size`: the
    disk's; nothing before `first` is changed. All in bytes. No two changes overlap.
    """
    dice = random.Random(seed)
    run: range = range(0)
    changes = []
    if sequential:
        start = dice.randrange(first // BLOCK, (size - sequential) // BLOCK + 1) * BLOCK
        run = range(start, start + sequential)
        changes = [Change(at, min(PIECE, run.stop - at), seed) for at in range(run.start, run.stop, PIECE)]
    eligible = [at for at in blocks if at >= first and at not in run and at + BLOCK <= size]
    count = scattered // BLOCK
    if count > len(eligible):
        raise ValueError(f"{count} blocks requested, {len(eligible)} available")
    return [*(Change(at, BLOCK, seed) for at in dice.sample(eligible, count)), *changes]


def total(changes: Sequence[Change]) -> int:
    """Bytes changed."""
    return sum(change.length for change in changes)


def contents(changes: Sequence[Change], pool: bytes) -> Iterator[tuple[int, bytes]]:
    """Offset and new content of each."""
    for change in changes:
        yield change.offset, change.content(pool)
