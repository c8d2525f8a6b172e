"""The algebra of extents, against a model with one letter per byte."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.model import extent as x
from asrcore.model.extent import Extent

SIZE = 64  # bytes of the modelled disk

extents = st.lists(
    st.builds(Extent, st.integers(0, SIZE - 1), st.integers(0, 20), st.booleans()), max_size=12
)  # overlapping, touching, empty and unsorted ones, some beyond the end


def letters(items: list[Extent], size: int = SIZE * 2) -> list[str]:
    """`d` for data, `z` for zero, `.` for nothing, at each byte; data wins."""
    disk = ["."] * size
    for kind, zero in (("z", True), ("d", False)):
        for item in items:
            if item.zero is zero:
                for at in range(item.offset, item.end):
                    disk[at] = kind
    return disk


def assert_sound(items: list[Extent]) -> None:
    """Sorted, without overlap, none empty, and neighbours of a kind merged."""
    assert all(item.length > 0 for item in items)
    for a, b in pairwise(items):
        assert a.end <= b.offset
        assert not (a.end == b.offset and a.zero == b.zero)


@given(extents)
def test_normalise(items: list[Extent]) -> None:
    result = x.normalise(items)
    assert_sound(result)
    assert letters(result) == letters(items)
    assert x.normalise(result) == result


@given(extents, extents)
def test_union(a: list[Extent], b: list[Extent]) -> None:
    result = x.union(a, b)
    assert_sound(result)
    assert letters(result) == letters(a + b)


@given(extents, extents)
def test_subtract(items: list[Extent], holes: list[Extent]) -> None:
    result = x.subtract(items, holes)
    assert_sound(result)
    covered = letters(holes)
    assert letters(result) == [kind if hole == "." else "." for kind, hole in zip(letters(items), covered, strict=True)]


@given(extents, extents)
def test_intersect(items: list[Extent], others: list[Extent]) -> None:
    result = x.intersect(items, others)
    assert_sound(result)
    covered = letters(others)
    assert letters(result) == ["." if hole == "." else kind for kind, hole in zip(letters(items), covered, strict=True)]


@given(extents, extents)
def test_what_is_cut_out_and_what_is_left_make_the_whole(a: list[Extent], b: list[Extent]) -> None:
    assert letters([*x.subtract(a, b), *x.intersect(a, b)]) == letters(a)
    assert x.total(x.subtract(a, b)) + x.total(x.intersect(a, b)) == x.total(x.normalise(a))


@given(extents, st.integers(0, SIZE + 10))
def test_clip(items: list[Extent], size: int) -> None:
    result = x.clip(items, size)
    assert_sound(result)
    assert letters(result) == letters(items)[:size] + ["."] * (SIZE * 2 - size)


@given(extents, st.integers(1, 16), st.integers(1, SIZE + 10))
def test_align(items: list[Extent], granule: int, size: int) -> None:
    result = x.align(items, granule, size)
    assert_sound(result)
    for at, kind in enumerate(letters([item for item in items if item.length], size=SIZE * 2)[:size]):
        if kind != ".":
            inside = [item for item in result if item.offset <= at < item.end]
            assert inside, "every byte is still covered"
            assert kind == "z" or not inside[0].zero, "data never becomes zero"
    for item in result:
        assert item.offset % granule == 0 or any(b.end == item.offset for b in result)
        assert item.end % granule == 0 or item.end == size or any(b.offset == item.end for b in result)
        assert item.end <= size


@given(extents, st.integers(1, 24))
def test_split(items: list[Extent], most: int) -> None:
    whole = x.normalise(items)
    pieces = list(x.split(whole, most))
    assert letters(pieces) == letters(whole)
    assert all(0 < piece.length <= most for piece in pieces)
    assert all(piece.offset // most == (piece.end - 1) // most for piece in pieces), "none crosses a multiple"
    assert x.total(pieces) == x.total(whole)


@given(extents, st.integers(1, 16), st.integers(1, 5))
def test_batches(items: list[Extent], most: int, count: int) -> None:
    """All batches in order, none too large or with too many pieces, and no piece that fits into the previous batch."""
    whole = x.normalise(items)
    found = list(x.batches(whole, most, count))
    assert [piece for batch in found for piece in batch] == list(x.split(whole, most))
    for batch in found:
        assert 0 < len(batch) <= count
        assert x.total(batch) <= most
    for batch, following in pairwise(found):
        assert len(batch) == count or x.total(batch) + following[0].length > most


def test_data_wins_over_zero_and_neighbours_merge() -> None:
    items = [Extent(0, 10, zero=True), Extent(4, 2), Extent(10, 5, zero=True)]
    assert x.normalise(items) == [Extent(0, 4, zero=True), Extent(4, 2), Extent(6, 9, zero=True)]


@pytest.mark.parametrize("function", [x.normalise, x.union], ids=["normalise", "union"])
def test_nothing_of_nothing(function: object) -> None:
    assert callable(function)
    assert function([]) == []


def test_many_extents_take_no_square_of_time() -> None:
    """20,000 fragments, as of a badly fragmented disk: minutes would mean a quadratic algorithm."""
    many = [Extent(at * 128, 64) for at in range(20_000)]
    holes = [Extent(at * 128 + 32, 64) for at in range(20_000)]
    assert x.total(x.subtract(many, holes)) == 20_000 * 32
    assert x.total(x.intersect(many, holes)) == 20_000 * 32
