"""Reading one disk of a frozen view, a replica or a recovery point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from asrcore.closing import Closing

__all__ = ["DiskReader"]


class DiskReader(Closing, ABC):
    """Reads one frozen disk. Not shared between threads: each opens its own."""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the caller's writable buffer from `offset`. Raises ViewLost (or ReplicaDamaged for a replica).

        Any buffer will do; a `page_buffer` lets a driver read past the page cache.
        """

    def read_each(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Fill several buffers, each from its offset. Raises as `read_into`.

        To be overridden where one request can carry several reads, or several requests can be in flight: a delta is
        thousands of small extents, and one by one each waits for the answer to the one before. The caller gives a few
        MiB at most. When this returns or raises, nothing is written to the buffers any more.
        """
        for offset, buffer in reads:
            self.read_into(offset, buffer)
