"""Moving content from a frozen disk into a cycle: copy, and comparison that sends only what differs.

Pieces go through a few worker threads. Each has a reader and one buffer, reused for every piece, so memory is bounded
by workers x piece whatever the disk's size. The calls below release the GIL (libnbd, BLAKE3, pwrite).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import attrs

from asrcore.crashpoint import reach
from asrcore.driver import DIGEST_BLOCK, CycleWriter, DiskView, Replica
from asrcore.model.extent import Extent, batches, intersect, split, subtract
from asrcore.model.watch import Watch
from asrcore.replication.pair import Pair, both_zero, piece_size, worker_count
from asrcore.replication.throttle import Throttle
from asrcore.replication.workers import in_parallel
from asrcore.units import KiB, MiB

__all__ = ["Counts", "Transfer"]

# More than there are cores: while one writes, the source works for the others (measured: a delta of scattered blocks
# took 0.98 s with four, 1.07 s with two).
COPY_WORKERS = 4
# Each piece costs time in the interpreter, which all workers share, and a wait at its end (measured, 2 GiB from
# qemu-nbd: 4.2 s and 2.0 s of processor time with 512 KiB, 3.5 s and 1.5 s with 1 MiB, no less with 2 MiB). When a link
# is cut, at most the pieces under way are lost.
COPY_PIECE = 1 * MiB
FAR_COPY_PIECE = 512 * KiB
# This many small extents are read at a time; read one by one, each would wait for the answer to the one before. Over a
# far link a request should carry a whole piece even if it consists of pages (512 KiB = 128 x 4 KiB), so that scattered
# extents need no more round trips than the same bytes in a row.
COPY_EXTENTS = 16
FAR_COPY_EXTENTS = 128
# A crash resends at most this much, or what a slow link carried in this time (seconds); a flush costs one fdatasync of
# what was just written.
FLUSH_EVERY = 128 * MiB
FLUSH_SECONDS = 10.0
ZERO_GRAIN = 64 * KiB
_LOOK = 4 * KiB
_ZEROES = bytes(ZERO_GRAIN)


@attrs.define
class Counts:
    """Bytes of a cycle: `read` at the source, `sent` as data, `zeroed` as zero ranges, `same` compared equal."""

    read: int = 0
    sent: int = 0
    zeroed: int = 0
    same: int = 0
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False, eq=False)

    def add(self, *, read: int = 0, sent: int = 0, zeroed: int = 0, same: int = 0) -> None:
        """Thread-safe."""
        with self._lock:
            self.read += read
            self.sent += sent
            self.zeroed += zeroed
            self.same += same

    def facts(self) -> dict[str, int]:
        """The counts by their names in a job's result and in the record of a cycle."""
        return {
            "bytes_read": self.read,
            "bytes_sent": self.sent,
            "bytes_zeroed": self.zeroed,
            "bytes_same": self.same,
        }


@attrs.define
class Transfer:
    """Covers extents of one disk. `counts`, `watch` and `throttle` are shared by all disks of the cycle."""

    view: DiskView
    writer: CycleWriter
    counts: Counts
    watch: Watch
    throttle: Throttle
    _unflushed: int = 0
    _flushing: bool = attrs.field(default=False, init=False)
    _flushed_at: float = attrs.field(factory=time.monotonic, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def copy(self, extents: Iterable[Extent]) -> None:
        """Send the extents' content; what turns out to be zeroes is sent as zero ranges."""
        extents = list(extents)
        for extent in (item for item in extents if item.zero):
            self._zero(extent.offset, extent.length)
            self.watch.advance(extent.length)
        data = (item for item in extents if not item.zero)
        piece, count = (COPY_PIECE, COPY_EXTENTS) if self.view.near else (FAR_COPY_PIECE, FAR_COPY_EXTENTS)
        in_parallel(batches(data, piece, count), COPY_WORKERS, partial(self._copying, piece))

    def compare(self, extents: Iterable[Extent], replica: Replica, size_at_target: int) -> None:
        """Send what differs from the replica's head in the extents; what lies beyond the head's size is copied."""
        extents = list(extents)
        inside = intersect(extents, [Extent(0, size_at_target // DIGEST_BLOCK * DIGEST_BLOCK)])
        beyond = subtract(extents, inside)
        same = both_zero(self.view, replica, inside)
        for extent in same:
            self._same(extent.offset, extent.length)
            self.watch.advance(extent.length)
        blocks = _whole_blocks(subtract(inside, same), self.view.disk.size)
        pieces = split(blocks, piece_size(self.view, replica))
        in_parallel(pieces, worker_count(self.view, replica), partial(self._comparing, replica))
        if beyond:
            self.copy(_known(beyond, [item for item in self.view.allocated() if item.zero]))

    def _flush_if_due(self, length: int) -> None:
        with self._lock:
            self._unflushed += length
            now = time.monotonic()
            due = self._unflushed >= FLUSH_EVERY or now - self._flushed_at >= FLUSH_SECONDS
            if not due or self._flushing:
                return
            self._unflushed, self._flushed_at, self._flushing = 0, now, True
        try:
            self.writer.flush()  # other workers continue meanwhile: otherwise a remote target would be idle
            reach("cycle.flushed")  # before the next flush can begin, so that no other has ended when one is counted
        finally:
            self._flushing = False

    # -- pieces ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _copying(self, piece_size: int) -> Iterator[Callable[[Sequence[Extent]], None]]:
        buffer = memoryview(bytearray(piece_size))
        with self.view.reader() as reader:

            def copy(batch: Sequence[Extent]) -> None:
                self.watch.check()
                parts, length = [], 0
                for piece in batch:
                    parts.append((piece.offset, buffer[length : length + piece.length]))
                    length += piece.length
                reader.read_each(parts)
                self.counts.add(read=length)
                for offset, data in parts:
                    self._send(offset, data)
                self._done(length)

            yield copy

    @contextmanager
    def _comparing(self, replica: Replica) -> Iterator[Callable[[Extent], None]]:
        with Pair.open(self.view, replica, lambda count: self.counts.add(read=count)) as pair:

            def compare(piece: Extent) -> None:
                self.watch.check()
                different = pair.different(piece)
                for extent in subtract([piece], different):
                    self._same(extent.offset, extent.length)
                for extent, data in zip(different, pair.contents(piece, different), strict=True):
                    self._send(extent.offset, data)
                self._done(piece.length)

            yield compare

    def _done(self, length: int) -> None:
        self.watch.advance(length)
        self._flush_if_due(length)

    def _send(self, offset: int, data: memoryview) -> None:
        """Write data, with runs of zeroes as zero ranges; grains are counted from the start of the disk."""
        end, start, at, zero = len(data), 0, 0, False
        while at < end:
            following = min(end, at + ZERO_GRAIN - (offset + at) % ZERO_GRAIN)
            is_zero = _is_zero(data[at:following])
            if is_zero is not zero:
                self._put(offset + start, data[start:at], zero)
                start, zero = at, is_zero
            at = following
        self._put(offset + start, data[start:], zero)

    def _put(self, offset: int, data: memoryview, zero: bool) -> None:
        if not data:
            return
        if zero:
            self._zero(offset, len(data))
        else:
            self.throttle.take(len(data), self.watch)
            self.writer.write(self.view.disk.id, offset, data)
            self.counts.add(sent=len(data))

    def _zero(self, offset: int, length: int) -> None:
        self.writer.zero(self.view.disk.id, offset, length)
        self.counts.add(zeroed=length)

    def _same(self, offset: int, length: int) -> None:
        self.writer.same(self.view.disk.id, offset, length)
        self.counts.add(same=length)


def _whole_blocks(extents: Iterable[Extent], size: int) -> list[Extent]:
    """Grown to whole digest blocks, all to be read (`zero` dropped)."""
    grown: list[Extent] = []
    for item in extents:
        start = item.offset // DIGEST_BLOCK * DIGEST_BLOCK
        end = min(-(-item.end // DIGEST_BLOCK) * DIGEST_BLOCK, size)
        if grown and start <= grown[-1].end:
            start = grown.pop().offset
        grown.append(Extent(start, end - start))
    return grown


def _known(extents: Iterable[Extent], zero: Iterable[Extent]) -> list[Extent]:
    """The extents with `zero` set where that is known."""
    extents = list(extents)
    zeroes = intersect(extents, zero)
    data = subtract(extents, zeroes)
    return sorted(
        [Extent(item.offset, item.length, zero=True) for item in zeroes]
        + [Extent(item.offset, item.length) for item in data],
    )


def _is_zero(grain: memoryview) -> bool:
    # bytes == bytes compares 65 GB/s and stops at the first difference, but the copy into bytes runs at 8: so a page
    # is looked at first. memoryview == is 100 x slower.
    return (
        grain[0] == 0
        and bytes(grain[:_LOOK]) == _ZEROES[: min(_LOOK, len(grain))]
        and bytes(grain) == _ZEROES[: len(grain)]
    )
