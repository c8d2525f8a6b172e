"""Memory that disks are read into."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from asrcore.units import MiB

__all__ = ["page_buffer"]

# About this many buffers of this size are kept for the next reader: newly mapped memory is cleared page by page on each
# call (measured, resyncs between two sites: 3.4 to 3.8 s, against 3.1 s through the page cache; with kept memory 2.2 s,
# against 2.75 s).
_KEPT = 8
_SIZE = 4 * MiB

_free: list[memoryview] = []
# A child process shares this memory, it has no copy, and its parent continues to read into it. (A process that forks
# while it uses a buffer must not give it back in the child; none does.)
os.register_at_fork(after_in_child=_free.clear)


@contextmanager
def page_buffer(size: int) -> Iterator[memoryview]:
    """`size` bytes of memory (at least one), aligned to a page. Their initial content is undefined.

    A reader can read a disk into this memory without the page cache (`O_DIRECT`). It is a shared mapping: in private
    memory, such as the heap, such a read may be lost when the process forks during it (open(2), NOTES).
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
