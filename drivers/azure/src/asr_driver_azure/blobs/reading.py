"""Reading ranges of a blob or snapshot: only what it holds is requested, several ranges at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial

from asr_driver_azure.blobs.ranges import RangeSet

__all__ = ["fill_around", "read_together"]

Read = tuple[int, memoryview]


def fill_around(stored: RangeSet, offset: int, buffer: memoryview) -> Read | None:
    """Fill with zeroes what comes before and behind stored data; what is to be requested, if there is any.

    One request for all of it: a request costs more than a few zeroes in between.
    """
    held = stored.within(offset, offset + len(buffer))
    start, stop = (held[0].offset - offset, held[-1].end - offset) if held else (len(buffer), len(buffer))
    buffer[:start] = bytes(start)
    buffer[stop:] = bytes(len(buffer) - stop)
    return (offset + start, buffer[start:stop]) if held else None


def read_together(
    begin: Callable[[Callable[[], None]], Future[None]], wanted: Sequence[Read], read: Callable[[int, memoryview], None]
) -> None:
    """Read each in a thread that `begin` gives it. The first error is raised; requests that have not begun are not
    sent then, and those that have are waited for, because they write to the buffers."""
    if len(wanted) == 1:  # no thread is worth its start
        read(*wanted[0])
        return
    begun: list[Future[None]] = []
    try:
        for offset, buffer in wanted:
            begun.append(begin(partial(read, offset, buffer)))
        wait(begun, return_when=FIRST_EXCEPTION)
    finally:
        wait([future for future in begun if not future.cancel()])
    for future in begun:
        if not future.cancelled():
            future.result()
