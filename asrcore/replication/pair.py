"""One disk at both sites, as one worker of a comparison reads it.

Where both sides are read here they are compared byte by byte, which is faster than hashing them (measured: memcmp 65
GB/s a core, BLAKE3 4 GB/s). Where an agent can hash locally, digests are computed there and only they are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from asrcore.driver import DIGEST_BLOCK, DiskReader, DiskView, Replica, block_digests, page_buffer
from asrcore.model.extent import Extent, intersect, split
from asrcore.units import MiB

__all__ = ["Pair", "both_zero", "piece_size", "worker_count"]

# Number of pieces at a time, and their size in bytes. There are more workers than cores: some wait for a disk or a link
# while others compare.
#
# Where bytes are compared, four workers left the replica's disk idle while all of them waited for QEMU (measured,
# medians of 8, a resync of 2 GiB: 2.06 s with four, 1.83 s with eight, no less with twelve). Each piece costs time in
# the interpreter, which all workers share, and without the page cache nothing is read ahead (medians of 14: 1.93 s with
# 1 MiB, 1.60 s with 2 MiB; of 9: the same with 4 MiB as with 2).
NEAR_WORKERS, NEAR_PIECE = 8, 2 * MiB
# Over a link, or where digests are sent, a piece is one request and one reply. What differs is read over the link: the
# more workers ask at a time, the longer each waits on a slow link, and each read has a time limit.
FAR_WORKERS, FAR_PIECE = 4, 4 * MiB


def _by_digests(view: DiskView, replica: Replica) -> bool:
    """Whether digests are compared; otherwise both sides are read here and their bytes are compared."""
    return view.hashes_at_source or replica.hashes_at_target


def _is_far(view: DiskView, replica: Replica) -> bool:
    return not view.near or _by_digests(view, replica)


def piece_size(view: DiskView, replica: Replica) -> int:
    """How many bytes to compare at a time, a multiple of DIGEST_BLOCK."""
    return FAR_PIECE if _is_far(view, replica) else NEAR_PIECE


def worker_count(view: DiskView, replica: Replica) -> int:
    """How many pieces to compare at a time, each in a separate thread."""
    return FAR_WORKERS if _is_far(view, replica) else NEAR_WORKERS


def both_zero(view: DiskView, replica: Replica, extents: Sequence[Extent]) -> list[Extent]:
    """Whole digest blocks in the extents that are known to be zero at both sides: nothing needs to be read of them."""
    theirs = (item for item in replica.allocated(view.disk.id) if item.zero)
    ours = (item for item in view.allocated() if item.zero)
    zero = intersect(intersect(extents, ours), theirs)
    inner = ((-(-item.offset // DIGEST_BLOCK) * DIGEST_BLOCK, item.end // DIGEST_BLOCK * DIGEST_BLOCK) for item in zero)
    return [Extent(start, end - start) for start, end in inner if start < end]


def _nobody(count: int) -> None:
    pass


class Pair:
    """For one thread. `read` is called with the number of bytes that were read at the source."""

    def __init__(self, view: DiskView, replica: Replica, stack: ExitStack, read: Callable[[int], None]) -> None:
        """Use `open` instead."""
        size = piece_size(view, replica)
        self._view, self._replica, self._stack, self._read = view, replica, stack, read
        self._ours, self._theirs = bytearray(size), memoryview(b"")
        self._loaded: Extent | None = None
        self._source: DiskReader | None = None
        self._copy: DiskReader | None = None
        if not _by_digests(view, replica):
            self._theirs = stack.enter_context(page_buffer(size))
            self._copy = stack.enter_context(replica.reader(view.disk.id))

    @classmethod
    @contextmanager
    def open(cls, view: DiskView, replica: Replica, read: Callable[[int], None] = _nobody) -> Iterator[Pair]:
        """Closes its readers at the end."""
        with ExitStack() as stack:
            yield cls(view, replica, stack, read)

    def different(self, piece: Extent) -> list[Extent]:
        """Blocks of the piece that differ, neighbours joined."""
        if self._copy is not None:
            return self._different_bytes(piece)
        ours = self._our_digests(piece)
        return self._replica.compare(self._view.disk.id, piece, ours, self._view.digest)

    def digests(self, piece: Extent) -> tuple[bytes, bytes]:
        """Of the piece's blocks at the source and in the replica. Bytes that were compared equal are hashed once."""
        if self._copy is None:
            ours = self._our_digests(piece)
            return ours, self._replica.digests(self._view.disk.id, piece, self._view.digest)
        equal = not self._different_bytes(piece)
        ours = block_digests(self._content(piece), self._view.digest)
        return ours, ours if equal else block_digests(self._theirs[: piece.length], self._view.digest)

    def contents(self, piece: Extent, parts: Sequence[Extent]) -> list[memoryview]:
        """The source's content of parts of the piece that was just compared; valid until the next call. What has to be
        read for it is read together."""
        ours = memoryview(self._ours)
        wanted = [(part.offset, ours[part.offset - piece.offset : part.end - piece.offset]) for part in parts]
        if wanted and self._loaded != piece:
            self._fill(wanted)
        return [data for _, data in wanted]

    def _content(self, piece: Extent) -> memoryview:
        self._loaded = None
        data = memoryview(self._ours)[: piece.length]
        self._fill([(piece.offset, data)])
        self._loaded = piece
        return data

    def _fill(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        if self._source is None:
            self._source = self._stack.enter_context(self._view.reader())
        self._source.read_each(reads)
        self._read(sum(len(data) for _, data in reads))

    def _our_digests(self, piece: Extent) -> bytes:
        if self._view.hashes_at_source:
            self._loaded = None
            return self._view.digests(piece)
        return block_digests(self._content(piece), self._view.digest)

    def _different_bytes(self, piece: Extent) -> list[Extent]:
        assert self._copy is not None
        self._content(piece)
        theirs = self._theirs[: piece.length]
        self._copy.read_into(piece.offset, theirs)
        # A bytearray compares itself by memcmp, whole or from an offset on; memoryviews go item by item, 100 x slower.
        if piece.length == len(self._ours) and self._ours == self._theirs:
            return []
        result: list[Extent] = []
        for block in split([piece], DIGEST_BLOCK):
            at, end = block.offset - piece.offset, block.end - piece.offset
            if self._ours.startswith(theirs[at:end], at):
                continue
            start = result.pop().offset if result and result[-1].end == block.offset else block.offset
            result.append(Extent(start, block.end - start))
        return result
