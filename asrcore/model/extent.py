"""Ranges of a disk, in bytes, and their algebra. Lists of extents are sorted and do not overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

__all__ = ["Extent", "align", "batches", "clip", "intersect", "normalise", "split", "subtract", "total", "union"]


@attrs.frozen(order=True)
class Extent:
    """`length` bytes from `offset`, both seen from the guest. `zero`: known to read as zeroes without reading."""

    offset: int
    length: int
    zero: bool = False

    @property
    def end(self) -> int:
        """The first byte behind the extent."""
        return self.offset + self.length


def normalise(extents: Iterable[Extent]) -> list[Extent]:
    """Sorted, merged, without overlap or empty extents; where data and zero overlap, data wins (it is read)."""
    result: list[Extent] = []
    ordered = sorted((item for item in extents if item.length > 0), key=lambda item: item.offset)
    data = _merge(item for item in ordered if not item.zero)
    zero = _subtract(_merge(item for item in ordered if item.zero), data)
    for item in sorted(data + zero, key=lambda item: item.offset):
        if result and result[-1].end == item.offset and result[-1].zero == item.zero:
            result[-1] = Extent(result[-1].offset, result[-1].length + item.length, item.zero)
        else:
            result.append(item)
    return result


def _merge(ordered: Iterable[Extent]) -> list[Extent]:
    result: list[Extent] = []
    for item in ordered:
        if result and item.offset <= result[-1].end:
            last = result[-1]
            result[-1] = Extent(last.offset, max(last.end, item.end) - last.offset, item.zero)
        else:
            result.append(item)
    return result


def _covered(extents: Iterable[Extent]) -> list[Extent]:
    return _merge(sorted((item for item in extents if item.length > 0), key=lambda item: item.offset))


def union(*lists: Iterable[Extent]) -> list[Extent]:
    """All bytes of all lists; see `normalise` for where data and zero meet."""
    return normalise(item for extents in lists for item in extents)


def subtract(extents: Iterable[Extent], holes: Iterable[Extent]) -> list[Extent]:
    """The bytes of `extents` that are in none of `holes`, their `zero` kept."""
    return _subtract(normalise(extents), _covered(holes))


def _subtract(extents: list[Extent], holes: list[Extent]) -> list[Extent]:
    result: list[Extent] = []
    first = 0
    for item in extents:
        start = item.offset
        while first < len(holes) and holes[first].end <= start:
            first += 1
        index = first
        while index < len(holes) and holes[index].offset < item.end:
            if holes[index].offset > start:
                result.append(Extent(start, holes[index].offset - start, item.zero))
            start = max(start, holes[index].end)
            index += 1
        if start < item.end:
            result.append(Extent(start, item.end - start, item.zero))
    return result


def intersect(extents: Iterable[Extent], others: Iterable[Extent]) -> list[Extent]:
    """The bytes of `extents` that are also in `others`, the `zero` of `extents` kept."""
    extents = normalise(extents)
    return _subtract(extents, _merge(_subtract(extents, _covered(others))))


def clip(extents: Iterable[Extent], size: int) -> list[Extent]:
    """What lies within a disk of `size` bytes."""
    return [
        item if item.end <= size else Extent(item.offset, size - item.offset, item.zero)
        for item in normalise(extents)
        if item.offset < size
    ]


def align(extents: Iterable[Extent], granule: int, size: int) -> list[Extent]:
    """Grown outwards to multiples of `granule` bytes, within a disk of `size` bytes."""
    grown = (
        Extent(start := item.offset // granule * granule, -(-item.end // granule) * granule - start, item.zero)
        for item in extents
    )
    return clip(grown, size)


def split(extents: Iterable[Extent], most: int) -> Iterator[Extent]:
    """The same bytes in pieces of at most `most` bytes, cut at multiples of `most`."""
    for item in extents:
        start = item.offset
        while start < item.end:
            end = min(item.end, (start // most + 1) * most)
            yield Extent(start, end - start, item.zero)
            start = end


def batches(extents: Iterable[Extent], most: int, count: int) -> Iterator[list[Extent]]:
    """The same bytes in pieces as of `split`, gathered to at most `most` bytes and `count` pieces at a time."""
    batch: list[Extent] = []
    length = 0
    for piece in split(extents, most):
        if batch and (length + piece.length > most or len(batch) == count):
            yield batch
            batch, length = [], 0
        batch.append(piece)
        length += piece.length
    if batch:
        yield batch


def total(extents: Iterable[Extent]) -> int:
    """Bytes in all of them."""
    return sum(item.length for item in extents)
