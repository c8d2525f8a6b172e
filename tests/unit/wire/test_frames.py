"""The protocol between two ends in memory: whatever is done to the bytes between them, only what was sent is
received."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from asrcore.wire import frames
from asrcore.wire.frames import Connection, Frame, ProtocolError


@attrs.define
class Link:
    """Two ends that have exchanged hellos."""

    left: Connection
    right: Connection

    @classmethod
    def made(cls, **settings: object) -> Link:
        ends = [
            Connection(dialled=dialled, me={"name": name}, hashes={"blake3": blake3}, compression=("zstd",), **settings)  # type: ignore[arg-type]
            for dialled, name in ((True, "left"), (False, "right"))
        ]
        link = cls(*ends)
        hellos = link.left.hello(), link.right.hello()
        assert [frame.type for frame in link.right.feed(hellos[0])] == [frames.HELLO]
        assert [frame.type for frame in link.left.feed(hellos[1])] == [frames.HELLO]
        return link

    def ask(self, head: dict[str, object], body: bytes = b"", flags: int = 0) -> tuple[int, bytes]:
        stream = self.left.open_stream()
        return stream, packed(self.left, Frame(frames.REQUEST, stream, head, body, flags))


def packed(end: Connection, frame: Frame) -> bytes:
    return b"".join(map(bytes, end.pack(frame)))


def plain(frames: Iterator[Frame]) -> list[tuple[object, ...]]:
    return [(frame.type, frame.stream, dict(frame.head), bytes(frame.body)) for frame in frames]


def refused(end: Connection, data: bytes) -> str:
    with pytest.raises(ProtocolError) as problem:
        list(end.feed(data))
    with pytest.raises(ProtocolError):  # and nothing more is accepted
        list(end.feed(bytes(frames.HEADER_SIZE)))
    return problem.value.reason


# -- what is sent comes out -----------------------------------------------------------------------------------------

HEADS = st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20) | st.none(), max_size=4)
BODIES = st.binary(max_size=300)


@given(requests=st.lists(st.tuples(HEADS, BODIES), min_size=1, max_size=6), cuts=st.lists(st.integers(1, 200)))
def test_any_cut_of_the_stream_gives_the_same_frames(
    requests: list[tuple[dict[str, object], bytes]], cuts: list[int]
) -> None:
    link = Link.made()
    asked = [(link.ask(head, body), head, body) for head, body in requests]
    data = b"".join(item[0][1] for item in asked)
    seen: list[tuple[object, ...]] = []
    for cut in (*cuts, len(data)):
        seen += plain(link.right.feed(data[:cut]))
        data = data[cut:]
    assert seen == [(frames.REQUEST, stream, head, body) for (stream, _), head, body in asked]


def test_each_side_learns_of_the_other() -> None:
    link = Link.made(features=("echo",), window=4096)
    assert link.left.peer == frames.Peer(("echo",), ("zstd",), 4096, {"name": "right"})
    assert link.right.peer is not None
    assert link.right.peer.about == {"name": "left"}


def test_who_was_dialled_may_ask() -> None:
    link = Link.made()
    stream = link.right.open_stream()
    request = packed(link.right, Frame(frames.REQUEST, stream, {"call": "status"}))
    assert plain(link.left.feed(request)) == [(frames.REQUEST, stream, {"call": "status"}, b"")]
    reply = packed(link.left, Frame(frames.REPLY, stream, {"up": True}, b"bulk"))
    assert plain(link.right.feed(reply)) == [(frames.REPLY, stream, {"up": True}, b"bulk")]
    assert not link.right.asked(stream)


def test_a_peer_without_blake3_gets_blake2b() -> None:
    left = Connection(dialled=True, hashes={"blake3": blake3})
    right = Connection(dialled=False)
    hellos = left.hello(), right.hello()
    list(right.feed(hellos[0]))
    list(left.feed(hellos[1]))
    stream = left.open_stream()
    request = packed(left, Frame(frames.REQUEST, stream, {"call": "x"}, b"body"))
    assert plain(right.feed(request)) == [(frames.REQUEST, stream, {"call": "x"}, b"body")]


def test_replies_may_come_in_any_order() -> None:
    link = Link.made()
    first, second = link.ask({"n": 1}), link.ask({"n": 2})
    list(link.right.feed(first[1] + second[1]))
    replies = packed(link.right, Frame(frames.REPLY, second[0])) + packed(
        link.right, Frame(frames.ERROR, first[0], {"code": "x"})
    )
    assert [(item[0], item[1]) for item in plain(link.left.feed(replies))] == [
        (frames.REPLY, second[0]),
        (frames.ERROR, first[0]),
    ]


def test_a_carriers_own_buffer_is_used() -> None:
    link = Link.made()
    stream, data = link.ask({"call": "put"}, b"x" * 1000)
    header = link.right.header(data[: frames.HEADER_SIZE])
    buffer = bytearray(data[frames.HEADER_SIZE :] + b"left over")
    frame = link.right.payload(header, buffer)
    assert frame is not None
    assert (frame.stream, bytes(frame.body)) == (stream, b"x" * 1000)
    buffer[-10 - len(b"left over")] = ord("y")
    assert b"y" in bytes(frame.body), "it is a copy"


# -- what is changed on the way is refused ----------------------------------------------------------------------------


@given(where=st.integers(0), bit=st.integers(0, 7), head=HEADS, body=BODIES)
def test_any_flipped_bit_is_refused(where: int, bit: int, head: dict[str, object], body: bytes) -> None:
    link = Link.made()
    _, data = link.ask(head, body)
    wrong = bytearray(data)
    wrong[where % len(data)] ^= 1 << bit
    assert refused(link.right, bytes(wrong)) in ("magic", "version", "forged", "digest")


@given(where=st.integers(0), bit=st.integers(0, 7), side=st.booleans())
def test_a_changed_hello_makes_no_connection(where: int, bit: int, side: bool) -> None:
    left, right = Connection(dialled=True), Connection(dialled=False)
    hellos = [bytearray(left.hello()), bytearray(right.hello())]
    changed = hellos[side]
    # An attacker who changes the payload can correct the digest, but does not have the keys.
    at = frames.HEADER_SIZE + where % (len(changed) - frames.HEADER_SIZE)
    changed[at] ^= 1 << bit
    _make_valid(changed)
    try:
        list(right.feed(hellos[0]))
        list(left.feed(hellos[1]))
    except ProtocolError as problem:
        assert problem.reason in ("hello", "head")  # noqa: PT017 - it may or may not be raised
        return
    request = packed(left, Frame(frames.REQUEST, left.open_stream(), {"call": "x"}))
    assert refused(right, request) == "forged"


def _make_valid(hello: bytearray) -> None:
    digest = frames._digest(frames._blake2b, bytes(hello[frames.HEADER_SIZE :]), b"")
    hello[frames._HEADER.size - 32 : frames._HEADER.size] = digest
    hello[frames._HEADER.size : frames.HEADER_SIZE] = frames._mac(b"", bytes(hello[: frames._HEADER.size]))


def test_a_frame_that_comes_again_is_refused() -> None:
    link = Link.made()
    _, data = link.ask({"call": "x"})
    assert len(list(link.right.feed(data))) == 1
    assert refused(link.right, data) == "sequence"


def test_frames_in_another_order_are_refused() -> None:
    link = Link.made()
    first, second = link.ask({"n": 1})[1], link.ask({"n": 2})[1]
    assert refused(link.right, second + first) == "sequence"


def test_a_frame_that_is_left_out_is_noticed() -> None:
    link = Link.made()
    link.ask({"n": 1})
    assert refused(link.right, link.ask({"n": 2})[1]) == "sequence"


def test_a_frame_of_another_connection_is_refused() -> None:
    assert refused(Link.made().right, Link.made().ask({"n": 1})[1]) == "forged"


def test_a_frame_that_is_sent_back_is_refused() -> None:
    link = Link.made()
    assert refused(link.left, link.ask({"n": 1})[1]) == "forged"


@given(keep=st.integers(0))
def test_a_cut_is_noticed(keep: int) -> None:
    link = Link.made()
    _, data = link.ask({"n": 1}, b"body")
    assert list(link.right.feed(data[: keep % len(data)])) == []
    with pytest.raises(ProtocolError, match="truncated"):
        link.right.eof()


def test_the_end_after_a_goodbye_is_none() -> None:
    link = Link.made()
    frames = list(link.right.feed(link.left.goodbye("stopped", "the service ends")))
    assert frames[0].head == {"reason": "stopped", "detail": "the service ends"}
    link.right.eof()
    assert link.left.goodbye() == b""


@given(data=st.binary(min_size=frames.HEADER_SIZE, max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert refused(Connection(dialled=False), data) in ("magic", "version", "forged")


@given(data=st.binary(max_size=400))
def test_random_bytes_after_the_hello_are_refused(data: bytes) -> None:
    link = Link.made()
    head = frames._HEADER.pack(frames.MAGIC, frames.VERSION, frames.DATA, 0, 1, 1, len(data), 0, 0, bytes(32))
    assert refused(link.right, head + bytes(16) + data) == "forged"


# -- a peer that has the keys and does not keep to the rules -----------------------------------------------------------


def stamped(end: Connection, kind: int, stream: int, payload: bytes = b"", **fields: int) -> bytes:
    """A frame with a valid code and sequence number, whatever its content."""
    digest = frames._digest(blake3, payload, b"")
    flags, head, body = fields.get("flags", 0), fields.get("head", len(payload)), fields.get("body", 0)
    sequence, version = fields.get("sequence", end._out_sequence), fields.get("version", frames.VERSION)
    plain_size = fields.get("plain", 0)
    packed_ = frames._HEADER.pack(frames.MAGIC, version, kind, flags, stream, sequence, head, body, plain_size, digest)
    end._out_sequence += 1
    return packed_ + frames._mac(end._out_key, packed_) + payload


Bad = Callable[[Link], bytes]
BAD: dict[str, tuple[str, Bad]] = {
    "another version": ("version", lambda link: stamped(link.left, frames.REQUEST, 1, version=2)),
    "unknown type": ("type", lambda link: stamped(link.left, 99, 1)),
    "unknown flag": ("type", lambda link: stamped(link.left, frames.REQUEST, 1, flags=64)),
    "a flag that is not of the type": ("type", lambda link: stamped(link.left, frames.REQUEST, 1, flags=frames.END)),
    "a second hello": ("hello", lambda link: stamped(link.left, frames.HELLO, 0)),
    "a huge head": ("length", lambda link: stamped(link.left, frames.REQUEST, 1, head=frames.MAX_HEAD + 1)),
    "a huge body": ("length", lambda link: stamped(link.left, frames.REQUEST, 1, body=frames.MAX_BODY + 1)),
    "unpacks to too much": (
        "length",
        lambda link: stamped(link.left, frames.REQUEST, 1, flags=frames.ZSTD, plain=frames.MAX_BODY + 1),
    ),
    "packed without a size": ("length", lambda link: stamped(link.left, frames.REQUEST, 1, flags=frames.ZSTD)),
    "a request without a stream": ("stream", lambda link: stamped(link.left, frames.REQUEST, 0)),
    "a goodbye on a stream": ("stream", lambda link: stamped(link.left, frames.GOODBYE, 1)),
    "a request on the other side's stream": ("stream", lambda link: stamped(link.left, frames.REQUEST, 2)),
    "a request on an old stream": (
        "stream",
        lambda link: stamped(link.left, frames.REQUEST, 3) + stamped(link.left, frames.REQUEST, 1),
    ),
    "data on no stream": ("stream", lambda link: stamped(link.left, frames.DATA, 1)),
    "data on a stream that takes none": (
        "window",
        lambda link: stamped(link.left, frames.REQUEST, 1) + stamped(link.left, frames.DATA, 1),
    ),
    "a reply to nothing": ("stream", lambda link: stamped(link.left, frames.REPLY, 2)),
    "no JSON": ("head", lambda link: stamped(link.left, frames.REQUEST, 1, b"{")),
    "no object": ("head", lambda link: stamped(link.left, frames.REQUEST, 1, b"[1]")),
    "deep JSON": ("head", lambda link: stamped(link.left, frames.REQUEST, 1, b"[" * 100_000)),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_allowed_is_refused(case: str) -> None:
    reason, make = BAD[case]
    link = Link.made()
    assert refused(link.right, make(link)) == reason


def test_more_than_the_window_is_refused() -> None:
    link = Link.made(window=1000)
    stream, data = link.ask({"call": "put"}, flags=frames.MORE)
    list(link.right.feed(data))
    for _ in range(2):
        assert link.left.room(stream) >= 500
        list(link.right.feed(packed(link.left, Frame(frames.DATA, stream, {}, b"x" * 500))))
    assert link.left.room(stream) == 0
    with pytest.raises(ValueError, match="no room"):
        link.left.pack(Frame(frames.DATA, stream, {}, b"x"))
    assert refused(link.right, stamped(link.left, frames.DATA, stream, b"x", head=0, body=1)) == "window"


def test_an_acknowledgement_makes_room() -> None:
    link = Link.made(window=1000)
    stream, data = link.ask({"call": "put"}, flags=frames.MORE)
    list(link.right.feed(data))
    for _ in range(5):
        list(link.right.feed(packed(link.left, Frame(frames.DATA, stream, {}, b"x" * 400))))
        list(link.right.feed(packed(link.left, Frame(frames.DATA, stream, {}, b"x" * 400))))
        list(link.left.feed(link.right.ack(stream, 2)))
        assert link.left.room(stream) >= 1000
    with pytest.raises(ValueError, match="acknowledge"):
        link.right.ack(stream)


def test_too_much_acknowledged_is_refused() -> None:
    link = Link.made()
    stream, data = link.ask({"call": "put"}, flags=frames.MORE)
    list(link.right.feed(data))
    assert refused(link.left, stamped(link.right, frames.ACK, stream, json.dumps({"count": 1}).encode())) == "window"


def test_data_that_crossed_an_error_is_dropped() -> None:
    link = Link.made()
    stream, data = link.ask({"call": "put"}, flags=frames.MORE)
    list(link.right.feed(data))
    late = packed(link.left, Frame(frames.DATA, stream, {}, b"late"))
    error = packed(link.right, Frame(frames.ERROR, stream, {"code": "target-full"}))
    assert list(link.right.feed(late)) == []
    assert [frame.type for frame in link.left.feed(error)] == [frames.ERROR]


def test_a_peer_of_another_version_is_named() -> None:
    theirs = bytearray(Connection(dialled=True).hello())
    theirs[4] = 2
    with pytest.raises(ProtocolError) as problem:
        list(Connection(dialled=False).feed(bytes(theirs)))
    assert (problem.value.reason, problem.value.detail) == ("version", "2")


def test_a_hello_of_endless_length_is_refused() -> None:
    head = frames._HEADER.pack(frames.MAGIC, frames.VERSION, frames.HELLO, 0, 0, 0, 1 << 20, 0, 0, bytes(32))
    assert refused(Connection(dialled=False), head + frames._mac(b"", head)) == "length"


# -- the file itself ---------------------------------------------------------------------------------------------------


def test_the_header_is_as_documented() -> None:
    assert frames.HEADER_SIZE == 80
    data = Connection(dialled=True).hello()
    assert data[:6] == b"ASRW" + bytes([frames.VERSION, frames.HELLO])
    flags, stream, sequence, head, body, plain_size = struct.unpack(">HIQIII", data[6:32])
    assert (flags, stream, sequence, head, body, plain_size) == (0, 0, 0, len(data) - 80, 0, 0)


def _pythons() -> Iterator[str]:
    """This Python, and the oldest one that an agent may have, if installed: as tox finds it, or in pyenv's
    directory."""
    yield sys.executable
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(root.glob("versions/3.9.*/bin/python3.9"))
    if found or shutil.which("python3.9"):
        yield str(found[0]) if found else "python3.9"


@pytest.mark.parametrize("python", list(_pythons()), ids=lambda path: Path(path).name)
def test_it_needs_the_standard_library_only(python: str) -> None:
    """Used as a single file, without access to site-packages."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(frames.__file__).parent)!r}); import frames\n"
        "one, two = frames.Connection(dialled=True), frames.Connection(dialled=False)\n"
        "first, second = one.hello(), two.hello()\n"
        "list(two.feed(first)), list(one.feed(second))\n"
        "request = one.pack(frames.Frame(frames.REQUEST, one.open_stream(), {'call': 'status'}))\n"
        "assert [frame.head for frame in two.feed(b''.join(request))] == [{'call': 'status'}]\n"
    )
    subprocess.run([python, "-I", "-S", "-c", code], check=True, timeout=60)
