"""Views of a server, and the spool that keeps them across restarts of the engine.

A view is *live* at first: its disks are read as they are, and `settle` names what was written meanwhile, until it is so
little that the agent captures all of it at a freeze. The spool keeps that from then on: one sparse file for each disk,
and `view.json`, written last.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from asr_driver_physical.errors import ServerTooBusy
from asr_driver_physical.servers import reports
from asr_driver_physical.servers.hub import Gateway
from asr_driver_physical.servers.identity import ServerRecord
from asr_driver_physical.servers.machine import check_same, description_of
from asr_driver_physical.servers.spool import Spool, ViewRecord
from asr_mobility.service import MAX_READ
from asrcore.crashpoint import reach
from asrcore.driver import DIGEST_BLOCK, DIGEST_SIZE, Digest, DiskReader, DiskView, FrozenView, MachineView, Tracking
from asrcore.errors import UnsupportedOperation, ViewLost
from asrcore.model.extent import Extent, intersect, normalise, split, subtract
from asrcore.model.machine import Description, Disk
from asrcore.model.point import Consistency, Mark
from asrcore.units import MiB

__all__ = ["marks_in", "open_view"]

_ROUNDS = 12
_FREEZE_SLACK = 150.0
"""Seconds a call may take beyond the freeze: sync, scripts of the administrator, reading."""
_OPEN_SECONDS = 120.0
_DIGEST_PIECE = 16 * MiB
_RANGES = 4096
"""In a request: its head then has at most 100 KiB, and the agent, which has few threads, is not kept for long."""

_CAPTURE_ROUNDS = 4
"""In each the agent reads again what was written in the one before, at most all that has changed."""

_Reads = list[tuple[int, memoryview]]


def open_view(
    gateway: Gateway, spool: Spool, server: ServerRecord, view_id: str, since: Mark | None, freeze_limit: float
) -> FrozenView:
    """Open a view, or the one of that id that is kept. Raises SiteUnreachable, ViewLost, SpoolFull."""
    view = _View(gateway, spool, server, view_id, since, freeze_limit)
    record = spool.load(view_id)
    # A settled one shows a later instant than what was copied before, except for a caller that knows its new mark.
    if record is None or (not record.live and since != _mark(record)):
        spool.clear()
        record = view.begin()
    view.show(record)
    return view


class _View(FrozenView):
    def __init__(
        self,
        gateway: Gateway,
        spool: Spool,
        server: ServerRecord,
        view_id: str,
        since: Mark | None,
        freeze_limit: float,
    ) -> None:
        self._gateway, self.spool, self._server = gateway, spool, server
        self.server = server.name
        self._view_id, self._since, self._freeze_limit = view_id, since, freeze_limit
        self._rounds = 0
        self._pending: int | None = None
        self._closed = False
        self.reads_each = True

    def call(self, call: str, timeout: float = 60.0, **arguments: Any) -> tuple[Mapping[str, Any], memoryview]:
        """Call the agent."""
        if self._closed:
            raise ViewLost(machine=self._server.name, detail="it was closed")
        head, body = self._gateway.call(self._server.name, call, arguments, timeout=timeout)
        return head, memoryview(body)

    def begin(self) -> ViewRecord:
        """Let the agent open it."""
        since = None if self._since is None else marks_in(self._since)
        reported, _ = self.call("open", timeout=_OPEN_SECONDS, since=since)
        answer = reports.opened(self._server.name, reported)
        check_same(self._server, answer["machine"])
        disks = answer["disks"]
        if self._since is not None and since is None:
            disks = [{**disk, "tracking": "lost", "reason": "the mark is not of this site"} for disk in disks]
        record = ViewRecord(
            view_id=self._view_id,
            live=True,
            taken_at=time.time(),
            consistency=Consistency.CRASH.value,
            marks=answer["marks"],
            machine=answer["machine"],
            disks=disks,
            held={},
        )
        reach("source.view.begun")
        self.spool.save(record)
        reach("source.view.opened")
        return record

    def _fetch(
        self, changed: Mapping[str, Sequence[Sequence[int]]], disks: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[list[int]]]:
        """Copy what the agent has captured into the spool."""
        for number, disk in enumerate(disks):
            left = _CAPTURE_ROUNDS * sum(length for _, length in changed.get(disk["id"], ()))
            start, more = 0, bool(changed.get(disk["id"]))
            while more:
                head, body = self.call("held", view=self._view_id, disk=disk["id"], start=start)
                held = reports.held(self._server.name, head, body, disk["id"], disk["size"], left)
                pieces, at = [], 0
                for offset, length in held.places:
                    pieces.append((offset, body[at : at + length]))
                    at += length
                self.spool.put(number, pieces)
                start, more, left = start + len(pieces), held.more, left - at
            self.spool.sync(number)
        return {key: [list(extent) for extent in extents] for key, extents in changed.items()}

    def show(self, record: ViewRecord) -> None:
        """Use that record from now on."""
        self.record = record
        self.taken_at = record.taken_at
        self.machine = _Machine(self, record, self._server, self._since)
        self.machines = {self.machine.description.machine.id: self.machine}

    def settle(self) -> Mapping[str, Mapping[str, Sequence[Extent]]]:
        record = self.record
        if not record.live:
            return {}
        try:
            reported, _ = self.call(
                "settle",
                timeout=self._freeze_limit + _FREEZE_SLACK,
                view=self._view_id,
                marks=record.marks,
                freeze_limit=self._freeze_limit,
            )
        except ViewLost:
            self.spool.clear()  # the agent no longer knows what was written while it was read
            raise
        answer = reports.settled(self._server.name, reported, {disk["id"]: disk["size"] for disk in record.disks})
        machine = reports.machine(self._server.name, reported["machine"])
        check_same(self._server, machine)
        changed = {key: [list(item) for item in extents] for key, extents in answer.changed.items()}
        pending = sum(length for extents in changed.values() for _, length in extents)
        self._rounds += 1
        if answer.live and self._pending is not None and (pending >= self._pending or self._rounds > _ROUNDS):
            raise ServerTooBusy(server=self._server.name, pending=pending, rounds=self._rounds)
        self._pending = pending
        marks = {key: list(mark) for key, mark in answer.marks.items()}
        updated = attrs.evolve(record, marks=marks, machine=machine, live=answer.live)
        if not answer.live:
            updated.taken_at = time.time() - answer.age
            updated.consistency = answer.consistency
            updated.held = self._fetch(changed, record.disks)
            self.spool.save(updated)
            reach("source.view.settled")
            self.call("release", view=self._view_id)
        self.record = updated
        self.taken_at = updated.taken_at
        self.machine.settled(updated)
        machine_id = self.machine.description.machine.id
        return {machine_id: {key: _extents(extents) for key, extents in changed.items() if extents}}

    def confirm(self) -> None:
        if self._closed or self.record.live:
            raise ViewLost(
                machine=self._server.name, detail="it was closed" if self._closed else "it was never settled"
            )

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.spool.clear()
            reach("source.view.closed")


class _Machine(MachineView):
    def __init__(self, view: _View, record: ViewRecord, server: ServerRecord, since: Mark | None) -> None:
        self._server = server
        self._disks = {
            item["id"]: _DiskView(view, number, item, since is None) for number, item in enumerate(record.disks)
        }
        self.disks = dict(self._disks)
        self.settled(record)

    def settled(self, record: ViewRecord) -> None:
        """Use the instant of the record."""
        self.description: Description = description_of(self._server, record.machine)
        self.consistency = Consistency(record.consistency)
        self.mark = _mark(record)
        for disk_id, disk in self._disks.items():
            disk.held = _extents(record.held.get(disk_id, ()))


class _DiskView(DiskView):
    whole = False
    hashes_at_source = True
    digest = Digest.BLAKE2B

    def __init__(self, view: _View, number: int, reported: Mapping[str, Any], unmarked: bool) -> None:
        self.view, self.number = view, number
        sectors = {item["id"]: item.get("sector_size", 512) for item in view.record.machine["disks"]}
        self.disk = Disk(
            id=reported["id"],
            size=reported["size"],
            bus="",
            location=f"/dev/{reported['name']}",
            sector_size=sectors.get(reported["id"], 512),
        )
        self.tracking = Tracking.NONE if unmarked else Tracking(reported["tracking"])
        self.reason = reported["reason"]
        self.held: list[Extent] = []
        self._changed = _extents(reported["changed"])

    def changed(self) -> list[Extent]:
        if self.tracking is not Tracking.CHANGED:
            raise ValueError(f"changes of disk {self.disk.id} are not known: {self.tracking.value}")
        return self._changed

    def allocated(self) -> list[Extent]:
        return [Extent(0, self.disk.size)]

    def reader(self) -> DiskReader:
        return _Reader(self)

    def digests(self, extent: Extent) -> bytes:
        result = b""
        for piece in split([extent], _DIGEST_PIECE):
            _, body = self.view.call(
                "digests", timeout=300.0, disk=self.disk.id, offset=piece.offset, length=piece.length
            )
            reports.digests_fit(self.view.server, body, -(-piece.length // DIGEST_BLOCK), DIGEST_SIZE)
            result += body
        return result


class _Reader(DiskReader):
    """Captured ranges come from the spool, the rest from the disk as it is now."""

    def __init__(self, disk: _DiskView) -> None:
        self._disk = disk
        self._fd: int | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read_each([(offset, buffer)])

    def read_each(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        asked: _Reads = []
        length = 0
        for at, part in self._not_in_spool(reads):
            if asked and (length + len(part) > MAX_READ or len(asked) == _RANGES):
                self._read_live(asked)
                asked, length = [], 0
            asked.append((at, part))
            length += len(part)
        if asked:
            self._read_live(asked)

    def _not_in_spool(self, reads: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
        """Fill what the spool holds; the rest, in pieces that a request may ask for."""
        for offset, buffer in reads:
            wanted = [Extent(offset, len(buffer))]
            held = intersect(wanted, self._disk.held) if self._disk.held else []
            for piece in held:
                self._read_spool(piece, buffer[piece.offset - offset : piece.end - offset])
            for piece in split(subtract(wanted, held) if held else wanted, MAX_READ):
                yield piece.offset, buffer[piece.offset - offset : piece.end - offset]

    def _read_spool(self, piece: Extent, buffer: memoryview) -> None:
        try:
            if self._fd is None:
                self._fd = self._disk.view.spool.reader(self._disk.number)
            done = 0
            while done < len(buffer):
                got = os.preadv(self._fd, [buffer[done:]], piece.offset + done)
                if not got:
                    raise OSError(5, "the spool's file ends early")
                done += got
        except OSError as problem:
            raise ViewLost(machine=self._disk.view.record.machine["hostname"], detail=f"spool: {problem}") from problem

    def _read_live(self, reads: _Reads) -> None:
        if len(reads) > 1 and self._disk.view.reads_each:
            try:
                return self._read_together(reads)
            except UnsupportedOperation:  # an older agent
                self._disk.view.reads_each = False
        for offset, buffer in reads:
            head, body = self._disk.view.call("read", disk=self._disk.disk.id, offset=offset, length=len(buffer))
            zero = reports.read_fits(self._disk.view.server, head, body, len(buffer))
            buffer[:] = bytes(len(buffer)) if zero else body
        return None

    def _read_together(self, reads: _Reads) -> None:
        ranges = [[offset, len(buffer)] for offset, buffer in reads]
        head, body = self._disk.view.call("read-each", disk=self._disk.disk.id, ranges=ranges)
        zero = reports.zero_numbers(self._disk.view.server, head, body, [length for _, length in ranges])
        at = 0
        for number, (_, buffer) in enumerate(reads):
            if number in zero:
                buffer[:] = bytes(len(buffer))
            else:
                buffer[:] = body[at : at + len(buffer)]
                at += len(buffer)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _extents(ranges: Sequence[Sequence[int]]) -> list[Extent]:
    return normalise(Extent(offset, length) for offset, length in ranges)


def marks_in(mark: Mark) -> dict[str, list[Any]] | None:
    """The content of a mark for each disk; None if the mark is not this driver's."""
    try:
        marks = json.loads(mark.token)
        return {str(key): [str(generation), int(turn), str(boot)] for key, (generation, turn, boot) in marks.items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _mark(record: ViewRecord) -> Mark | None:
    return Mark(json.dumps(record.marks, sort_keys=True)) if record.marks else None
