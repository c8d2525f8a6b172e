"""Memory that disks are read into."""

from __future__ import annotations

import ctypes
import mmap

__all__ = ["page_buffer"]


def page_buffer(size: int) -> memoryview:
    """`size` bytes (at least one) of zeroes that begin at a page of memory.

    Into such memory a reader can bring a disk's content past the page cache (`O_DIRECT`). It is given back when nobody
    refers to it any more.
    """
    memory = bytearray(size + mmap.PAGESIZE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % mmap.PAGESIZE
    return memoryview(memory)[start : start + size]
