"""Sets of ranges, compared with sets of numbers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from asr_driver_azure.blobs.ranges import RangeSet

_SPAN = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted)


@given(st.lists(st.tuples(st.booleans(), _SPAN), max_size=30), _SPAN)
def test_it_is_a_set_of_bytes(steps: list[tuple[bool, list[int]]], window: list[int]) -> None:
    ranges, model = RangeSet(), set[int]()
    for add, (start, end) in steps:
        if add:
            ranges.add(start, end)
            model |= set(range(start, end))
        else:
            ranges.remove(start, end)
            model -= set(range(start, end))
    extents = ranges.extents()
    assert {byte for item in extents for byte in range(item.offset, item.end)} == model
    assert all(one.end < two.offset for one, two in itertools.pairwise(extents)), "neighbours are joined"
    assert bool(ranges) == bool(model)
    seen = [byte for item in ranges.within(*window) for byte in range(item.offset, item.end)]
    assert seen == sorted(model & set(range(*window)))
