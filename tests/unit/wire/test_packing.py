"""Compressible data are packed, other data are sent unchanged; the level follows the link; received data are
validated."""

from __future__ import annotations

import random
import time

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from asrcore.wire import packing
from asrcore.wire.frames import DATA, ZSTD, Frame, ProtocolError
from asrcore.wire.packing import LEVELS, Packer, unpacked

NOISE = random.Random(1).randbytes(512 * 1024)
TEXT = b"the quick brown fox jumps over the lazy dog, again and again; " * 8000


def frame(packer: Packer, data: bytes) -> Frame:
    body, flags, plain = packer.pack(memoryview(data))
    return Frame(DATA, 1, {}, body, flags, plain)


@given(data=st.binary(max_size=2000) | st.binary(max_size=40).map(lambda part: part * 1000))
def test_what_was_packed_comes_out(data: bytes) -> None:
    assert bytes(unpacked(frame(Packer(), data))) == data


def test_what_shrinks_is_packed() -> None:
    made = frame(Packer(), TEXT)
    assert made.flags == ZSTD
    assert len(made.body) < len(TEXT) / 10
    assert bytes(unpacked(made)) == TEXT


def test_what_does_not_shrink_goes_as_it_is() -> None:
    made = frame(Packer(), NOISE)
    assert (made.flags, made.plain) == (0, 0)
    assert made.body is not None
    assert len(made.body) == len(NOISE)


def test_a_little_that_shrinks_does_not_hide_that_the_rest_does_not() -> None:
    made = frame(Packer(), bytes(4096) + NOISE[4096:])
    assert len(made.body) > len(NOISE) * 0.94


def test_a_peer_that_cannot_unpack_gets_nothing_packed() -> None:
    assert frame(Packer(enabled=False), TEXT).flags == 0


@pytest.mark.parametrize(
    ("seconds", "size", "level"),
    [(30.0, 10**6, LEVELS[-1]), (1e-6, 10**6, LEVELS[0]), (30.0, 10**10, LEVELS[0])],
    ids=["slow link", "fast link, slow cores", "very fast link"],
)
def test_the_level_follows_the_link(monkeypatch: pytest.MonkeyPatch, seconds: float, size: int, level: int) -> None:
    monkeypatch.setattr(packing, "_ROUND", 0.0)
    packer = Packer()
    for _ in range(len(LEVELS) + 1):
        packer._since = time.monotonic() - 1.0
        packer.pack(TEXT)
        packer.sent(size, seconds)
    assert packer.level == level


@pytest.mark.parametrize(
    ("body", "size"),
    [
        (zstandard.compress(TEXT), len(TEXT) - 1),
        (zstandard.compress(TEXT), 2 << 20),
        (zstandard.compress(TEXT)[:-5], len(TEXT)),
        (b"rubbish" * 10, 70),
        (b"", 5),
        (zstandard.ZstdCompressor(write_content_size=False).compress(TEXT), len(TEXT)),
    ],
    ids=["too small", "too large", "cut", "rubbish", "nothing", "without its size"],
)
def test_what_is_not_what_it_says_is_refused(body: bytes, size: int) -> None:
    with pytest.raises(ProtocolError, match=r".+"):
        unpacked(Frame(DATA, 1, {}, body, ZSTD, size))
