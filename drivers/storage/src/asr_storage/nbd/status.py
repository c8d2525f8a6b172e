"""What an NBD server says about a disk's blocks, as pure functions: covering a range, and merging two contexts."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = [
    "ALLOCATION_DEPTH",
    "BASE_ALLOCATION",
    "MAX_STATUS_REQUEST",
    "BlockStatus",
    "Coverage",
    "DiskExtent",
    "dirty_bitmap_context",
    "merge_status",
]

BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"  # which layer of a chain stores a range: 1 the topmost, 0 none
_STATE_ZERO = 2  # base:allocation: reads as zeroes. Bit 0 (a hole) alone promises nothing about the content.
_STATE_DIRTY = 1  # qemu:dirty-bitmap

# The length field of a request has 32 bits; 64 KiB less keeps every request aligned for any server.
MAX_STATUS_REQUEST = 4 * 1024**3 - 64 * 1024


def dirty_bitmap_context(bitmap: str) -> str:
    """The name of the context in which QEMU exports BITMAP."""
    return f"qemu:dirty-bitmap:{bitmap}"


class BlockStatus(NamedTuple):
    """One extent (bytes) with the flags of one context. A tuple: a fragmented disk has millions."""

    context: str
    offset: int
    length: int
    flags: int


class DiskExtent(NamedTuple):
    """One extent (bytes) of a disk. `dirty and zero` is a change: the range was discarded or zeroed since."""

    offset: int
    length: int
    dirty: bool
    zero: bool

    @property
    def end(self) -> int:
        return self.offset + self.length


class Coverage:
    """Asks for block status until every context covers a range.

    A server may answer any prefix of a request, of another length for each context, or run past its end.
    Each context's part is returned once, in order, without gap or overlap.
    """

    def __init__(self, contexts: Sequence[str], offset: int, length: int) -> None:
        self._covered = dict.fromkeys(contexts, offset)
        self._end = offset + length

    def next_request(self) -> tuple[int, int] | None:
        """Offset and length (bytes) to ask for next; None when all is covered."""
        start = min(self._covered.values(), default=self._end)
        return None if start >= self._end else (start, min(MAX_STATUS_REQUEST, self._end - start))

    def take(self, context: str, offset: int, entries: Sequence[int]) -> Iterator[BlockStatus]:
        """What is new in one context's answer: ENTRIES are length, flags, length, flags... from OFFSET on."""
        covered = self._covered[context]
        if offset > covered:
            raise ValueError(f"{context}: answer starts at {offset}, {covered} is not covered yet")
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            end = min(offset + length, self._end)
            if end > covered:
                yield BlockStatus(context, covered, end - covered, flags)
                covered = self._covered[context] = end
            offset += length


def merge_status(
    status: Iterable[BlockStatus],
    offset: int,
    length: int,
    *,
    bitmap: str | None,
    allocation: bool = True,
) -> Iterator[DiskExtent]:
    """Extents of [OFFSET, OFFSET + LENGTH) (bytes): sorted, coalesced, adjacent, covering all of it.

    STATUS is what `NbdClient.block_status` yields, contexts mixed in any order. BITMAP names the dirty bitmap; None
    makes everything dirty (a full copy). Without ALLOCATION nothing is known to be zero. Works as a stream: only
    extents of one context that the other has not reached yet are held. Contexts not asked for are passed over.
    Raises ValueError if a context has a gap, an overlap or an early end: never taken for "clean".
    """
    if bitmap is None and not allocation:
        raise ValueError("neither allocation nor a bitmap to merge")
    limit = offset + length
    # what is known ahead of `position` as (end, flag); a context that was not asked for is known to the end
    zeroes = deque([] if allocation else [(limit, False)])
    dirt = deque([] if bitmap is not None else [(limit, True)])
    tracks = {BASE_ALLOCATION: (zeroes, _STATE_ZERO)} if allocation else {}
    if bitmap is not None:
        tracks[dirty_bitmap_context(bitmap)] = (dirt, _STATE_DIRTY)
    reported = dict.fromkeys(tracks, offset)
    # start, dirty and zero of the extent that may still grow, which ends at `position`
    start = position = offset
    dirty = zero = False
    for extent in status:
        context, begin, size, flags = extent
        if context not in tracks:
            continue
        if begin != reported[context] or size <= 0:
            raise ValueError(f"{extent} does not follow what ended at {reported[context]}")
        reported[context] = begin + size
        track, mask = tracks[context]
        track.append((begin + size, flags & mask != 0))
        while position < limit and zeroes and dirt:
            zero_end, now_zero = zeroes[0]
            dirty_end, now_dirty = dirt[0]
            if now_zero is not zero or now_dirty is not dirty:
                if position > start:
                    yield DiskExtent(start, position - start, dirty, zero)
                    start = position
                dirty, zero = now_dirty, now_zero
            position = min(zero_end, dirty_end, limit)
            if zero_end <= position:
                zeroes.popleft()
            if dirty_end <= position:
                dirt.popleft()
    if position < limit:
        raise ValueError(f"block status ends at {position} of {limit}")
    if position > start:
        yield DiskExtent(start, position - start, dirty, zero)
