"""The wire protocol, without sockets, threads or clocks: bytes in, frames out, and the other way round.

This file needs nothing but the standard library of Python 3.9, so that an agent can carry it along. It is described
byte by byte in `docs/reference/wire-protocol.md`. Either side may send requests, whichever of them opened the
connection. How a carrier (a TLS connection) uses it, from its first byte on:

    link = Connection(dialled=True, me={"name": "web1"}, hashes={"blake3": blake3})   # hashes: none, or what there is
    carrier.write(link.hello())
    for frame in link.feed(carrier.read()):     # ProtocolError: write link.goodbye(...), close, change nothing
        ...                                     # the first is HELLO: link.peer is known and link may ask

    # asking
    stream = link.open_stream()
    carrier.write(*link.pack(Frame(REQUEST, stream, {"call": "status"})))
    # ... until a frame REPLY, or ERROR (`code` and `attributes` of a catalogued error), comes with that stream number

    # serving: a REQUEST has come
    carrier.write(*link.pack(Frame(REPLY, frame.stream, {"answer": 42}, b"bulk")))

A request with the flag MORE is followed by DATA frames on its stream, which the other side acknowledges with
`link.ack`; at most `link.room(stream)` bytes may be under way. A carrier that reads into its own buffers calls
`header` and `payload` instead of `feed`; one that sends from several threads calls `prepare` outside of its lock and
`stamp` within. Compression is the carrier's: a body with the flag ZSTD has `plain` bytes when unpacked.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Union

__all__ = [
    "ACK",
    "CANCEL",
    "DATA",
    "END",
    "ERROR",
    "FLAGS",
    "GOODBYE",
    "HEADER_SIZE",
    "HELLO",
    "KEEPALIVE",
    "MAX_BODY",
    "MAX_HEAD",
    "MORE",
    "PROGRESS",
    "REPLY",
    "REQUEST",
    "TYPES",
    "VERSION",
    "WINDOW",
    "ZSTD",
    "Connection",
    "Frame",
    "Header",
    "Peer",
    "Prepared",
    "ProtocolError",
]

MAGIC = b"ASRW"
VERSION = 1
"""A peer of another version is refused. What can be added without breaking a peer is a feature, named in the hello."""

_HEADER = struct.Struct(">4sBBHIQIII32s")  # magic version type flags stream sequence head body plain digest
MAC_SIZE = 16
_SECRET = 32
HEADER_SIZE = _HEADER.size + MAC_SIZE
MAX_HEAD = 4 << 20
"""Bytes; the largest head is a machine's description with its firmware's variables."""
MAX_BODY = 2 << 20
_MAX_HELLO = 64 << 10
WINDOW = 8 << 20
"""Bytes of DATA bodies that may be unacknowledged on a stream, by default."""
WINDOW_FRAMES = 64
"""And how many frames: those without a body cost the receiver something too."""

HELLO, REQUEST, REPLY, ERROR, DATA, ACK, PROGRESS, CANCEL, KEEPALIVE, GOODBYE = range(1, 11)
TYPES = {
    HELLO: "hello",
    REQUEST: "request",
    REPLY: "reply",
    ERROR: "error",
    DATA: "data",
    ACK: "ack",
    PROGRESS: "progress",
    CANCEL: "cancel",
    KEEPALIVE: "keepalive",
    GOODBYE: "goodbye",
}
_OF_THE_ASKING = (DATA, CANCEL)
_OF_THE_SERVING = (REPLY, ERROR, ACK, PROGRESS)
_WITHOUT_STREAM = (HELLO, KEEPALIVE, GOODBYE)

ZSTD, MORE, END = 1, 2, 4
FLAGS = {ZSTD: "zstd", MORE: "more", END: "end"}
_MAY_HAVE = {REQUEST: ZSTD | MORE, REPLY: ZSTD, DATA: ZSTD | END}

Bytes = Union[bytes, bytearray, memoryview]  # noqa: UP007 - Python 3.9 evaluates it
Hash = Callable[[], Any]  # like hashlib's: update(), digest()


class ProtocolError(Exception):
    """The peer broke the protocol, or data was changed in transit: the connection ends. `reason` is one of a few."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Frame:
    """`head` is structured, `body` is bulk. A received body is a view of the carrier's buffer where it gave one."""

    type: int
    stream: int = 0
    head: Mapping[str, Any] = field(default_factory=dict, repr=False)
    body: Bytes = field(default=b"", repr=False)
    flags: int = 0
    plain: int = 0
    """Bytes of the body when unpacked; only with ZSTD."""


@dataclass(frozen=True)
class Header:
    """The fixed part of a received frame whose payload (`head` and `body` bytes) is still to come."""

    type: int
    flags: int
    stream: int
    head: int
    body: int
    plain: int
    digest: bytes

    @property
    def payload(self) -> int:
        """Bytes to come."""
        return self.head + self.body


@dataclass(frozen=True)
class Prepared:
    """A frame that lacks only its place in the sequence."""

    frame: Frame
    head: bytes
    digest: bytes


@dataclass(frozen=True)
class Peer:
    """What the other side said of itself: `features` it knows, `compression` it unpacks, `about` the rest."""

    features: tuple[str, ...]
    compression: tuple[str, ...]
    window: int
    about: Mapping[str, Any]


class _Flow:
    """Frames of one stream that are not acknowledged yet."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sizes: deque[int] = deque()
        self.bytes = 0
        self.sent = 0

    @property
    def room(self) -> int:
        return 0 if len(self.sizes) >= WINDOW_FRAMES else max(0, self.limit - self.bytes)

    def add(self, size: int) -> bool:
        """False if the window does not allow it. One frame is always allowed, however small the window."""
        if self.sizes and (len(self.sizes) >= WINDOW_FRAMES or self.bytes + size > self.limit):
            return False
        self.sizes.append(size)
        self.bytes += size
        self.sent += 1
        return True

    def take(self, count: int) -> bool:
        if not 0 < count <= len(self.sizes):
            return False
        for _ in range(count):
            self.bytes -= self.sizes.popleft()
        return True


def _blake2b() -> Any:
    return hashlib.blake2b(digest_size=32)


class Connection:
    """One connection, from both hellos to a goodbye. Not thread-safe but for `prepare`."""

    def __init__(
        self,
        *,
        dialled: bool,
        me: Mapping[str, Any] | None = None,
        hashes: Mapping[str, Hash] | None = None,
        compression: tuple[str, ...] = (),
        features: tuple[str, ...] = (),
        window: int = WINDOW,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`me` is sent to the peer (JSON); `hashes`: names and makers of those beyond BLAKE2b, best first."""
        self.dialled = dialled
        self.window = window
        self.peer: Peer | None = None
        self.closed = False
        """The peer said goodbye, or something was refused: nothing more is taken, and all to be said is a goodbye."""
        self._said_goodbye = False
        self._makers: dict[str, Hash] = {**(hashes or {}), "blake2b": _blake2b}
        self._hash: Hash = _blake2b
        self._hello = _json(
            {
                "features": list(features),
                "hashes": list(self._makers),
                "compression": list(compression),
                "window": window,
                "secret": entropy(_SECRET).hex(),
                "about": dict(me or {}),
            }
        )
        self._out_key = self._in_key = b""
        self._out_sequence = self._in_sequence = 0
        self._next_stream = 1 if dialled else 2
        self._last_theirs = 0
        self._asked: dict[int, _Flow | None] = {}
        self._serving: dict[int, _Flow | None] = {}
        self._buffer = bytearray()
        self._waiting: Header | None = None

    # -- sending ---------------------------------------------------------------------------------------------------

    def hello(self) -> bytes:
        """The first bytes to send; not to be repeated."""
        prepared = Prepared(Frame(HELLO), self._hello, _digest(_blake2b, self._hello, b""))
        return self.stamp(prepared) + self._hello

    def open_stream(self) -> int:
        """A number for a new request of this side. Requests must be sent in the order of their numbers."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        return stream

    def prepare(self, frame: Frame) -> Prepared:
        """Serialise and hash; may run in any thread after the peer's hello."""
        head = _json(frame.head) if frame.head else b""
        if len(head) > MAX_HEAD or len(frame.body) > MAX_BODY:
            raise ValueError(f"a frame of {len(head)} + {len(frame.body)} bytes is too large")
        return Prepared(frame, head, _digest(self._hash, head, frame.body))

    def stamp(self, prepared: Prepared) -> bytes:
        """The header of the next frame; then its head and body are to be sent. Raises ValueError for what is not
        allowed now, such as DATA beyond the window."""
        frame = prepared.frame
        self._may_send(frame)
        fields = _HEADER.pack(
            MAGIC,
            VERSION,
            frame.type,
            frame.flags,
            frame.stream,
            self._out_sequence,
            len(prepared.head),
            len(frame.body),
            frame.plain,
            prepared.digest,
        )
        self._out_sequence += 1
        return fields + _mac(self._out_key, fields)

    def pack(self, frame: Frame) -> tuple[bytes, Bytes]:
        """What to send for a frame, in two pieces: header with head, and body."""
        prepared = self.prepare(frame)
        return self.stamp(prepared) + prepared.head, frame.body

    def ack(self, stream: int, count: int = 1) -> bytes:
        """Acknowledge that many more DATA frames of a stream; the bytes to send."""
        return self.pack(Frame(ACK, stream, {"count": count}))[0]

    def goodbye(self, reason: str = "", detail: str = "", error: Mapping[str, Any] | None = None) -> bytes:
        """The last bytes to send, with the reason if there is one, or an error as ERROR has it; b"" if nothing can be
        said any more."""
        if self._said_goodbye or not self._out_key:
            return b""
        head = {**(error or {}), **({"reason": reason, "detail": detail} if reason else {})}
        return self.pack(Frame(GOODBYE, 0, head))[0]

    def room(self, stream: int) -> int:
        """Bytes of DATA that may be sent now on a stream of this side. A single frame may always be under way."""
        flow = self._asked.get(stream)
        if flow is None:
            return 0
        return flow.room if flow.sizes else max(flow.room, MAX_BODY)

    def asked(self, stream: int) -> bool:
        """Whether a request of this side still waits for its reply."""
        return stream in self._asked

    def counts(self, stream: int) -> tuple[int, int]:
        """How many DATA frames were sent on an open stream of this side, and how many of them are acknowledged."""
        flow = self._asked.get(stream)
        return (flow.sent, flow.sent - len(flow.sizes)) if flow else (0, 0)

    def _may_send(self, frame: Frame) -> None:
        kind, stream = frame.type, frame.stream
        ended = self._said_goodbye or (self.closed and kind != GOODBYE)
        if ended or (kind == HELLO) != (self._out_sequence == 0):
            raise ValueError(f"{TYPES[kind]} may not be sent now")
        if kind not in (HELLO, GOODBYE, KEEPALIVE) and self.peer is None:
            raise ValueError("the peer's hello has not come")
        if kind == REQUEST:
            if stream in self._asked or stream >= self._next_stream or stream % 2 != (1 if self.dialled else 0):
                raise ValueError(f"stream {stream} was not opened")
            assert self.peer is not None
            self._asked[stream] = _Flow(self.peer.window) if frame.flags & MORE else None
        elif kind in _OF_THE_ASKING:
            if stream not in self._asked:
                raise ValueError(f"stream {stream} has ended")
            flow = self._asked[stream]
            if kind == DATA and (flow is None or not flow.add(len(frame.body))):
                raise ValueError(f"no room on stream {stream}")
        elif kind in _OF_THE_SERVING:
            self._may_answer(frame)
        elif kind == GOODBYE:
            self._said_goodbye = True

    def _may_answer(self, frame: Frame) -> None:
        if frame.stream not in self._serving:
            raise ValueError(f"stream {frame.stream} is not being served")
        if frame.type == ACK:
            flow = self._serving[frame.stream]
            if flow is None or not flow.take(frame.head["count"]):
                raise ValueError(f"nothing to acknowledge on stream {frame.stream}")
        elif frame.type in (REPLY, ERROR):
            del self._serving[frame.stream]

    # -- receiving -------------------------------------------------------------------------------------------------

    def feed(self, data: Bytes) -> Iterator[Frame]:
        """Frames that are complete with these bytes, however the stream of bytes is cut. Raises ProtocolError."""
        self._buffer += data
        while True:
            if self._waiting is None:
                if len(self._buffer) < HEADER_SIZE:
                    return
                self._waiting = self.header(self._buffer[:HEADER_SIZE])
                del self._buffer[:HEADER_SIZE]
            if len(self._buffer) < self._waiting.payload:
                return
            header, self._waiting = self._waiting, None
            payload = bytes(self._buffer[: header.payload])
            del self._buffer[: header.payload]
            frame = self.payload(header, payload)
            if frame is not None:
                yield frame

    def eof(self) -> None:
        """The carrier has ended. Raises ProtocolError unless the peer had said goodbye before."""
        if not self.closed:
            self._refuse("truncated", "the connection ended without a goodbye")

    def header(self, data: Bytes) -> Header:
        """Check HEADER_SIZE bytes: nothing of the frame is believed before. Raises ProtocolError."""
        if self.closed:
            self._refuse("closed", "bytes after the end")
        fields, mac = bytes(data[: _HEADER.size]), bytes(data[_HEADER.size : HEADER_SIZE])
        magic, version, kind, flags, stream, sequence, head, body, plain, digest = _HEADER.unpack(fields)
        if magic != MAGIC:
            self._refuse("magic", "these bytes are not of this protocol")
        if version != VERSION:
            self._refuse("version", str(version))
        if not hmac.compare_digest(mac, _mac(self._in_key, fields)):
            self._refuse("forged", "the header's authentication code is wrong")
        if sequence != self._in_sequence:
            self._refuse("sequence", f"frame {sequence} came, {self._in_sequence} is next")
        if kind not in TYPES or flags & ~_MAY_HAVE.get(kind, 0):
            self._refuse("type", f"type {kind} with flags {flags:#x}")
        if (kind == HELLO) != (sequence == 0):
            self._refuse("hello", f"a frame of type {TYPES[kind]} is number {sequence}")
        if head > (_MAX_HELLO if kind == HELLO else MAX_HEAD) or body > (0 if kind == HELLO else MAX_BODY):
            self._refuse("length", f"{head} + {body} bytes")
        if bool(flags & ZSTD) != bool(plain) or plain > MAX_BODY:
            self._refuse("length", f"{plain} bytes unpacked")
        if (kind in _WITHOUT_STREAM) != (stream == 0):
            self._refuse("stream", f"{TYPES[kind]} on stream {stream}")
        self._in_sequence += 1
        return Header(kind, flags, stream, head, body, plain, digest)

    def payload(self, header: Header, data: Bytes) -> Frame | None:
        """The frame of a header and its payload; None for a late frame of a stream that has ended. `data` may be a
        buffer that is used again: then the frame's body is to be used before. Raises ProtocolError."""
        view = memoryview(data)[: header.payload]
        maker = _blake2b if header.type == HELLO else self._hash
        if len(view) != header.payload or not hmac.compare_digest(_digest(maker, view, b""), header.digest):
            self._refuse("digest", "the payload is not what was sent")
        head = self._head(bytes(view[: header.head]))
        frame = Frame(header.type, header.stream, head, view[header.head :], header.flags, header.plain)
        if header.type == HELLO:
            self._greeted(frame, bytes(view))
        elif header.type == GOODBYE:
            self.closed = True
        elif header.type != KEEPALIVE and not self._takes(frame):
            return None
        return frame

    def _head(self, data: bytes) -> Mapping[str, Any]:
        if not data:
            return {}
        try:
            head = json.loads(data)
        except (ValueError, RecursionError):
            head = None
        if not isinstance(head, dict):
            self._refuse("head", "it is not a JSON object")
        return head

    def _greeted(self, frame: Frame, theirs: bytes) -> None:
        try:
            about = frame.head["about"]
            known = [str(name) for name in frame.head["hashes"]]
            window = int(frame.head["window"])
            features = tuple(map(str, frame.head["features"]))
            self.peer = Peer(features, tuple(map(str, frame.head["compression"])), window, about)
            secret = bytes.fromhex(frame.head["secret"])
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            self._refuse("hello", f"something is missing or wrong: {type(problem).__name__}: {problem}")
        if window <= 0 or len(secret) < _SECRET or not isinstance(about, dict):
            self._refuse("hello", "its window, secret or self-description makes no sense")
        # The dialler's order decides. Each side knows at least BLAKE2b.
        mine = list(self._makers)
        first, second = (mine, known) if self.dialled else (known, mine)
        common = next((name for name in first if name in second), None)
        if common is None:
            self._refuse("hello", f"no common hash: {', '.join(known)}")
        self._hash = self._makers[common]
        # The keys are made from both hellos, secrets included: whoever changes a hello in transit cannot make a valid
        # frame. There is one key for each direction, so that a frame sent back to its sender is refused.
        hellos = (self._hello, theirs) if self.dialled else (theirs, self._hello)
        both = b"".join(hashlib.blake2b(hello).digest() for hello in hellos)
        dialler, other = (hashlib.blake2b(both, digest_size=32, person=who).digest() for who in (b"dialler", b"other"))
        self._out_key, self._in_key = (dialler, other) if self.dialled else (other, dialler)

    def _takes(self, frame: Frame) -> bool:
        kind, stream = frame.type, frame.stream
        if kind == REQUEST:
            if stream <= self._last_theirs or stream % 2 != (0 if self.dialled else 1):
                self._refuse("stream", f"a request on stream {stream}")
            self._last_theirs = stream
            self._serving[stream] = _Flow(self.window) if frame.flags & MORE else None
        elif kind in _OF_THE_ASKING:
            if stream not in self._serving:
                if stream > self._last_theirs or stream % 2 != (0 if self.dialled else 1):
                    self._refuse("stream", f"{TYPES[kind]} on stream {stream}, which was never opened")
                return False  # sent before our reply arrived
            flow = self._serving[stream]
            if kind == DATA and (flow is None or not flow.add(len(frame.body))):
                self._refuse("window", f"more than is allowed on stream {stream}")
        else:
            if stream not in self._asked:
                self._refuse("stream", f"{TYPES[kind]} on stream {stream}, which waits for none")
            if kind == ACK:
                flow = self._asked[stream]
                count = frame.head.get("count")
                if flow is None or not isinstance(count, int) or not flow.take(count):
                    self._refuse("window", f"{count} frames acknowledged on stream {stream}")
            elif kind in (REPLY, ERROR):
                del self._asked[stream]
        return True

    def _refuse(self, reason: str, detail: str) -> NoReturn:
        self.closed = True
        raise ProtocolError(reason, detail)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _digest(maker: Hash, head: Bytes, body: Bytes) -> bytes:
    state = maker()
    state.update(head)
    if len(body):
        state.update(body)
    return bytes(state.digest())


def _mac(key: bytes, fields: bytes) -> bytes:
    return hashlib.blake2b(fields, key=key, digest_size=MAC_SIZE).digest()
