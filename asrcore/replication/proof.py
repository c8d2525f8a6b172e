"""Whether a replica equals the frozen source: every byte compared, and a digest of each whole disk at both sides.

A disk's digest is BLAKE3 over the digests of its regions, a region's BLAKE3 over the digests of its blocks, in order:
16 bytes for each block and region, 32 for the disk. Blocks that are known to be zero at both sides are not read, so a
thin disk costs only what it holds, and a region that was compared is not compared again after an interruption.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import attrs
from blake3 import blake3

from asrcore.driver import (
    DIGEST_BLOCK,
    DIGEST_SIZE,
    Digest,
    DiskReader,
    DiskView,
    Replica,
    different_blocks,
    page_buffer,
    zero_digest,
)
from asrcore.model.extent import Extent, intersect, split, subtract, total, union
from asrcore.model.watch import Watch
from asrcore.replication.pair import Pair, both_zero, piece_size, worker_count
from asrcore.replication.workers import in_parallel
from asrcore.units import MiB

__all__ = ["REGION", "DiskProof", "prove", "sha256_of_both"]

REGION = 64 * MiB
"""Bytes that are compared as a whole, a multiple of every piece size: what an interruption may cost."""


@attrs.define
class DiskProof:
    """Of one disk of `size` bytes. `regions`: digests at source and replica of those that were compared, by number."""

    size: int
    digest: Digest
    regions: dict[int, tuple[bytes, bytes]] = attrs.field(factory=dict)
    different: list[Extent] = attrs.field(factory=list)

    @property
    def algorithm(self) -> str:
        """Of the whole disk's digests, with the digest of its blocks."""
        return f"blake3-tree-{self.digest.value}-{DIGEST_BLOCK >> 10}k-{REGION >> 20}m"

    @property
    def source_digest(self) -> str:
        """Of the whole source disk, hexadecimal."""
        return self._fold(0)

    @property
    def replica_digest(self) -> str:
        """Of the whole disk of the replica."""
        return self._fold(1)

    def _fold(self, side: int) -> str:
        disk = blake3()
        for number in range(_count(self.size)):
            disk.update(self.regions[number][side])
        return disk.hexdigest()

    @property
    def missing(self) -> list[int]:
        """Regions that were not compared."""
        return [number for number in range(_count(self.size)) if number not in self.regions]

    def add(self, number: int, ours: bytes | bytearray, theirs: bytes | bytearray, different: Iterable[Extent]) -> None:
        """What was found out of a region: the digests of its blocks at source and replica."""
        self.regions[number] = _folded(ours), _folded(theirs)
        self.different = union(self.different, different)

    def without(self, changed: Sequence[Extent], size: int) -> DiskProof:
        """What still holds after the disk was changed in these extents, and perhaps got another size."""
        touched = {number for item in changed for number in range(item.offset // REGION, -(-item.end // REGION))}
        last = min(size, self.size) // REGION if size != self.size else _count(size)
        regions = {number: both for number, both in self.regions.items() if number not in touched and number < last}
        different = intersect(self.different, (Extent(number * REGION, REGION) for number in sorted(regions)))
        return DiskProof(size, self.digest, regions, different)

    # -- as a job's facts ------------------------------------------------------------------------------------------

    def to_facts(self) -> dict[str, object]:
        """What was compared so far."""
        regions = {number: [digest.hex() for digest in both] for number, both in self.regions.items()}
        different = [[item.offset, item.length] for item in self.different]
        facts = {"size": self.size, "digest": self.digest.value, "region": REGION}
        return {**facts, "regions": regions, "different": different}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> DiskProof | None:
        """The same again; None if it was made in another way."""
        if facts.get("region") != REGION or "regions" not in facts:
            return None
        regions = {int(number): (bytes.fromhex(a), bytes.fromhex(b)) for number, (a, b) in facts["regions"].items()}
        different = [Extent(offset, length) for offset, length in facts["different"]]
        return cls(facts["size"], Digest(facts["digest"]), regions, different)


def _count(size: int) -> int:
    return -(-size // REGION)


def _folded(digests: bytes | bytearray) -> bytes:
    return blake3(digests).digest(DIGEST_SIZE)


@attrs.define
class _Region:
    """`left` of its bytes are still to be compared; digests of its blocks so far, zeroes where nothing is stored."""

    left: int
    ours: bytearray
    theirs: bytearray
    different: list[Extent] = attrs.field(factory=list)


def prove(
    view: DiskView,
    replica: Replica,
    proof: DiskProof,
    watch: Watch,
    save: Callable[[], None],
    enough: Callable[[], bool] = lambda: False,
) -> bool:
    """Compare what was not compared yet of a disk and its replica's head; `save` is called after each region.

    Once there is `enough` no further region is begun; returns whether all were compared. The first one always is.
    """
    lock = threading.Lock()
    missing = proof.missing
    wanted = union(Extent(number * REGION, min(REGION, proof.size - number * REGION)) for number in missing)
    data = subtract(wanted, both_zero(view, replica, wanted))
    watch.advance(proof.size - total(data))
    left = dict.fromkeys(missing, 0)
    for part in split(data, REGION):
        left[part.offset // REGION] += part.length
    open_regions: dict[int, _Region] = {}

    def fresh(number: int) -> _Region:
        blocks = -(-min(REGION, proof.size - number * REGION) // DIGEST_BLOCK)
        zeroes = zero_digest(proof.digest) * blocks
        return _Region(left[number], bytearray(zeroes), bytearray(zeroes))

    def record(piece: Extent, ours: bytes, theirs: bytes) -> None:
        number, at = piece.offset // REGION, piece.offset % REGION // DIGEST_BLOCK * DIGEST_SIZE
        with lock:
            region = open_regions.get(number) or open_regions.setdefault(number, fresh(number))
            region.ours[at : at + len(ours)] = ours
            region.theirs[at : at + len(theirs)] = theirs
            region.different += different_blocks(piece, ours, theirs)
            region.left -= piece.length
            if region.left == 0:
                del open_regions[number]
                proof.add(number, region.ours, region.theirs, region.different)
                save()

    @contextmanager
    def comparing() -> Iterator[Callable[[Extent], None]]:
        with Pair.open(view, replica) as pair:

            def compare(piece: Extent) -> None:
                watch.check()
                record(piece, *pair.digests(piece))
                watch.advance(piece.length)

            yield compare

    for number in missing:
        if left[number] == 0:
            region = fresh(number)
            proof.add(number, region.ours, region.theirs, ())
    pieces = _Regions(split(data, piece_size(view, replica)), enough)
    in_parallel(pieces, worker_count(view, replica), comparing)
    return pieces.all_given


@attrs.define
class _Regions:
    """Pieces of disk regions in order, until at the start of a region there is enough."""

    pieces: Iterable[Extent]
    enough: Callable[[], bool]
    all_given: bool = False

    def __iter__(self) -> Iterator[Extent]:
        last = None
        for piece in self.pieces:
            number = piece.offset // REGION
            if last is not None and number != last and self.enough():
                return
            last = number
            yield piece
        self.all_given = True


def sha256_of_both(view: DiskView, replica: Replica, watch: Watch) -> tuple[str, str]:
    """SHA-256 of the whole disk, of the frozen source and of the replica's head, as `sha256sum` would print it.

    A check that is independent of the proof above: it also reads what is known to be zero. Each side is limited by one
    core (1.6 GB/s).
    """
    size = view.disk.size

    def side(open_reader: Callable[[], DiskReader]) -> str:
        reported = hashlib.sha256()
        with page_buffer(4 * MiB) as buffer, open_reader() as reader:
            for piece in split([Extent(0, size)], len(buffer)):
                watch.check()
                reader.read_into(piece.offset, buffer[: piece.length])
                reported.update(buffer[: piece.length])
                watch.advance(piece.length)
        return reported.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        source = pool.submit(side, view.reader)
        copy = side(lambda: replica.reader(view.disk.id))
        return source.result(), copy
