"""The contract's own code: digests, closing, defaults of a site."""

from __future__ import annotations

import hashlib

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from asrcore import driver
from asrcore.driver import DIGEST_BLOCK, DIGEST_SIZE, Closing, DiskReader, Site, digests_of
from asrcore.errors import UnsupportedOperation, ViewLost
from asrcore.model.extent import Extent, union
from asrcore.units import MiB


class BytesReader(DiskReader):
    """A disk in memory that records how it was read."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.reads: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        piece = self.content[offset : offset + len(buffer)]
        assert len(piece) == len(buffer), "read behind the end"
        self.reads.append((offset, len(buffer)))
        buffer[:] = piece

    def close(self) -> None:
        """Nothing to release."""


def pattern(length: int) -> bytes:
    return hashlib.shake_128(b"content").digest(length)


@given(st.integers(0, 40), st.integers(1, 40 * DIGEST_BLOCK))
def test_digests_are_those_of_the_blocks(first_block: int, length: int) -> None:
    content = pattern(3 * MiB)
    start = first_block * DIGEST_BLOCK
    length = min(length, len(content) - start)
    expected = b"".join(
        blake3(content[at : min(at + DIGEST_BLOCK, start + length)]).digest(DIGEST_SIZE)
        for at in range(start, start + length, DIGEST_BLOCK)
    )
    assert digests_of(BytesReader(content), Extent(start, length)) == expected


def test_digests_of_an_extent_are_those_of_its_parts() -> None:
    content = pattern(3 * MiB + 512)
    whole = digests_of(BytesReader(content), Extent(0, len(content)))
    head = digests_of(BytesReader(content), Extent(0, 5 * DIGEST_BLOCK))
    rest = digests_of(BytesReader(content), Extent(5 * DIGEST_BLOCK, len(content) - 5 * DIGEST_BLOCK))
    assert head + rest == whole
    assert len(whole) == 49 * DIGEST_SIZE


def test_digests_are_read_in_bounded_pieces() -> None:
    reader = BytesReader(bytes(9 * MiB))
    assert digests_of(reader, Extent(0, 9 * MiB)) == driver.zero_digest() * 144
    assert max(length for _, length in reader.reads) <= 4 * MiB
    assert digests_of(reader, Extent(0, 0)) == b""


def test_digests_of_a_crooked_extent_are_refused() -> None:
    with pytest.raises(ValueError, match="does not start at a digest block"):
        digests_of(BytesReader(bytes(MiB)), Extent(512, 1024))


def test_one_flipped_bit_changes_one_digest() -> None:
    content = bytearray(pattern(4 * DIGEST_BLOCK))
    before = digests_of(BytesReader(bytes(content)), Extent(0, len(content)))
    content[2 * DIGEST_BLOCK + 77] ^= 1
    after = digests_of(BytesReader(bytes(content)), Extent(0, len(content)))
    differing = [i for i in range(4) if before[i * 16 : i * 16 + 16] != after[i * 16 : i * 16 + 16]]
    assert differing == [2]


class Fragile(Closing):
    """Fails to close."""

    def close(self) -> None:
        raise OSError("close failed")


def test_error_of_the_block_is_not_hidden_by_that_of_close() -> None:
    with pytest.raises(ViewLost), Fragile():
        raise ViewLost(machine="web", detail="gone")


def test_error_of_close_is_reported_when_it_is_the_first() -> None:
    with pytest.raises(OSError, match="close failed"), Fragile():
        pass


class Counting(Closing):
    """Counts how often it is closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_leaving_the_block_closes_once() -> None:
    with Counting() as thing:
        assert thing.closed == 0
    assert thing.closed == 1


class BareSite(Site):
    """Offers no role at all."""

    name, driver = "paris", "bare"

    def close(self) -> None:
        """Nothing to release."""


@pytest.mark.parametrize("role", ["inventory", "source", "target", "failover"])
def test_role_that_is_not_offered_is_unsupported(role: str) -> None:
    with pytest.raises(UnsupportedOperation, match="driver bare cannot"):
        getattr(BareSite(), role)


def test_public_names_exist() -> None:
    assert all(hasattr(driver, name) for name in driver.__all__)
    assert DIGEST_BLOCK % 4096 == 0


def test_a_source_may_choose_a_digest_of_the_standard_library() -> None:
    content = bytes(range(256)) * 300
    found = digests_of(BytesReader(content), Extent(0, len(content)), driver.Digest.BLAKE2B)
    blocks = [content[at : at + DIGEST_BLOCK] for at in range(0, len(content), DIGEST_BLOCK)]
    assert found == b"".join(hashlib.blake2b(block, digest_size=DIGEST_SIZE).digest() for block in blocks)
    assert driver.zero_digest(driver.Digest.BLAKE2B) != driver.zero_digest()


@given(st.integers(0, 3), st.integers(1, 12 * DIGEST_BLOCK), st.sets(st.integers(0, 11)))
def test_different_blocks_are_named_joined_and_within_the_extent(first: int, length: int, wrong: set[int]) -> None:
    extent = Extent(first * DIGEST_BLOCK, length)
    ours = bytearray(digests_of(BytesReader(pattern(extent.end)), extent))
    wrong = {number for number in wrong if number * DIGEST_SIZE < len(ours)}
    theirs = bytes(ours)
    for number in wrong:
        ours[number * DIGEST_SIZE + 7] ^= 1
    found = driver.different_blocks(extent, bytes(ours), theirs)
    blocks = [Extent(extent.offset + n * DIGEST_BLOCK, min(DIGEST_BLOCK, length - n * DIGEST_BLOCK)) for n in wrong]
    assert found == union(blocks)


def test_digests_of_another_extent_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes of digests"):
        driver.different_blocks(Extent(0, DIGEST_BLOCK), bytes(DIGEST_SIZE), bytes(2 * DIGEST_SIZE))
