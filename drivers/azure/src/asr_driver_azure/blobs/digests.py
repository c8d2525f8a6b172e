"""Digests of a machine's disks as they were promoted, so that a comparison for failback need not download them.

They are computed from what is sent to the disk, in whole blocks, before the machine first runs; so they are those of
the snapshot that is taken then, and of every block that has not changed since.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from urllib.parse import quote

from asr_driver_azure.blobs.container import Container
from asrcore.driver import DIGEST_BLOCK, DIGEST_SIZE, digest_of
from asrcore.model.extent import Extent

__all__ = ["DigestTable", "digests_blob"]


def digests_blob(owner: str, disk_id: str) -> str:
    """Name of the blob of a disk's digests."""
    return f"machines/{owner}/{quote(disk_id, safe='')}.digests"


class DigestTable:
    """Of the blocks that hold data; all others are zero. `size`: bytes of the disk."""

    def __init__(self, size: int, extents: list[Extent], digests: Mapping[int, bytes]) -> None:
        """`digests`: for each extent, by its offset."""
        self._size = size
        self._extents = sorted(extents)
        self._starts = [item.offset for item in self._extents]
        self._digests = digests

    @classmethod
    def load(cls, container: Container, owner: str, disk_id: str) -> DigestTable | None:
        """None if none was kept."""
        found = container.read(digests_blob(owner, disk_id))
        if found is None:
            return None
        head, _, body = found[0].partition(b"\n")
        reported = json.loads(head)
        extents, digests, at = [], {}, 0
        for offset, length in reported["extents"]:
            count = -(-length // DIGEST_BLOCK) * DIGEST_SIZE
            extents.append(Extent(offset, length))
            digests[offset] = body[at : at + count]
            at += count
        return cls(int(reported["size"]), extents, digests)

    def save(self, container: Container, owner: str, disk_id: str) -> None:
        """Keep it."""
        head = {"size": self._size, "extents": [[item.offset, item.length] for item in self._extents]}
        body = b"".join(self._digests[item.offset] for item in self._extents)
        container.write(digests_blob(owner, disk_id), json.dumps(head).encode() + b"\n" + body)

    @property
    def size(self) -> int:
        """Bytes of the disk that it is of."""
        return self._size

    def of(self, block: int) -> bytes:
        """Digest of the block that begins at this offset."""
        index = bisect_right(self._starts, block) - 1
        if index >= 0 and block < self._extents[index].end:
            at = (block - self._starts[index]) // DIGEST_BLOCK * DIGEST_SIZE
            return self._digests[self._starts[index]][at : at + DIGEST_SIZE]
        return _zero(min(DIGEST_BLOCK, self._size - block))


_zeroes: dict[int, bytes] = {}


def _zero(length: int) -> bytes:
    if length not in _zeroes:
        _zeroes[length] = digest_of(bytes(length))
    return _zeroes[length]
