"""A site served to other components: the calls of the driver contract, and what stays open between them.

What a peer has opened (views, readers, cycles) belongs to its *session*, which may have several connections. When the
last of them is gone, cycles are flushed and closed, so that all that has arrived counts as done, readers are closed,
and views are kept for a while: a source that must be frozen again has more to send.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import attrs

from asrcore import driver
from asrcore.errors import AsrError, InvalidValue, SiteUnreachable, StaleEpoch, UnsupportedOperation, WrongCycle
from asrcore.model.extent import Extent, total
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.remote import calls
from asrcore.units import MiB
from asrcore.wire.channel import Answer, Channel, Sink
from asrcore.wire.frames import Bytes

__all__ = ["SiteServer"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

KEEP_VIEWS = 300.0
"""Seconds that a frozen view waits for its peer to come back."""
MAX_READ = 2 * MiB
DRAIN_SECONDS = 10.0
"""Seconds for which a cycle is not opened again while data of its former session is still being written."""


@attrs.define(eq=False)
class _Cycle:
    """An open cycle; `busy` calls are in its writer now."""

    replica_id: str
    spec: driver.CycleSpec
    writer: driver.CycleWriter
    ended: str = ""
    _busy: int = 0
    _changed: threading.Condition = attrs.field(factory=threading.Condition, repr=False)

    @contextmanager
    def use(self) -> Iterator[driver.CycleWriter]:
        """The writer. Raises WrongCycle when another session has taken the cycle over."""
        with self._changed:
            if self.ended:
                raise WrongCycle(cycle=self.spec.cycle_id, machine=self.replica_id, detail=self.ended)
            self._busy += 1
        try:
            yield self.writer
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def end(self, why: str, *, flush: bool) -> None:
        """Refuse further calls, wait for those under way, and close the writer with what has arrived."""
        with self._changed:
            if self.ended:
                return
            self.ended = why
            self._changed.wait_for(lambda: not self._busy)
        try:
            if flush:
                self.writer.flush()
        except AsrError as problem:
            _log.warning("cycle %s of %s: the last data is lost: %s", self.spec.cycle_id, self.replica_id, problem)
        finally:
            self.writer.close()


@attrs.define(eq=False)
class _View:
    """An open view. `key`: what it was opened with."""

    key: tuple[object, ...]
    view: driver.FrozenView
    settled: bool = False
    left_at: float | None = None

    def disk(self, machine_id: str, disk_id: str) -> driver.DiskView:
        """Raises InvalidValue."""
        try:
            return self.view.machines[machine_id].disks[disk_id]
        except KeyError as problem:
            raise InvalidValue(what="disk", value=f"{machine_id}/{disk_id}", wanted="one of the view") from problem


@attrs.define(eq=False)
class _Reader:
    """An open reader, which is not shared between threads: requests for it take turns."""

    reader: driver.DiskReader
    _closed: bool = False
    _turn: threading.Lock = attrs.field(factory=threading.Lock, repr=False)

    def read_each(self, reads: Sequence[tuple[int, memoryview]]) -> bool:
        """Fill the buffers; False if it was closed meanwhile."""
        with self._turn:
            if self._closed:
                return False
            self.reader.read_each(reads)
            return True

    def close(self) -> None:
        """Waits for the request that is being read."""
        with self._turn:
            self._closed = True
            self.reader.close()


_Handle = _Cycle | _View | _Reader


@attrs.define(eq=False)
class _Session:
    """One process of a peer, such as its engine, with all its connections."""

    channels: set[Channel] = attrs.field(factory=set)
    handles: dict[str, _Handle] = attrs.field(factory=dict)
    pages: dict[str, Sequence[Extent]] = attrs.field(factory=dict)

    def add(self, handle: _Handle) -> str:
        """An unguessable name for it."""
        name = secrets.token_hex(8)
        self.handles[name] = handle
        return name


class SiteServer:
    """Serves a connected site on any number of channels; see `channel.Handler`."""

    def __init__(self, site: driver.Site, clock: Callable[[], float] = time.monotonic) -> None:
        """The caller still owns the site. `clock` in seconds."""
        self._site = site
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._opening: dict[str, threading.Lock] = {}
        self._cycles: dict[str, _Cycle] = {}
        self._views: list[_View] = []
        self._calls: Mapping[str, Callable[[_Session, Mapping[str, Any], Bytes], Answer]] = {
            "source.open_view": self._open_view,
            "view.changed": lambda session, head, _: self._page(session, self._disk(session, head).changed()),
            "view.allocated": lambda session, head, _: self._page(session, self._disk(session, head).allocated()),
            "view.digests": self._view_digests,
            "view.reader": lambda session, head, _: self._open_reader(session, self._disk(session, head).reader()),
            "view.settle": self._settle,
            "view.confirm": self._confirm,
            "view.close": self._close_view,
            "target.replica": self._check_replica,
            "replica.allocated": self._replica_allocated,
            "replica.digests": self._replica_digests,
            "replica.compare": self._replica_compare,
            "replica.reader": self._replica_reader,
            "replica.open_cycle": self._open_cycle,
            "cycle.done": self._done,
            "cycle.flush": self._flush,
            "cycle.seal": self._seal,
            "cycle.discard": self._discard,
            "cycle.close": self._close_cycle,
            "reader.read": self._read,
            "reader.read_each": self._read_each,
            "reader.close": self._close_reader,
            "extents.next": self._next_page,
        }

    # -- Handler ---------------------------------------------------------------------------------------------------

    def call(self, channel: Channel, call: str, head: Mapping[str, Any], body: Bytes, watch: Watch) -> Answer:
        """One request."""
        session = self._session(channel)
        if call == "source.keep_marks":
            self._close_left({str(head.get("machine_id"))})
        if call in calls.PLAIN:
            return self._plain(call, head, watch)
        if call == "target.create_replica":
            spec = calls.value(head.get("spec"), driver.ReplicaSpec, call)
            self._site.target.create_replica(spec, watch)
            return Answer()
        if call not in self._calls:
            raise UnsupportedOperation(driver=self._site.driver, operation=f"answer the call {call!r}")
        return self._calls[call](session, head, body)

    def stream(self, channel: Channel, call: str, head: Mapping[str, Any]) -> Sink:
        """A request that data follows."""
        if call != "cycle.data":
            raise UnsupportedOperation(driver=self._site.driver, operation=f"take data for {call!r}")
        return _CycleSink(self._cycle(self._session(channel), head))

    def lost(self, channel: Channel) -> None:
        """A channel has ended."""
        with self._lock:
            key = _key(channel)
            session = self._sessions.get(key)
            if session is None:
                return
            session.channels.discard(channel)
            if session.channels:
                return
            del self._sessions[key]
        for handle in session.handles.values():
            if isinstance(handle, _View):
                handle.left_at = self._clock()
            elif isinstance(handle, _Cycle):
                self._end_cycle(handle, "its connection was lost")
            else:
                handle.close()

    def tidy(self) -> None:
        """Close views whose peer did not come back. To be called regularly."""
        with self._lock:
            now = self._clock()
            old = [item for item in self._views if item.left_at is not None and now - item.left_at > KEEP_VIEWS]
            self._views = [item for item in self._views if item not in old]
        for item in old:
            self._close(item)

    def close(self) -> None:
        """Close what is open; the channels must have ended. Views are closed, too."""
        with self._lock:
            views, self._views = self._views, []
        for item in views:
            self._close(item)

    def _close(self, item: _View) -> None:
        with suppress(AsrError):
            item.view.close()

    def _session(self, channel: Channel) -> _Session:
        with self._lock:
            session = self._sessions.setdefault(_key(channel), _Session())
            session.channels.add(channel)
            return session

    # -- plain calls -----------------------------------------------------------------------------------------------

    def _plain(self, call: str, head: Mapping[str, Any], watch: Watch) -> Answer:
        role, _, method = call.partition(".")
        if role == "replica":
            owner: Any = self._replica(head)
        else:
            owner = self._site if role == "site" else getattr(self._site, role)
        result = getattr(owner, method)(**calls.arguments(call, head, watch))
        if isinstance(result, driver.SiteStatus):
            result = attrs.evolve(result, details={**result.details, calls.CLOCK: repr(time.time())})
        return Answer({"result": calls.plain(result)})

    def _replica(self, head: Mapping[str, Any]) -> driver.Replica:
        return self._site.target.replica(str(head.get("replica")))

    # -- source ----------------------------------------------------------------------------------------------------

    def _open_view(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        requests = tuple(calls.value(head.get("requests"), list[driver.ViewRequest], "requests"))
        consistency = calls.value(head.get("consistency"), Consistency, "consistency")
        limit = calls.value(head.get("freeze_limit"), float, "freeze_limit")
        key = (requests, consistency)
        opened = self._still_open(key, {request.machine_id for request in requests})
        if opened is None:
            view = self._site.source.open_view(requests, consistency=consistency, freeze_limit=limit)
            opened = _View(key, view)
            with self._lock:
                self._views.append(opened)
        return Answer({"result": calls.plain(_state(session.add(opened), opened.view))})

    def _still_open(self, key: tuple[object, ...], machines: set[str]) -> _View | None:
        """The view that was opened with the same arguments, if it is still open; it is taken from its former session.
        Other views of these machines are closed if their session has lost its connections."""
        with self._lock:
            same = next((item for item in self._views if item.key == key and not item.settled), None)
            for session in self._sessions.values():
                session.handles = {name: item for name, item in session.handles.items() if item is not same}
        self._close_left(machines, same)
        if same is None:
            return None
        try:
            same.view.confirm()
        except AsrError:
            self._forget_view(same)
            return None
        same.left_at = None
        return same

    def _close_left(self, machines: set[str], but: _View | None = None) -> None:
        """Close views of these machines whose session has lost its connections."""
        with self._lock:
            left = [item for item in self._views if item is not but and item.left_at is not None]
            left = [item for item in left if machines & set(item.view.machines)]
            self._views = [item for item in self._views if item not in left]
        for item in left:
            self._close(item)

    def _forget_view(self, item: _View) -> None:
        with self._lock:
            self._views = [other for other in self._views if other is not item]
        self._close(item)

    def _view(self, session: _Session, head: Mapping[str, Any]) -> _View:
        return self._opened(session, head.get("view"), _View)

    def _disk(self, session: _Session, head: Mapping[str, Any]) -> driver.DiskView:
        return self._view(session, head).disk(str(head.get("machine")), str(head.get("disk")))

    def _view_digests(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        with _within():
            return Answer(body=self._disk(session, head).digests(_extent(head)))

    def _settle(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        item = self._view(session, head)
        again = item.view.settle()
        item.settled = item.settled or bool(again)
        settled = calls.Settled(
            {machine: {disk: list(extents) for disk, extents in disks.items()} for machine, disks in again.items()},
            item.view.taken_at,
            {name: calls.Instant(machine.consistency, machine.mark) for name, machine in item.view.machines.items()},
        )
        return Answer({"result": calls.plain(settled)})

    def _confirm(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        self._view(session, head).view.confirm()
        return Answer()

    def _close_view(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        item = session.handles.pop(str(head.get("view")), None)
        if isinstance(item, _View):
            with self._lock:
                self._views = [other for other in self._views if other is not item]
            item.view.close()
        return Answer()

    # -- target ----------------------------------------------------------------------------------------------------

    def _check_replica(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        self._replica(head)
        return Answer()

    def _replica_allocated(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        return self._page(session, self._replica(head).allocated(str(head.get("disk"))))

    def _replica_digests(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        with _within():
            return Answer(body=self._digested(head).digests(str(head.get("disk")), _extent(head), _digest(head)))

    def _replica_compare(self, session: _Session, head: Mapping[str, Any], body: Bytes) -> Answer:
        """`body` is the digest of the caller's digests. If it equals that of our digests, nothing differs; otherwise
        our digests are returned."""
        digest = _digest(head)
        with _within():
            ours = self._digested(head).digests(str(head.get("disk")), _extent(head), digest)
        same = driver.digest_of(ours, digest) == bytes(body)
        return Answer({"same": same}, b"" if same else ours)

    def _digested(self, head: Mapping[str, Any]) -> driver.Replica:
        """The replica whose digests are asked for: those that were recorded, or those of what is read."""
        replica = self._replica(head)
        return replica.from_records() if head.get("records") == "yes" else replica

    def _replica_reader(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        return self._open_reader(session, self._replica(head).reader(str(head.get("disk")), head.get("point")))

    def _open_cycle(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        spec = calls.value(head.get("spec"), driver.CycleSpec, "spec")
        replica = self._replica(head)
        replica_id = str(head.get("replica"))
        self._drain(replica_id)
        with self._lock:
            opening = self._opening.setdefault(replica_id, threading.Lock())
        with opening:
            former = self._cycles.get(replica_id)
            if former is not None and former.spec.cycle_id == spec.cycle_id:
                epoch = replica.info().epoch
                if spec.epoch < epoch:
                    raise StaleEpoch(replica=replica_id, epoch=spec.epoch, owner=epoch)
                self._end_cycle(former, "another session has taken it over")
            cycle = _Cycle(replica_id, spec, replica.open_cycle(spec))
            with self._lock:
                self._cycles[replica_id] = cycle
        return Answer({"handle": session.add(cycle)})

    def _drain(self, replica_id: str) -> None:
        """Take what has still arrived of an open cycle over connections that were cut: it need not be sent again."""
        with self._lock:
            cycle = self._cycles.get(replica_id)
            held = [item for item in self._sessions.values() if cycle is not None and cycle in item.handles.values()]
            channels = [channel for item in held for channel in item.channels]
        for channel in channels:
            channel.drain(DRAIN_SECONDS)

    def _end_cycle(self, cycle: _Cycle, why: str) -> None:
        cycle.end(why, flush=True)
        with self._lock:
            if self._cycles.get(cycle.replica_id) is cycle:
                del self._cycles[cycle.replica_id]

    def _cycle(self, session: _Session, head: Mapping[str, Any]) -> _Cycle:
        return self._opened(session, head.get("cycle"), _Cycle)

    def _done(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        with self._cycle(session, head).use() as writer:
            return self._page(session, writer.done(str(head.get("disk"))))

    def _flush(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        with self._cycle(session, head).use() as writer:
            writer.flush()
        return Answer()

    def _seal(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        spec = calls.value(head.get("spec"), driver.SealSpec, "spec")
        with self._cycle(session, head).use() as writer:
            return Answer({"result": calls.plain(writer.seal(spec))})

    def _discard(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        with self._cycle(session, head).use() as writer:
            writer.discard()
        return Answer()

    def _close_cycle(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        cycle = session.handles.pop(str(head.get("cycle")), None)
        if isinstance(cycle, _Cycle):
            cycle.end("it was closed", flush=False)
            with self._lock:
                if self._cycles.get(cycle.replica_id) is cycle:
                    del self._cycles[cycle.replica_id]
        return Answer()

    # -- readers and lists -----------------------------------------------------------------------------------------

    def _open_reader(self, session: _Session, reader: driver.DiskReader) -> Answer:
        return Answer({"handle": session.add(_Reader(reader)), "each": True})

    def _read(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        return self._content(session, head, [_extent(head)])

    def _read_each(self, session: _Session, head: Mapping[str, Any], body: Bytes) -> Answer:
        return self._content(session, head, calls.extents_of(body))

    def _content(self, session: _Session, head: Mapping[str, Any], extents: Sequence[Extent]) -> Answer:
        length = total(extents)
        if length > MAX_READ:
            raise InvalidValue(what="length", value=length, wanted=f"at most {MAX_READ}")
        item = self._opened(session, head.get("reader"), _Reader)
        if not length:
            return Answer()
        with driver.page_buffer(length) as buffer:
            reads, at = [], 0
            for extent in extents:
                reads.append((extent.offset, buffer[at : at + extent.length]))
                at += extent.length
            with _within():
                done = item.read_each(reads)
            if not done:
                raise self._lost("what was opened")
            return Answer(body=bytes(buffer))  # it is sent when the buffer serves another reader

    def _close_reader(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        item = session.handles.pop(str(head.get("reader")), None)
        if isinstance(item, _Reader):
            item.close()
        return Answer()

    def _page(self, session: _Session, extents: Sequence[Extent]) -> Answer:
        body = calls.pack_extents(extents[: calls.PAGE])
        if len(extents) <= calls.PAGE:
            return Answer(body=body)
        token = secrets.token_hex(8)
        session.pages[token] = extents[calls.PAGE :]
        return Answer({"more": token}, body)

    def _next_page(self, session: _Session, head: Mapping[str, Any], _: Bytes) -> Answer:
        extents = session.pages.pop(str(head.get("more")), None)
        if extents is None:
            raise self._lost("the rest of a list")
        return self._page(session, extents)

    def _opened(self, session: _Session, name: object, kind: type[T]) -> T:
        handle = session.handles.get(str(name))
        if not isinstance(handle, kind):
            raise self._lost("what was opened")
        return handle

    def _lost(self, what: str) -> SiteUnreachable:
        return SiteUnreachable(site=self._site.name, detail=f"the connection and {what} were lost")


@attrs.frozen
class _CycleSink:
    """Data of a cycle, straight into its writer."""

    cycle: _Cycle

    def data(self, head: Mapping[str, Any], body: Bytes) -> None:
        """`{"disk", "at"}` and a body, or `{"disk", "at", "length", "zero" or "same": true}`."""
        disk_id, at = str(head.get("disk")), calls.value(head.get("at"), int, "offset")
        with self.cycle.use() as writer:
            if "length" not in head:
                writer.write(disk_id, at, memoryview(body))
                return
            length = calls.value(head["length"], int, "length")
            (writer.same if head.get("same") else writer.zero)(disk_id, at, length)

    def end(self) -> Answer:
        """Nothing is left to do: each frame was written when it came."""
        return Answer()


def _key(channel: Channel) -> tuple[str, str]:
    return channel.component.uri, str(channel.about.get("session", ""))


@contextmanager
def _within() -> Iterator[None]:
    """A range that is not within the disk, or digests that do not fit it, are the caller's mistake."""
    try:
        yield
    except (ValueError, OverflowError) as problem:
        raise InvalidValue(what="range", value="what was sent", wanted=str(problem)) from problem


def _extent(head: Mapping[str, Any]) -> Extent:
    offset, length = (calls.value(head.get(name), int, name) for name in ("offset", "length"))
    if offset < 0 or length < 0:
        raise InvalidValue(what="extent", value=f"{offset}+{length}", wanted="no negative numbers")
    return Extent(offset, length)


def _digest(head: Mapping[str, Any]) -> driver.Digest:
    result: driver.Digest = calls.value(head.get("digest", driver.Digest.BLAKE3.value), driver.Digest, "digest")
    return result


def _state(handle: str, view: driver.FrozenView) -> calls.ViewState:
    return calls.ViewState(
        handle,
        view.taken_at,
        {
            machine_id: calls.MachineState(
                machine.description,
                machine.consistency,
                machine.mark,
                {
                    disk_id: calls.DiskState(disk.disk, disk.tracking, disk.reason, disk.whole, disk.digest)
                    for disk_id, disk in machine.disks.items()
                },
                notices=tuple(machine.notices),
                halted=machine.halted,
            )
            for machine_id, machine in view.machines.items()
        },
    )
