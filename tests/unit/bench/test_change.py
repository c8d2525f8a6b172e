"""The change of a round: its size, its place, and that it changes the content."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.units import KiB, MiB
from tests.bench._change import BLOCK, Change, contents, plan_change, total

SIZE = 64 * MiB
BLOCKS = list(range(8 * MiB, 40 * MiB, BLOCK))
POOL = bytes(range(251)) * 20000


@given(
    seed=st.integers(0, 1000),
    scattered=st.integers(0, 64).map(lambda count: count * BLOCK),
    sequential=st.integers(0, 6).map(lambda count: count * 700 * KiB),
)
def test_a_plan_changes_what_was_asked_for_and_nothing_twice(seed: int, scattered: int, sequential: int) -> None:
    changes = plan_change(BLOCKS, SIZE, seed, scattered=scattered, sequential=sequential, first=16 * MiB)
    assert total(changes) == scattered + sequential
    ordered = sorted(changes, key=lambda change: change.offset)
    assert all(one.offset + one.length <= other.offset for one, other in itertools.pairwise(ordered))
    assert all(16 * MiB <= change.offset and change.offset + change.length <= SIZE for change in changes)
    alone = [change for change in changes if change.length == BLOCK and change.offset in BLOCKS]
    assert len(alone) >= scattered // BLOCK


def test_same_seed_same_plan() -> None:
    one, same, other = (plan_change(BLOCKS, SIZE, seed, scattered=MiB, sequential=MiB) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_too_few_blocks_are_reported() -> None:
    with pytest.raises(ValueError, match="600 blocks requested, 512 available"):
        plan_change(BLOCKS, SIZE, 1, scattered=600 * BLOCK)


def test_every_block_becomes_another_one_each_time() -> None:
    first, second = (dict(contents([Change(MiB, 3 * BLOCK, seed)], POOL)) for seed in (1, 2))
    assert len(first[MiB]) == 3 * BLOCK
    for at in range(0, 3 * BLOCK, BLOCK):
        assert first[MiB][at : at + BLOCK] != second[MiB][at : at + BLOCK]
    assert first == dict(contents([Change(MiB, 3 * BLOCK, 1)], POOL))


def test_a_pool_that_is_too_small_still_fills_the_block() -> None:
    assert len(Change(0, BLOCK, 1).content(b"abc")) == BLOCK
