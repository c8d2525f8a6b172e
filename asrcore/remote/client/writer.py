"""Writing a cycle at a site that is served elsewhere: pipelined over several connections, acknowledged one by one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import attrs

from asrcore.driver import CycleWriter, SealSpec, StoredPoint
from asrcore.errors import AsrError
from asrcore.model.extent import Extent, split
from asrcore.remote import calls
from asrcore.remote.client.peer import Peer
from asrcore.wire.channel import DataStream
from asrcore.wire.pace import FRAME

__all__ = ["RemoteWriter"]


@attrs.frozen
class _InFlight:
    """A range that was sent and perhaps not written yet; `number` counts frames of its stream."""

    number: int
    disk_id: str
    start: int
    end: int

    def meets(self, disk_id: str, start: int, end: int) -> bool:
        return self.disk_id == disk_id and self.start < end and start < self.end


@attrs.define
class _Lane:
    """One connection's stream and what is in flight on it, oldest first."""

    stream: DataStream
    flying: deque[_InFlight] = attrs.field(factory=deque)

    def acknowledge(self) -> None:
        """Remove what was acknowledged."""
        done = self.stream.acknowledged
        while self.flying and self.flying[0].number <= done:
            self.flying.popleft()


class RemoteWriter(CycleWriter):
    """See `CycleWriter`. An error about a piece of data is raised by a later call, at the latest by `seal`."""

    def __init__(self, peer: Peer, handle: str) -> None:
        self._peer = peer
        self._handle = {"cycle": handle}
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}
        self._failed: AsrError | None = None
        self._closed = False

    # -- data

    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        for piece in split([Extent(offset, len(data))], self._frame_size()):
            part = data[piece.offset - offset : piece.end - offset]
            self._put(disk_id, piece.offset, piece.end, {"disk": disk_id, "at": piece.offset}, part)

    def zero(self, disk_id: str, offset: int, length: int) -> None:
        self._put(disk_id, offset, offset + length, {"disk": disk_id, "at": offset, "length": length})

    def same(self, disk_id: str, offset: int, length: int) -> None:
        self._put(disk_id, offset, offset + length, {"disk": disk_id, "at": offset, "length": length, "same": True})

    def _frame_size(self) -> int:
        with self._lock:
            lanes = list(self._lanes.values())
        return max((lane.stream.frame_size for lane in lanes), default=FRAME)

    def _put(self, disk_id: str, start: int, end: int, head: Mapping[str, Any], data: memoryview | bytes = b"") -> None:
        index, lane = self._lane_for(disk_id, start, end)
        try:
            number = lane.stream.put(head, data)
        except AsrError as problem:
            raise self._lost(index, lane, problem) from problem
        with self._lock:
            lane.flying.append(_InFlight(number, disk_id, start, end))

    def _lane_for(self, disk_id: str, start: int, end: int) -> tuple[int, _Lane]:
        """Where to send a range: the next connection in turn, or the one with an overlapping range in flight, which it
        must not overtake."""
        with self._lock:
            for lane in self._lanes.values():
                lane.acknowledge()
            before = [
                (index, lane, item.number)
                for index, lane in self._lanes.items()
                for item in lane.flying
                if item.meets(disk_id, start, end)
            ]
        if before:
            index, chosen, _ = before[-1]
            for other, lane, number in before:
                if lane is not chosen:
                    self._drain(other, lane, number)
            return index, chosen
        index = self._peer.next_index()
        with self._lock:
            known = self._lanes.get(index)
        if known is not None:
            return index, known
        stream = self._peer.links.channel(index).stream("cycle.data", self._handle)
        with self._lock:
            return index, self._lanes.setdefault(index, _Lane(stream))

    def _drain(self, index: int, lane: _Lane, number: int = 0) -> None:
        try:
            lane.stream.drain(number)
        except AsrError as problem:
            raise self._lost(index, lane, problem) from problem

    def _drain_all(self) -> None:
        with self._lock:
            lanes = list(self._lanes.items())
        for index, lane in lanes:
            self._drain(index, lane)

    def _lost(self, index: int, lane: _Lane, problem: AsrError) -> AsrError:
        """What is in flight in this lane may not have arrived: the cycle can be flushed, but not sealed."""
        with self._lock:
            if self._lanes.get(index) is lane:
                del self._lanes[index]
            self._failed = self._failed or problem
        return problem

    # -- the cycle

    def done(self, disk_id: str) -> list[Extent]:
        return self._peer.extents("cycle.done", {**self._handle, "disk": disk_id}, held=True)

    def flush(self) -> None:
        self._drain_all()
        self._peer.ask_held("cycle.flush", self._handle)

    def seal(self, spec: SealSpec) -> StoredPoint:
        self._drain_all()
        if self._failed is not None:
            raise self._failed
        answer = self._peer.ask_held("cycle.seal", {**self._handle, "spec": calls.plain(spec)})
        point: StoredPoint = calls.value(answer.head.get("result"), StoredPoint, "cycle.seal")
        return point

    def discard(self) -> None:
        with suppress(AsrError):
            self._drain_all()
        self._peer.ask_held("cycle.discard", self._handle)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(AsrError):  # what was opened ends with its connections
            self._drain_all()
            for lane in self._lanes.values():
                lane.stream.end()
            self._peer.ask_held("cycle.close", self._handle)
