"""A connection of the wire protocol over TLS: requests and replies, both ways, with time limits everywhere.

Either side may have connected. One thread receives; a few others serve the peer's requests; any thread may call.
"""

from __future__ import annotations

import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Union

from asrcore.wire.frames import (
    CANCEL,
    ERROR,
    GOODBYE,
    HEADER_SIZE,
    HELLO,
    KEEPALIVE,
    REPLY,
    REQUEST,
    Connection,
    Frame,
    Header,
    ProtocolError,
)

__all__ = ["CallFailed", "Channel", "ChannelClosed"]

Bytes = Union[bytes, bytearray, memoryview]
Answer = tuple[Mapping[str, Any], Bytes]
Serve = Callable[[str, Mapping[str, Any]], Answer]

KEEPALIVE_SECONDS = 10.0
SILENCE_SECONDS = 35.0
"""A peer that sends nothing for this long counts as lost."""
SEND_SECONDS = 30.0
HELLO_SECONDS = 20.0
_CHUNK = 256 << 10


class ChannelClosed(Exception):
    """The connection has ended; the message says why."""


class CallFailed(Exception):
    """The peer refused a call with an error of the catalogue."""

    def __init__(self, code: str, attributes: Mapping[str, Any]) -> None:
        super().__init__(f"{code}: {dict(attributes)}")
        self.code = code
        self.attributes = dict(attributes)


class _Waiting:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.frame: Frame | None = None


class Channel:
    """Takes a connected socket after the TLS handshake. `serve(call, arguments)` answers the peer's requests: a reply,
    or an exception, of which only CallFailed is sent as it is; None serves nothing."""

    def __init__(
        self,
        carrier: ssl.SSLSocket | socket.socket,
        *,
        dialled: bool,
        me: Mapping[str, Any],
        serve: Serve | None = None,
        workers: int = 2,
    ) -> None:
        self._socket = carrier
        carrier.setblocking(False)
        self._link = Connection(dialled=dialled, me=me)
        self._serve = serve
        # One lock for the TLS state, which may not be used by two threads at once, and one for the order of frames.
        self._tls = threading.Lock()
        self._order = threading.Lock()
        self._asked: dict[int, _Waiting] = {}
        self._requests: queue.Queue[Frame | None] = queue.Queue(64)
        self._ended = threading.Event()
        self._greeted = threading.Event()
        self.reason = ""
        self._buffer = bytearray(_CHUNK)
        try:
            self._send([self._link.hello()])
        except BaseException:
            carrier.close()  # no other place closes it: there is no thread yet
            raise
        self._threads: list[threading.Thread] = [threading.Thread(target=self._receive, daemon=True)]
        self._threads += [threading.Thread(target=self._work, daemon=True) for _ in range(workers if serve else 0)]
        for thread in self._threads:
            thread.start()
        if not self._greeted.wait(HELLO_SECONDS) or self._link.peer is None:
            self.end("the peer did not say hello")
            raise ChannelClosed(self.reason)

    @property
    def peer(self) -> Mapping[str, Any]:
        """What the other side reports about itself."""
        assert self._link.peer is not None
        return self._link.peer.about

    @property
    def ended(self) -> bool:
        """Whether no more calls are possible."""
        return self._ended.is_set()

    def wait_ended(self, seconds: float | None = None) -> bool:
        """Wait for the end; returns whether it has come."""
        return self._ended.wait(seconds)

    def call(self, name: str, arguments: Mapping[str, Any], *, timeout: float) -> tuple[Mapping[str, Any], Bytes]:
        """Call and wait. Raises CallFailed, ChannelClosed, and TimeoutError after the given seconds."""
        waiting = _Waiting()
        with self._order:
            if self._ended.is_set():
                raise ChannelClosed(self.reason)
            stream = self._link.open_stream()
            self._asked[stream] = waiting
            self._write(Frame(REQUEST, stream, {"call": name, **arguments}))
        if not waiting.done.wait(timeout):
            with self._order, suppress(ValueError, ChannelClosed):
                self._asked.pop(stream, None)
                if self._link.asked(stream):
                    self._write(Frame(CANCEL, stream))
            raise TimeoutError(f"{name}: no answer within {timeout:g} s")
        frame = waiting.frame
        if frame is None:
            raise ChannelClosed(self.reason)
        if frame.type == ERROR:
            raise CallFailed(str(frame.head.get("code")), frame.head.get("attributes") or {})
        return frame.head, frame.body

    def close(self) -> None:
        """Say goodbye; may be called twice."""
        if not self._ended.is_set():
            with suppress(Exception), self._order:
                self._send([self._link.goodbye()])
        self.end("closed")

    def end(self, reason: str) -> None:
        """End at once; waiting calls get the reason."""
        if self._ended.is_set():
            return
        self.reason = reason
        self._ended.set()
        self._greeted.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with suppress(queue.Full):
            for _ in self._threads:
                self._requests.put_nowait(None)
        for waiting in list(self._asked.values()):
            waiting.done.set()

    # -- sending

    def _write(self, frame: Frame) -> None:
        """With the lock of the order held."""
        try:
            first, body = self._link.pack(frame)
        except ValueError as problem:  # the peer has said goodbye, or no longer waits for this answer
            raise ChannelClosed(str(problem)) from problem
        try:
            self._send([first, body] if len(body) else [first])
        except OSError as problem:
            self.end(f"sending failed: {problem}")
            raise ChannelClosed(self.reason) from problem

    def _send(self, parts: list[Bytes]) -> None:
        for part in parts:
            view = memoryview(part)
            end = time.monotonic() + SEND_SECONDS
            while view:
                sent = self._send_some(view[:_CHUNK])
                if sent:
                    view = view[sent:]
                    end = time.monotonic() + SEND_SECONDS
                elif time.monotonic() > end:
                    raise OSError(110, f"the peer accepted no data for {SEND_SECONDS:g} s")
                else:
                    self._poll(read=False, seconds=1.0)

    def _send_some(self, piece: memoryview) -> int:
        try:
            with self._tls:
                return self._socket.send(piece)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return 0

    def _poll(self, *, read: bool, seconds: float) -> None:
        poll = select.poll()  # unlike select(), for descriptors above 1023, too
        try:
            # A TLS connection may want to write in order to read, but not in version 1.3 once it is agreed.
            poll.register(self._socket, select.POLLIN if read else select.POLLOUT)
        except ValueError:
            raise OSError(9, "closed") from None
        poll.poll(seconds * 1000)

    # -- receiving

    def _receive(self) -> None:
        try:
            self._receive_frames()
        except ProtocolError as problem:
            with suppress(Exception), self._order:
                self._send([self._link.goodbye(problem.reason, problem.detail)])
            self.end(f"protocol: {problem}")
        except (OSError, ChannelClosed) as problem:
            self.end(str(problem) or type(problem).__name__)
        except Exception as problem:
            self.end(f"defect: {problem!r}")
            raise
        finally:
            with suppress(OSError):
                self._socket.close()

    def _receive_frames(self) -> None:
        reported = heard = time.monotonic()
        waiting: Header | None = None
        data = bytearray()
        size = 0
        while not self._ended.is_set():
            got = self._read()
            now = time.monotonic()
            if got is None:
                if now - heard > SILENCE_SECONDS:
                    raise OSError(110, f"nothing was received from the peer for {SILENCE_SECONDS:g} s")
                if now - reported > KEEPALIVE_SECONDS and self._link.peer is not None:
                    reported = now
                    self._keep_alive()
                continue
            if not got:
                self._link.eof()
                raise ChannelClosed("the peer has ended the connection")
            heard = now
            data += got
            while True:
                size = waiting.payload if waiting else HEADER_SIZE
                if len(data) < size:
                    break
                piece = bytes(memoryview(data)[:size])
                del data[:size]
                if waiting is None:
                    waiting = self._link.header(piece)
                    continue
                frame = self._link.payload(waiting, piece)
                waiting = None
                if frame is not None:
                    self._take(frame)

    def _keep_alive(self) -> None:
        if self._order.acquire(blocking=False):  # another thread is sending: that serves the same purpose
            try:
                self._write(Frame(KEEPALIVE))
            finally:
                self._order.release()

    def _read(self) -> memoryview | None:
        try:
            with self._tls:
                return memoryview(self._buffer)[: self._socket.recv_into(self._buffer)]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            self._poll(read=True, seconds=1.0)
            return None

    def _take(self, frame: Frame) -> None:
        if frame.type == HELLO:
            self._greeted.set()
        elif frame.type in (REPLY, ERROR):
            waiting = self._asked.pop(frame.stream, None)
            if waiting is not None:
                waiting.frame = frame
                waiting.done.set()
        elif frame.type == REQUEST:
            try:
                self._requests.put(frame, timeout=SEND_SECONDS)
            except queue.Full:
                raise ProtocolError("window", "more requests than can be served") from None
        elif frame.type == GOODBYE:
            why = [frame.head.get(name) for name in ("reason", "detail", "happened")]
            raise ChannelClosed(": ".join(["the peer said goodbye", *(str(text) for text in why if text)]))

    # -- serving

    def _work(self) -> None:
        while not self._ended.is_set():
            frame = self._requests.get()
            if frame is None:
                return
            arguments = dict(frame.head)
            name = str(arguments.pop("call", ""))
            answer = self._answer(frame.stream, name, arguments)
            with suppress(ChannelClosed), self._order:
                self._write(answer)

    def _answer(self, stream: int, name: str, arguments: dict[str, Any]) -> Frame:
        assert self._serve is not None
        try:
            head, body = self._serve(name, arguments)
        except CallFailed as refused:
            return Frame(ERROR, stream, {"code": refused.code, "attributes": refused.attributes})
        except Exception as problem:  # noqa: BLE001 - a defect there must not end the connection
            detail = f"{type(problem).__name__}: {problem}"
            attributes = {"operation": name, "site": "", "detail": detail}
            return Frame(ERROR, stream, {"code": "driver-failed", "attributes": attributes})
        return Frame(REPLY, stream, head, body)
