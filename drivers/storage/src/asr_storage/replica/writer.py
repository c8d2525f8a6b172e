"""The writer of a cycle: into the journal, and the durable instant of the point."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from asr_storage.files.errors import missing_space
from asr_storage.replica.blocks import Kind, whole_block_digests
from asr_storage.replica.journal import Commit, Journal
from asr_storage.replica.store import MAX_LAYERS, Home, Images, Record, Shared, checked_id
from asrcore.crashpoint import reach
from asrcore.driver import CycleWriter, SealSpec, StoredPoint
from asrcore.errors import AsrError, InvalidValue, TargetFull
from asrcore.model.extent import Extent
from asrcore.units import MiB

__all__ = ["FileCycleWriter"]

_log = logging.getLogger(__name__)

# Left free at a seal for metadata: applying what is committed must not fail for lack of space.
_RESERVE = 8 * MiB

FIRST_COPY_HASHED = 128 * MiB
FIRST_COPY_RATE = 150 * MiB
"""Of a first copy this much is hashed, and this much a second: 3 % of one core. It reads as fast as two cores let it,
and would be 10 % slower. What arrives faster has no digests until the first scrub or resync reads it."""


class CycleHome(Protocol):
    """What a writer needs of its replica."""

    replica_id: str
    home: Home
    shared: Shared
    clock: Callable[[], float]

    def errors(self, operation: str, wanted: int = 0) -> AbstractContextManager[None]:
        """Translate what goes wrong."""

    def working(self, operation: str) -> AbstractContextManager[Record]:
        """Exclusive work."""

    def images(self, record: Record) -> Images:
        """The images."""

    def check_epoch(self, record: Record, epoch: int) -> None:
        """Raises StaleEpoch."""


class FileCycleWriter(CycleWriter):
    """Writes a cycle to its journal; the replica is closed to other processes until `close`."""

    def __init__(self, replica: CycleHome, journal: Journal, headroom: int, beside: Callable[[], None] | None) -> None:
        """Takes over one `hold` of the replica. `headroom`: bytes to be left free. `beside` is called on a separate
        thread while data arrives."""
        self._headroom = headroom
        self._replica = replica
        self._journal = journal
        self._disks = dict(journal.cycle.disks)
        self._hashing = threading.Lock()
        self._hashed, self._begun = 0, time.monotonic()
        self._sealed: StoredPoint | None = None
        self._beside = threading.Thread(target=beside, name="clones", daemon=True) if beside else None
        if self._beside is not None:
            self._beside.start()
        self._open = True

    @property
    def id(self) -> str:
        """Of the cycle."""
        return self._journal.cycle.id

    def _check(self, disk_id: str, offset: int, length: int) -> None:
        self._check_open()
        size = self._disks.get(disk_id)
        if size is None:
            raise InvalidValue(what="disk", value=disk_id, wanted=f"one of {', '.join(self._disks)}")
        if offset < 0 or length < 0 or offset + length > size:
            raise InvalidValue(what="range", value=f"{offset}+{length}", wanted=f"within the disk's {size} bytes")

    def _check_open(self) -> None:
        if not self._open or self._sealed is not None:
            raise InvalidValue(what="cycle", value=self.id, wanted="open")

    def done(self, disk_id: str) -> list[Extent]:
        return self._journal.done(disk_id)

    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        data = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        self._check(disk_id, offset, len(data))
        with self._replica.errors("writing a cycle", wanted=len(data)):
            if self._headroom:
                self._check_free(len(data) + self._headroom)
            hashed = self._is_hashed(len(data))
            digests = whole_block_digests(offset, data, self._disks[disk_id]) if hashed else b""
            self._journal.write(disk_id, offset, data, digests)

    def _is_hashed(self, length: int) -> bool:
        if not self._journal.cycle.direct:
            return True
        with self._hashing:
            allowed = FIRST_COPY_HASHED + FIRST_COPY_RATE * (time.monotonic() - self._begun)
            if self._hashed + length > allowed:
                return False
            self._hashed += length
            return True

    def zero(self, disk_id: str, offset: int, length: int) -> None:
        self._check(disk_id, offset, length)
        with self._replica.errors("writing a cycle"):
            self._journal.note(disk_id, offset, length, Kind.ZERO)

    def same(self, disk_id: str, offset: int, length: int) -> None:
        self._check(disk_id, offset, length)
        with self._replica.errors("writing a cycle"):
            self._journal.note(disk_id, offset, length, Kind.SAME)

    def flush(self) -> None:
        self._check_open()
        with self._replica.errors("flushing a cycle"):
            self._replica.check_epoch(self._replica.home.load(), self._journal.cycle.epoch)
            self._journal.flush()
            reach("target.flush")

    def seal(self, spec: SealSpec) -> StoredPoint:
        """See CycleWriter. When space is missing nothing is committed and the cycle stays open.

        What is committed is applied when the writer is closed, or by an earlier operation on the replica.
        The point is not kept, and is recorded as such, where the chain has its maximum length (`MAX_LAYERS`).
        """
        if self._sealed is not None and self._sealed.id == spec.point_id:
            return self._sealed
        self._check_open()
        checked_id("point id", spec.point_id)
        replica, journal = self._replica, self._journal
        with replica.working("sealing a cycle") as record:
            already = record.point(spec.point_id)
            if already is not None:
                self._sealed = already.stored
                return self._sealed
            replica.check_epoch(record, journal.cycle.epoch)
            journal.flush()
            self._check_space(record)
            reach("target.seal.begin")
            point = StoredPoint(
                id=spec.point_id,
                taken_at=spec.taken_at,
                sealed_at=replica.clock(),
                consistency=spec.consistency,
                kept=spec.keep and replica.images(record).layer_count(record) < MAX_LAYERS,
                pinned=False,
                disks=dict(self._disks),
            )
            journal.commit(Commit(point, spec))
            reach("target.seal.commit")
            journal.close()
            self._sealed = point
        return point

    def _check_space(self, record: Record) -> None:
        images = self._replica.images(record)
        changes = [] if self._journal.cycle.direct else [c for d in self._disks for c in self._journal.changes(d)]
        self._check_free(images.cost(record, changes) + max(self._headroom, _RESERVE))

    def _check_free(self, wanted: int) -> None:
        path = self._replica.home.path
        status = os.statvfs(path)
        if status.f_bavail * status.f_frsize < wanted:
            raise TargetFull(where=str(path), detail=missing_space(path, wanted))

    def _wait_beside(self) -> None:
        if self._beside is not None:
            self._beside.join()

    def discard(self) -> None:
        """See CycleWriter."""
        self._check_open()
        with self._replica.working("discarding a cycle") as record:
            self._replica.check_epoch(record, self._journal.cycle.epoch)
            self._journal.remove()
        self.close()

    def close(self) -> None:
        """Also applies what was sealed."""
        if self._open:
            self._let_go()
            if self._sealed is not None:
                self._apply()

    def _let_go(self) -> None:
        if self._open:
            self._open = False
            self._wait_beside()
            try:
                self._journal.close()
            finally:
                self._replica.shared.writer = lambda: None
                self._replica.shared.release()

    def _apply(self) -> None:
        try:
            with self._replica.working("applying a sealed cycle"):
                pass
        except AsrError as problem:  # the point exists; the next operation reports the problem
            _log.warning("%s: the next operation applies the sealed cycle: %s", self._replica.replica_id, problem)

    def __del__(self) -> None:
        self._let_go()
