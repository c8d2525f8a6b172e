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

        To be overridden where requests can be in flight together: a delta is thousands of small ones.
        """
        for offset, buffer in reads:
            self.read_into(offset, buffer)
