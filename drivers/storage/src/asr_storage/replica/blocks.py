"""What a cycle says of ranges, and of the blocks of a disk that digests are of. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from enum import IntEnum
from operator import itemgetter

import attrs

from asrcore.driver import DIGEST_BLOCK, DIGEST_SIZE, block_digests, digest_of

__all__ = ["Blocks", "Change", "Kind", "State", "block_count", "whole_block_digests"]


class Kind(IntEnum):
    """What a record says of its range."""

    DATA = 1
    ZERO = 2
    SAME = 3
    UNDONE = 4
    """Nothing (any more): the range does not count as done."""
    DIGESTS = 5
    """Digests of its blocks, whole ones, as the records before it leave them. It says nothing else of the range."""


@attrs.frozen
class Change:
    """A range of a disk and what the cycle says of it."""

    offset: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


class State(IntEnum):
    """What is known of a run of blocks."""

    KNOWN = 1
    """Their digests."""
    ZERO = 2
    """They are zeroes."""
    UNKNOWN = 3
    """They were written, and their digests are not known."""


_Run = tuple[int, int, State, memoryview]  # first block, the block behind the last, state, digests if known
_NOTHING = memoryview(b"")
_start, _end = itemgetter(0), itemgetter(1)


@attrs.define
class Blocks:
    """What is said of the blocks of a disk of `size` bytes: runs in order, without overlap. Of other blocks an older
    file speaks."""

    size: int
    runs: list[_Run] = attrs.field(factory=list)

    def put(self, start: int, end: int, state: State | None, digests: memoryview = _NOTHING) -> None:
        """From now on this is said of these blocks; None: nothing."""
        if start >= end:
            return
        runs = self.runs
        if not runs or start >= runs[-1][1]:  # the usual case: a disk is covered from its beginning to its end
            if state is not None:
                runs.append((start, end, state, digests))
            return
        first, last = bisect_right(runs, start, key=_end), bisect_left(runs, end, key=_start)
        new: list[_Run] = []
        if first < last and runs[first][0] < start:
            new.append(_cut(runs[first], runs[first][0], start))
        if state is not None:
            new.append((start, end, state, digests))
        if first < last and runs[last - 1][1] > end:
            new.append(_cut(runs[last - 1], end, runs[last - 1][1]))
        runs[first:last] = new

    def known(self, offset: int, digests: memoryview) -> None:
        """Put the digests of whole blocks from an offset on."""
        start = offset // DIGEST_BLOCK
        self.put(start, start + len(digests) // DIGEST_SIZE, State.KNOWN, digests)

    def note(self, change: Change) -> None:
        """What a cycle says of a range, whose digests are not known."""
        start, end = change.offset // DIGEST_BLOCK, -(-change.end // DIGEST_BLOCK)
        whole_start = -(-change.offset // DIGEST_BLOCK)
        whole_end = end if change.end == self.size else change.end // DIGEST_BLOCK
        if change.kind is Kind.SAME:
            for block in {*range(start, min(whole_start, end)), *range(max(whole_end, start), end)}:
                if any(self.within(block, block + 1)):  # a part of it was written
                    self.put(block, block + 1, State.UNKNOWN)
            self.put(whole_start, whole_end, None)
            return
        self.put(start, end, State.UNKNOWN)
        if change.kind is Kind.ZERO and whole_start < whole_end:
            self.put(whole_start, whole_end, State.ZERO)
            short = self.size % DIGEST_BLOCK
            if short and whole_end * DIGEST_BLOCK > self.size:
                self.put(whole_end - 1, whole_end, State.KNOWN, memoryview(digest_of(bytes(short))))

    def resize(self, size: int) -> None:
        """The disk got another size: of what lies behind the smaller one, and of a block that it cuts, nothing is
        known."""
        if size != self.size:
            self.put(min(size, self.size) // DIGEST_BLOCK, block_count(max(size, self.size)), None)
            self.put(min(size, self.size) // DIGEST_BLOCK, block_count(size), State.UNKNOWN)
            self.size = size

    def within(self, start: int, end: int) -> Iterator[_Run]:
        """The runs of these blocks, cut to them."""
        for at in range(bisect_right(self.runs, start, key=_end), len(self.runs)):
            run = self.runs[at]
            if run[0] >= end:
                return
            yield _cut(run, max(start, run[0]), min(end, run[1]))

    def joined(self) -> Iterator[tuple[int, int, State, list[memoryview]]]:
        """The runs, neighbours of the same state as one."""
        start = end = -1
        state, parts = State.UNKNOWN, list[memoryview]()
        for run in self.runs:
            if run[0] == end and run[2] is state:
                end = run[1]
                parts.append(run[3])
                continue
            if end > start:
                yield start, end, state, parts
            start, end, state, parts = run[0], run[1], run[2], [run[3]]
        if end > start:
            yield start, end, state, parts


def _cut(run: _Run, start: int, end: int) -> _Run:
    digests = run[3][(start - run[0]) * DIGEST_SIZE : (end - run[0]) * DIGEST_SIZE]
    return (start, end, run[2], digests)


def block_count(size: int) -> int:
    """Blocks of a disk; the last one may be short."""
    return -(-size // DIGEST_BLOCK)


def whole_block_digests(offset: int, data: memoryview, size: int) -> bytes:
    """Of the whole blocks in data that is written to a disk of `size` bytes; its last block may be short."""
    start, end = -offset % DIGEST_BLOCK, offset + len(data)
    behind = len(data) if end == size else end // DIGEST_BLOCK * DIGEST_BLOCK - offset
    return block_digests(data[start:behind]) if behind > start else b""
