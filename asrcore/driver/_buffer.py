"""Memory that disks are read into."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from asrcore.units import MiB

__all__ = ["page_buffer"]

# Kept for the next reader, about so many of this size: memory that is mapped anew for each call is cleared page by page
# (measured, resyncs between two sites: 3.4 to 3.8 s where the page cache took 3.1; with memory that is kept 2.2, by the
# page cache 2.75).
_KEPT = 8
_SIZE = 4 * MiB

_free: list[memoryview] = []
# A child has the same memory, not a copy; its parent goes on reading into it. (Who forks while using some must not give
# it back in the child; nobody does.)
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
