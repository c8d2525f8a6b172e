"""One connection in use: requests of both sides in flight at once, data under a window, keep-alives.

A channel has a thread that receives. It gives replies to the callers that wait for them, requests to a few workers, and
the data of a stream directly to its sink: so a slow disk slows its sender down and nothing is queued here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from blake3 import blake3

from asrcore.errors import AsrError, Cancelled, FrameRefused
from asrcore.model.watch import Stopped, Watch
from asrcore.wire import frames
from asrcore.wire.answer import Answer, Sink
from asrcore.wire.carrier import Carrier, ConnectionLost
from asrcore.wire.failures import as_error, error_head, goodbye_error, rebuilt
from asrcore.wire.frames import Bytes, Connection, Frame, ProtocolError
from asrcore.wire.keeper import Keeper
from asrcore.wire.pace import FRAME, Pace
from asrcore.wire.packing import COMPRESSION, Packer, unpacked
from asrcore.wire.tally import Tally
from asrcore.wire.tls import Component, Role

__all__ = ["Answer", "Channel", "DataStream", "Handler", "Sink"]

_log = Tally(logging.getLogger(__name__))  # what others cause is logged once a minute

WORKERS = 8
"""Requests of one connection that are worked on at a time."""
QUEUED = 32
"""Requests of one connection that may be open, waiting ones included; a peer that sends more has to wait."""
_LOOK = 0.2  # seconds until a waiting caller notices that its work was cancelled
_CANCEL_LIMIT = 30.0  # seconds that a cancelled request may take to end at the other side
_LAST_WORD = 2.0  # seconds for the receiver to read why the other side closed a connection that accepts no more data


class Handler(Protocol):
    """Serves the requests of the other side. Expected failures raise AsrError."""

    def call(self, channel: Channel, call: str, head: Mapping[str, Any], body: Bytes, watch: Watch) -> Answer:
        """One request; on any of several threads."""

    def stream(self, channel: Channel, call: str, head: Mapping[str, Any]) -> Sink:
        """A request that DATA follows."""

    def lost(self, channel: Channel) -> None:
        """The channel has ended; called once."""


class Channel:
    """One connection. Thread-safe. It has ended for good when `error` is set."""

    def __init__(
        self,
        carrier: Carrier,
        *,
        dialled: bool,
        about: Mapping[str, Any] | None = None,
        handler: Handler | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes the carrier over and exchanges the hellos. `ended` is called once its socket is closed, unless this
        raises. Raises as `ask`."""
        self.peer = carrier.peer
        self.error: AsrError | None = None
        self._carrier = carrier
        self._handler = handler
        self._after = ended
        self._wire = Connection(
            dialled=dialled,
            me={**(about or {}), "silence": carrier.limits.silence},
            hashes={"blake3": blake3},
            compression=() if carrier.local else COMPRESSION,
            entropy=_entropy,
        )
        self._sending = threading.Lock()  # a frame is sent whole, in the order of the sequence numbers
        self._changed = threading.Condition()  # of the protocol's state
        self._waiting: dict[int, queue.SimpleQueue[Frame | AsrError]] = {}
        self._watches: dict[int, Watch] = {}
        self._sinks: dict[int, Sink] = {}
        self._paces: dict[int, Pace] = {}
        self._workers = ThreadPoolExecutor(WORKERS, "served") if handler else None
        self._queued = threading.BoundedSemaphore(QUEUED)
        self._sent_at = self._worked_at = time.monotonic()
        self._buffer = bytearray(64 * 1024)
        self._receiver = threading.Thread(target=self._receive, name=f"wire {self.peer}", daemon=True)
        try:
            self._carrier.send(self._wire.hello())
            self._next_frame()
        except BaseException as problem:
            self._ended(problem)
            carrier.close()
            self._buffer = bytearray()
            if isinstance(problem, Exception):
                raise as_error(problem, self.peer) from problem
            raise
        assert self._wire.peer is not None
        self.about: Mapping[str, Any] = self._wire.peer.about
        # The limits of both sides count: each side has said how long it waits for a keep-alive.
        self._keepalive = min(carrier.limits.silence, _seconds(self.about.get("silence"), carrier.limits.silence)) / 3
        self.packer = Packer(enabled="zstd" in self._wire.peer.compression)
        Keeper.take(self)

    def start(self) -> None:
        """Begin to receive."""
        self._receiver.start()

    @functools.cached_property
    def component(self) -> Component:
        """Who the other side is. Raises CertificateRole if its certificate names no component."""
        return self._carrier.check(set(Role))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the other side's certificate, in hex; empty on a Unix socket."""
        return self._carrier.fingerprint

    def idle_since(self) -> float | None:
        """When it last had a request, monotonic; None while one is at work, minus infinity when it has ended."""
        if self.error is not None:
            return float("-inf")
        return None if self._watches or self._sinks or self._waiting else self._worked_at

    # -- asking ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        call: str,
        head: Mapping[str, Any] | None = None,
        body: Bytes = b"",
        watch: Watch | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Call the other side. Raises the error that it raised, else SiteUnreachable, FrameRefused, PeerFailed, what
        `watch` raises, which shows the progress of the other side, and TimeoutError when no reply has come `timeout`
        seconds after the request was sent. If it is the channel that has failed, `error` is the error raised."""
        return self.begin(call, head, body, watch, timeout)()

    def begin(
        self,
        call: str,
        head: Mapping[str, Any] | None = None,
        body: Bytes = b"",
        watch: Watch | None = None,
        timeout: float | None = None,
    ) -> Callable[[], Answer]:
        """Send a request; what is returned waits for its reply, as `ask` does. So several can be in flight."""
        replies: queue.SimpleQueue[Frame | AsrError] = queue.SimpleQueue()
        packed, flags, plain = self.packer.pack(body)
        full_head = {"call": call, **(head or {}), **({"watch": True} if watch else {})}
        stream = self._open(full_head, packed, flags, plain, replies)
        limit = None if timeout is None else time.monotonic() + timeout
        return lambda: self._answer(self._reply(stream, replies, watch, limit), call)

    def _open(
        self, head: Mapping[str, Any], body: Bytes, flags: int, plain: int, replies: queue.SimpleQueue[Frame | AsrError]
    ) -> int:
        with self._sending:
            with self._changed:
                self._check()
                stream = self._wire.open_stream()
                self._waiting[stream] = replies
                packed = self._wire.pack(Frame(frames.REQUEST, stream, head, body, flags, plain))
            self._send(*packed)
        return stream

    def _reply(
        self,
        stream: int,
        replies: queue.SimpleQueue[Frame | AsrError],
        watch: Watch | None,
        limit: float | None,
    ) -> Frame:
        ends: float | None = None
        stopped: BaseException | None = None
        while True:
            left = None if limit is None else max(0.0, limit - time.monotonic())
            try:
                item = replies.get(timeout=left if watch is None else _LOOK if left is None else min(_LOOK, left))
            except queue.Empty:
                item = None
            if isinstance(item, AsrError):
                raise item
            if item is not None and item.type != frames.PROGRESS:
                if stopped is not None and item.type == frames.ERROR:
                    raise stopped
                return item
            if item is None and left == 0:
                self._say(Frame(frames.CANCEL, stream, {"stop": True}))
                raise TimeoutError("no reply within the time limit")
            if watch is not None and stopped is None:
                try:
                    _progress(watch, item)
                except (Cancelled, Stopped) as problem:
                    stopped = problem
                    ends = time.monotonic() + _CANCEL_LIMIT
                    self._say(Frame(frames.CANCEL, stream, {"stop": isinstance(problem, Stopped)}))
                    if isinstance(problem, Stopped):
                        raise
            if stopped is not None and ends is not None and time.monotonic() > ends:
                raise stopped

    def _answer(self, frame: Frame, call: str) -> Answer:
        if frame.type == frames.ERROR:
            raise rebuilt(frame.head, call, self.peer)
        try:
            return Answer(frame.head, unpacked(frame))
        except ProtocolError as problem:
            raise self._refused(f"data of {call} is damaged: {problem}") from problem

    def stream(self, call: str, head: Mapping[str, Any]) -> DataStream:
        """Begin to send data. Raises as `ask`, but errors of the other side come later."""
        replies: queue.SimpleQueue[Frame | AsrError] = queue.SimpleQueue()
        stream = self._open({"call": call, **head}, b"", frames.MORE, 0, replies)
        assert self._wire.peer is not None
        self._paces[stream] = Pace(self._wire.peer.window)
        return DataStream(self, call, stream, replies)

    # -- for streams

    def _frame_size(self, stream: int) -> int:
        """The best size of a frame of data in bytes: a frame that was cut off is sent again as a whole."""
        with self._changed:
            pace = self._paces.get(stream)
            return pace.frame if pace is not None else FRAME

    def _put(self, stream: int, head: Mapping[str, Any], data: Bytes, more: int = 0) -> int:
        """Send one frame of data, as soon as there is room; its number from 1 on, 0 if the stream has ended."""
        body, flags, plain = self.packer.pack(data)
        begun = time.monotonic()
        prepared = self._wire.prepare(Frame(frames.DATA, stream, head, body, flags | more, plain))
        while True:
            with self._sending:
                with self._changed:
                    self._check()
                    if not self._wire.asked(stream):
                        return 0
                    room = self._room(stream, len(body))
                    header = self._wire.stamp(prepared) if room else b""
                    number = self._wire.counts(stream)[0]
                    if room:
                        self._paces[stream].sent(len(body))
                if room:
                    self._send(header + prepared.head, body)
                    self.packer.sent(len(body), time.monotonic() - begun)
                    return number
            with self._changed:
                self._changed.wait_for(
                    lambda: self.error or not self._wire.asked(stream) or self._room(stream, len(body)),
                )

    def _room(self, stream: int, size: int) -> bool:
        return self._wire.room(stream) >= max(size, 1) and self._paces[stream].allows(size)

    def _say(self, frame: Frame) -> None:
        """Send a frame about a stream unless that has ended. Raises ValueError for one that is too large."""
        prepared = self._wire.prepare(frame)
        with contextlib.suppress(AsrError), self._sending:
            with self._changed:
                self._check()
                try:
                    header = self._wire.stamp(prepared)
                except ValueError:
                    return  # answered meanwhile
            self._send(header + prepared.head, frame.body)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _send(self, *pieces: Bytes) -> None:
        try:
            self._carrier.send(*pieces)
        except BaseException as problem:
            receiver = self._receiver
            if isinstance(problem, ConnectionLost) and receiver.is_alive() and receiver != threading.current_thread():
                with self._changed:  # a goodbye may have come, which says why: the receiver reads it, or the end
                    self._changed.wait_for(lambda: self.error, timeout=_LAST_WORD)
            self._ended(problem, sending=True)
            if isinstance(problem, Exception):
                assert self.error is not None
                raise self.error from problem
            raise
        self._sent_at = time.monotonic()

    # -- receiving -------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            while True:
                frame = self._next_frame()
                if frame is None:
                    continue
                if frame.type == frames.GOODBYE:
                    raise goodbye_error(frame.head, self.peer)
                self._take(frame)
        except Exception as problem:  # noqa: BLE001 - whatever it is, it ends this connection and nothing else
            self._ended(problem)
            problem.__traceback__ = None  # it may be `error`, and its frames hold this channel and its buffer
        finally:
            self._finish()

    def _next_frame(self) -> Frame | None:
        view = memoryview(self._buffer)
        self._carrier.fill(view[: frames.HEADER_SIZE])
        with self._changed:
            header = self._wire.header(view[: frames.HEADER_SIZE])
        if header.payload > len(view):
            # A reply's body is handed to another thread, so it needs a separate buffer anyway.
            self._buffer = bytearray(header.payload)
            view = memoryview(self._buffer)
        own = header.type in (frames.REPLY, frames.REQUEST) and header.body
        target = memoryview(bytearray(header.payload)) if own else view[: header.payload]
        self._carrier.fill(target)
        with self._changed:
            frame = self._wire.payload(header, target)
            if frame is not None and frame.type == frames.ACK:
                self._paces[frame.stream].acknowledged(frame.head["count"])
                self._changed.notify_all()
            elif header.type in (frames.REPLY, frames.ERROR):
                self._paces.pop(header.stream, None)
                self._changed.notify_all()
        return frame

    def _take(self, frame: Frame) -> None:
        self._worked_at = time.monotonic()
        if frame.type in (frames.REPLY, frames.ERROR):
            waiting = self._waiting.pop(frame.stream, None)
            if waiting is not None:
                waiting.put(frame)
        elif frame.type == frames.PROGRESS:
            self._waiting[frame.stream].put(frame)
        elif frame.type == frames.DATA:
            self._take_data(frame)
        elif frame.type == frames.CANCEL:
            watch = self._watches.get(frame.stream)
            if watch is not None:
                (watch.stop if frame.head.get("stop") else watch.cancel)()
        elif frame.type == frames.REQUEST:
            self._take_request(frame)

    def _take_request(self, frame: Frame) -> None:
        call = str(frame.head.get("call", ""))
        if self._handler is None or self._workers is None:
            self._fail(frame.stream, call, FrameRefused(peer=self.peer, detail="nothing is served on this side"))
        elif frame.flags & frames.MORE:
            try:
                self._sinks[frame.stream] = self._handler.stream(self, call, frame.head)
            except Exception as problem:  # noqa: BLE001 - reported to the other side
                self._fail(frame.stream, call, problem)
        else:
            watch = Watch(self._reporter(frame.stream) if frame.head.get("watch") else None)
            self._watches[frame.stream] = watch
            self._queued.acquire()
            try:
                self._workers.submit(self._serve, frame, call, watch)
            except RuntimeError:  # it ends
                self._queued.release()

    def _serve(self, frame: Frame, call: str, watch: Watch) -> None:
        assert self._handler is not None
        try:
            answer = self._handler.call(self, call, frame.head, unpacked(frame), watch)
            body, flags, plain = self.packer.pack(answer.body)
            begun = time.monotonic()
            self._say(Frame(frames.REPLY, frame.stream, answer.head, body, flags, plain))
            if len(body):
                self.packer.sent(len(body), time.monotonic() - begun)
        except (Exception, Stopped) as problem:  # noqa: BLE001 - reported to the other side
            self._fail(frame.stream, call, problem)
        finally:
            self._worked_at = time.monotonic()
            self._watches.pop(frame.stream, None)
            self._queued.release()

    def _take_data(self, frame: Frame) -> None:
        sink = self._sinks[frame.stream]
        try:
            if frame.head or len(frame.body):
                sink.data(frame.head, unpacked(frame))
            ack = Frame(frames.ACK, frame.stream, {"count": 1})
            if frame.flags & frames.END:
                ack = Frame(frames.REPLY, frame.stream, sink.end().head)
                del self._sinks[frame.stream]
        except Exception as problem:  # noqa: BLE001 - reported to the other side
            del self._sinks[frame.stream]
            self._fail(frame.stream, "data", problem)
            return
        self._say(ack)

    def _reporter(self, stream: int) -> Callable[[str, int, int], None]:
        last = 0.0

        def report(work: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > _LOOK or done == total or not done:
                last = now
                self._say(Frame(frames.PROGRESS, stream, {"work": work, "done": done, "total": total}))

        return report

    def _fail(self, stream: int, call: str, problem: BaseException) -> None:
        self._say(Frame(frames.ERROR, stream, error_head(call, problem)))

    # -- ending ----------------------------------------------------------------------------------------------------

    def _refused(self, detail: str) -> FrameRefused:
        problem = FrameRefused(peer=self.peer, detail=detail)
        self._ended(problem)
        return problem

    def _ended(self, problem: BaseException, *, sending: bool = False) -> None:
        """Set `error` and wake all waiting threads; if the other side broke the protocol, send it the reason."""
        with self._changed:
            if self.error is not None:
                return
            self.error = as_error(problem, self.peer)
            goodbye = b""
            if isinstance(problem, ProtocolError):
                goodbye = self._wire.goodbye(problem.reason, problem.detail)
            elif isinstance(problem, _Closing):
                goodbye = self._wire.goodbye(problem.reason, str(problem))
            self._changed.notify_all()
        if sending and isinstance(problem, ConnectionLost):
            return  # what arrived before that is still read: it need not be sent again
        if goodbye and self._carrier.can_send and self._sending.acquire(timeout=1.0):
            try:
                self._carrier.send(goodbye)
            except (ConnectionLost, AsrError):
                pass
            finally:
                self._sending.release()
        if not isinstance(problem, _Closing | ConnectionLost):
            _log.info("the connection with %s ended: %s", self.peer, self.error)
        if isinstance(problem, ProtocolError):
            self._carrier.hang_up()
        else:
            self._carrier.abort()

    def _finish(self) -> None:
        """Nothing is received any more: end all waits and all requests that run here."""
        assert self.error is not None
        for stream in list(self._waiting):
            waiting = self._waiting.pop(stream, None)
            if waiting is not None:
                waiting.put(self.error)
        for watch in list(self._watches.values()):
            watch.stop()
        if self._workers is not None:
            self._workers.shutdown(wait=True, cancel_futures=True)
        if self._handler is not None:
            try:
                self._handler.lost(self)
            except Exception:  # noqa: BLE001 - the connection is over all the same
                _log.exception("cleaning up after %s", self.peer)
        self._carrier.close()
        self._buffer = bytearray()
        self._after()

    def close(self, reason: str = "", detail: str = "the connection was closed") -> None:
        """End it, with a goodbye; waiting callers get SiteUnreachable. May be called twice."""
        self._ended(_Closing(reason, detail))
        if threading.current_thread() is not self._receiver:
            if self._receiver.ident is not None:
                self._receiver.join(self._carrier.limits.silence)
            else:
                self._finish()

    def drain(self, seconds: float) -> None:
        """If the other side has hung up, wait, at most that long, until everything that it sent before is processed."""
        if self._carrier.hung_up:
            self._receiver.join(seconds)

    def refuse(self, problem: AsrError) -> None:
        """End it before it has started, and send the other side the reason."""
        with self._changed:
            self.error = problem
            goodbye = self._wire.goodbye(error=error_head("connecting", problem))
        with contextlib.suppress(ConnectionLost, AsrError):
            self._carrier.send(goodbye)
        self._carrier.hang_up()
        self._finish()

    def keep_alive(self) -> None:
        """Send a keep-alive if nothing else was sent for a while."""
        if time.monotonic() - self._sent_at < self._keepalive or not self._carrier.can_send:
            return
        if self._sending.acquire(blocking=False):
            try:
                with self._changed:
                    if self.error is not None:
                        return
                    packed = self._wire.pack(Frame(frames.KEEPALIVE))
                with contextlib.suppress(AsrError):
                    self._send(*packed)
            finally:
                self._sending.release()


class DataStream:
    """Data on its way to the other side. Thread-safe; what one thread puts arrives in that order."""

    def __init__(self, channel: Channel, call: str, stream: int, replies: queue.SimpleQueue[Frame | AsrError]) -> None:
        """Use `Channel.stream` instead."""
        self.channel = channel
        self._call = call
        self._stream = stream
        self._replies = replies
        self._error: AsrError | None = None

    def put(self, head: Mapping[str, Any], data: Bytes = b"") -> int:
        """Send; waits while too much is under way. `data` may be used again. The number of the frame, from 1 on.

        Raises what the other side raised.
        """
        number = self.channel._put(self._stream, head, data)
        if not number:
            raise self._why()
        return number

    def end(self) -> None:
        """Nothing more will be put."""
        self.channel._put(self._stream, {}, b"", frames.END)

    @property
    def frame_size(self) -> int:
        """The best number of bytes for one `put` now."""
        return self.channel._frame_size(self._stream)

    @property
    def acknowledged(self) -> int:
        """How many frames the other side is done with."""
        with self.channel._changed:
            return self.channel._wire.counts(self._stream)[1]

    def drain(self, number: int = 0) -> None:
        """Wait until the frame of that number, or all that was put before, is done. Raises what the other side
        raised."""
        channel = self.channel
        with channel._changed:
            wanted = number or channel._wire.counts(self._stream)[0]
            channel._changed.wait_for(lambda: self._over or channel._wire.counts(self._stream)[1] >= wanted)
            over = self._over
        if over:
            raise self._why()

    @property
    def _over(self) -> bool:
        return self.channel.error is not None or not self.channel._wire.asked(self._stream)

    def _why(self) -> AsrError:
        """The error that ended the stream."""
        if self._error is None:
            self.channel._check()
            item = self._replies.get()
            if isinstance(item, AsrError):
                self._error = item
            else:
                self._error = rebuilt(item.head, self._call, self.channel.peer)
        return self._error


class _Closing(Exception):
    """This side ends the connection on purpose."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _seconds(reported: object, otherwise: float) -> float:
    return float(max(1.0, reported)) if isinstance(reported, int | float) and reported <= otherwise else otherwise


def _entropy(count: int) -> bytes:
    import secrets  # noqa: PLC0415

    return secrets.token_bytes(count)


def _progress(watch: Watch, frame: Frame | None) -> None:
    """Copy the other side's progress to the caller's watch."""
    if frame is None:
        watch.check()
        return
    work, total, done = str(frame.head["work"]), int(frame.head["total"]), int(frame.head["done"])
    if (work, total) != (watch.work, watch.total) or done < watch.done:
        watch.start(work, total)
    watch.advance(done - watch.done)
