"""Covering a range and merging contexts, compared with a map of bytes."""

from collections.abc import Iterator
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_storage.nbd.status import (
    BASE_ALLOCATION,
    MAX_STATUS_REQUEST,
    BlockStatus,
    Coverage,
    DiskExtent,
    dirty_bitmap_context,
    merge_status,
)

DIRTY = dirty_bitmap_context("b")
CONTEXTS = (BASE_ALLOCATION, DIRTY)


@st.composite
def reported(draw: st.DrawFn, context: str, offset: int, flags: list[int]) -> list[BlockStatus]:
    """FLAGS, one for each byte, as extents that are cut at random, not only where the flags change."""
    cuts = draw(st.sets(st.integers(1, max(1, len(flags) - 1))))
    ends = {i for i in range(1, len(flags)) if flags[i] != flags[i - 1]} | {c for c in cuts if c < len(flags)}
    edges = [0, *sorted(ends), len(flags)] if flags else []
    return [BlockStatus(context, offset + a, b - a, flags[a]) for a, b in pairwise(edges)]


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, list[int], list[int], list[BlockStatus]]:
    size, offset = draw(st.integers(0, 60)), draw(st.integers(0, 1000))
    base = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    dirt = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    queues = [draw(reported(BASE_ALLOCATION, offset, base)), draw(reported(DIRTY, offset, dirt))]
    mixed = []
    while any(queues):
        mixed.append(draw(st.sampled_from([queue for queue in queues if queue])).pop(0))
    return offset, base, dirt, mixed


def model(offset: int, pairs: list[tuple[bool, bool]]) -> list[DiskExtent]:
    """(dirty, zero) of each byte, as coalesced extents."""
    result = []
    for (dirty, zero), run in groupby(pairs):
        length = len(list(run))
        result.append(DiskExtent(offset, length, dirty, zero))
        offset += length
    return result


@given(disks())
def test_merged_extents_say_what_each_byte_is(disk: tuple[int, list[int], list[int], list[BlockStatus]]) -> None:
    offset, base, dirt, mixed = disk
    both = [(bool(d & 1), bool(b & 2)) for b, d in zip(base, dirt, strict=True)]
    assert list(merge_status(mixed, offset, len(base), bitmap="b")) == model(offset, both)
    assert list(merge_status(mixed, offset, len(base), bitmap=None)) == model(offset, [(True, z) for _, z in both])
    only_dirt = merge_status(mixed, offset, len(base), bitmap="b", allocation=False)
    assert list(only_dirt) == model(offset, [(d, False) for d, _ in both])


@given(disks(), st.data())
def test_an_answer_with_a_piece_missing_is_never_taken_for_clean(
    disk: tuple[int, list[int], list[int], list[BlockStatus]], data: st.DataObject
) -> None:
    offset, base, _, mixed = disk
    if not mixed:
        return
    del mixed[data.draw(st.integers(0, len(mixed) - 1))]
    with pytest.raises(ValueError, match=r"block status ends|does not follow"):
        list(merge_status(mixed, offset, len(base), bitmap="b"))


def test_overlap_is_refused() -> None:
    overlap = [BlockStatus(BASE_ALLOCATION, 0, 10, 0), BlockStatus(BASE_ALLOCATION, 5, 10, 0)]
    with pytest.raises(ValueError, match="does not follow"):
        list(merge_status(overlap, 0, 15, bitmap=None))


def test_merging_is_a_stream() -> None:
    """Extents that both contexts have reported are returned before the rest of the answer is read."""

    def endless() -> Iterator[BlockStatus]:
        for i in range(1000):
            yield BlockStatus(BASE_ALLOCATION, i * 10, 10, 2 * (i % 2))
            yield BlockStatus(DIRTY, i * 10, 10, 1)
        pytest.fail("read to the end")

    merged = merge_status(endless(), 0, 10**9, bitmap="b")
    assert next(merged) == DiskExtent(0, 10, dirty=True, zero=False)
    assert next(merged).end == 20


@given(st.integers(0, 10**13), st.integers(0, 10**12), st.data())
def test_every_context_is_covered_once_whatever_the_server_answers(
    offset: int, length: int, data: st.DataObject
) -> None:
    """The server may answer any prefix, a different one for each context, or beyond the end."""
    coverage = Coverage(CONTEXTS, offset, length)
    got: dict[str, list[BlockStatus]] = {context: [] for context in CONTEXTS}
    for round_ in range(40):
        request = coverage.next_request()
        if request is None:
            break
        start, count = request
        assert 0 < count <= MAX_STATUS_REQUEST
        for context in data.draw(st.permutations(CONTEXTS)):
            # finally the whole request, otherwise the test would not end
            lengths = data.draw(st.lists(st.integers(0, count), max_size=4)) if round_ < 10 else []
            lengths.append(2 * count if round_ >= 10 else data.draw(st.integers(1, count)))
            entries = [number for size in lengths for number in (size, size % 4)]
            got[context] += coverage.take(context, start, entries)
    for extents in got.values():
        position = offset
        for extent in extents:
            assert extent.offset == position
            assert extent.length > 0
            position += extent.length
        if coverage.next_request() is None:
            assert position == offset + length


def test_an_answer_that_starts_too_late_is_refused() -> None:
    coverage = Coverage([DIRTY], 0, 100)
    with pytest.raises(ValueError, match="not covered"):
        list(coverage.take(DIRTY, 10, [20, 1]))
