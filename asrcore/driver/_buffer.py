"""Memory that disks are read into."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from asrcore.units import MiB

__all__ = ["page_buffer"]

# Kept for the next reader, so many of this size at most: memory that is mapped anew for each call is cleared page by
# page (measured: a resync between two sites took 3.4 s, 2.7 with memory that is kept).
_KEPT = 8
_SIZE = 4 * MiB

_free: list[memoryview] = []
# A child has the same memory, not a copy; its parent goes on reading into it.
os.register_at_fork(after_in_child=_free.clear)


@contextmanager
def page_buffer(size: int) -> Iterator[memoryview]:
    """`size` bytes of memory (at least one) that begin at a page. What is in them at first is anything.

    Into such memory a reader can bring a disk's content past the page cache (`O_DIRECT`). It is a shared mapping: in
    private memory, as the heap is, such a read may be lost when the process forks meanwhile (open(2), NOTES).
    """
    memory = None
    if size <= _SIZE:
        with suppress(IndexError):
            memory = _free.pop()  # this and `append` are one step each: no lock
    if memory is None:
        memory = memoryview(mmap.mmap(-1, max(size, _SIZE), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
    try:
        yield memory[:size]
    finally:
        if len(memory) == _SIZE and len(_free) < _KEPT:
            _free.append(memory)
