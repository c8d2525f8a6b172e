"""A set of ranges that changes all the time: sorted, disjoint, found by bisection."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from asrcore.model.extent import Extent

__all__ = ["RangeSet"]


class RangeSet:
    """Bytes of a disk. Adding and removing cost a bisection, whatever the number of ranges. Not thread-safe."""

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for extent in extents:
            self.add(extent.offset, extent.end)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def add(self, start: int, end: int) -> None:
        """Put `start` to `end` in."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        """Take `start` to `end` out."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if start >= end or first >= last:
            return
        starts, ends = [], []
        if self._starts[first] < start:
            starts.append(self._starts[first])
            ends.append(start)
        if self._ends[last - 1] > end:
            starts.append(end)
            ends.append(self._ends[last - 1])
        self._starts[first:last] = starts
        self._ends[first:last] = ends

    def within(self, start: int, end: int) -> list[Extent]:
        """What of the set lies between `start` and `end`."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        cut = [
            (max(a, start), min(b, end)) for a, b in zip(self._starts[first:last], self._ends[first:last], strict=True)
        ]
        return [Extent(a, b - a) for a, b in cut if a < b]

    def extents(self) -> list[Extent]:
        """All of it, sorted."""
        return [Extent(a, b - a) for a, b in zip(self._starts, self._ends, strict=True)]
