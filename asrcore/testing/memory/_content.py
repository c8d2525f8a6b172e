"""Content of a disk: sparse, in blocks; a snapshot costs nothing until one of the two is written."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from asrcore.model.extent import Extent, subtract
from asrcore.units import KiB

__all__ = ["BLOCK", "Content", "blocks_of"]

BLOCK = 4 * KiB
"""Bytes of a block: changes are tracked, and zeroes known, in this grain."""

_ZEROES = bytes(BLOCK)


def blocks_of(offset: int, length: int) -> range:
    """Numbers of the blocks that a range touches."""
    return range(offset // BLOCK, -(-(offset + length) // BLOCK))


@attrs.define
class Content:
    """`size` bytes; blocks that are not stored read as zeroes."""

    size: int
    _blocks: dict[int, bytes] = attrs.field(factory=dict, repr=False)
    _shared: bool = False

    def snapshot(self) -> Content:
        """A copy; the blocks are shared until either is written."""
        self._shared = True
        return Content(self.size, self._blocks, shared=True)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer. Raises ValueError beyond the end."""
        self._check(offset, len(buffer))
        numbers = blocks_of(offset, len(buffer))
        stored = b"".join([self._blocks.get(number, _ZEROES) for number in numbers])
        start = offset - numbers.start * BLOCK
        buffer[:] = memoryview(stored)[start : start + len(buffer)]

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put data; zeroes given as data are stored as data."""
        self._check(offset, len(data))
        blocks = self._own()
        numbers = blocks_of(offset, len(data))
        base = numbers.start * BLOCK
        merged = bytearray(len(numbers) * BLOCK)
        for edge in {numbers[0], numbers[-1]} if numbers else ():
            merged[edge * BLOCK - base : (edge + 1) * BLOCK - base] = blocks.get(edge, _ZEROES)
        merged[offset - base : offset - base + len(data)] = data
        for number in numbers:
            blocks[number] = bytes(merged[number * BLOCK - base : (number + 1) * BLOCK - base])

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; whole blocks are no longer stored."""
        self._check(offset, length)
        blocks = self._own()
        touched = blocks_of(offset, length)
        few, many = (touched, blocks) if len(touched) < len(blocks) else (list(blocks), touched)
        for number in few:
            if number not in many:
                continue
            start, end = max(0, offset - number * BLOCK), min(BLOCK, offset + length - number * BLOCK)
            rest = bytearray(blocks[number])
            rest[start:end] = bytes(end - start)
            if bytes(rest) == _ZEROES:
                del blocks[number]
            else:
                blocks[number] = bytes(rest)

    def differs(self, other: Content, offset: int, length: int) -> bool:
        """Whether a range has other bytes than in another content."""
        numbers = blocks_of(offset, length)
        return any(self._blocks.get(number, _ZEROES) != other._blocks.get(number, _ZEROES) for number in numbers)

    def resize(self, size: int) -> None:
        """Grow with zeroes, or cut."""
        if size < self.size:
            self.zero(size, self.size - size)
        self.size = size

    def extents(self) -> list[Extent]:
        """The whole disk without gaps; what is not stored is `zero`."""
        stored = self.extents_of(self._blocks)
        gaps = subtract([Extent(0, self.size, zero=True)], stored)
        return sorted([*stored, *gaps])

    def extents_of(self, numbers: Iterable[int]) -> list[Extent]:
        """These blocks as extents, within the size."""
        runs: list[Extent] = []
        for number in sorted(numbers):
            start, zero = number * BLOCK, number not in self._blocks
            end = min(start + BLOCK, self.size)
            if start >= end:
                continue
            if runs and runs[-1].end == start and runs[-1].zero == zero:
                start = runs.pop().offset
            runs.append(Extent(start, end - start, zero))
        return runs

    @property
    def blocks(self) -> Iterable[bytes]:
        """The blocks that are stored; shared ones are the same objects in each content."""
        return self._blocks.values()

    def _own(self) -> dict[int, bytes]:
        if self._shared:
            self._blocks = dict(self._blocks)
            self._shared = False
        return self._blocks

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are not within a disk of {self.size} bytes")
