"""The files of digests of one replica: written with each point, merged, completed, looked up.

All under the replica's lock. A file that cannot be written or read is no error of the replica: see `digests.py`.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import attrs

from asr_storage.replica import digests
from asr_storage.replica.blocks import Blocks
from asr_storage.replica.digests import DigestFile, PointDigests, unknown_runs
from asr_storage.replica.journal import Journal
from asr_storage.replica.store import Home, Point, Record
from asrcore.crashpoint import reach
from asrcore.driver import DIGEST_BLOCK, DIGEST_SIZE
from asrcore.model.extent import Extent
from asrcore.units import GiB

__all__ = ["RecordedDigests"]

_log = logging.getLogger(__name__)

_AT_ONCE = 64
"""Files of deleted points and former heads after which a cycle merges them. Usually that is done when points are
deleted, with the source no longer frozen."""

LEARN_EVERY = 8 * GiB
"""Bytes of a disk, read in parts, after which what was learned is recorded: that writes the point's file as a whole."""
_MOST_COLLECTED = 16  # points; of one that is not read to its end, up to 2 MiB stay in memory


@attrs.define
class _Collected:
    """Of a point that is read in parts: what was learned since it was last recorded."""

    read: int = 0
    learned: dict[str, Blocks] = attrs.field(factory=dict)


_collected: OrderedDict[tuple[Path, str], _Collected] = OrderedDict()
"""By replica and point. A replica is opened by each call that reads a part. What is lost when the process ends stays
unknown until the point is read again."""
_collecting = threading.Lock()


class RecordedDigests:
    """Records that are returned are not saved."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def record(self, record: Record, point_id: str, journal: Journal) -> Record:
        """Write the file of a point that is being applied. `record` has the point already."""
        names = tuple(name for name in record.digests if name != point_id)
        try:
            self._write(point_id, journal.blocks())
        except OSError as problem:
            # What this cycle wrote would be missing in all later ones.
            _log.warning("%s: digests of its points are not recorded: %s", record.name, problem)
            return attrs.evolve(record, digests=())
        reach("target.seal.digests")
        record = attrs.evolve(record, digests=(*names, point_id))
        return self.merge(record) if len(names) - len(record.points) >= _AT_ONCE else record

    def _write(self, point_id: str, blocks: Mapping[str, Blocks]) -> None:
        path = self._home.digests(point_id)
        path.parent.mkdir(0o700, exist_ok=True)
        digests.write(path, blocks)

    def merge(self, record: Record) -> Record:
        """Merge the files of points that are deleted into newer ones. The merged file says the same beside the older
        one as without it, so it does not matter where this ends; `Home.sweep` deletes what is merged."""
        alive = {point.stored.id for point in record.points}
        names = list(record.digests)
        broken: set[str] = set()
        try:
            while (at := digests.to_merge(names, alive | broken, self._size)) is not None:
                older, newer = (DigestFile.read(self._home.digests(names[at + step])) for step in (0, 1))
                if older is None or newer is None:
                    broken.add(names[at])  # it stays: what newer files do not say is not known
                    continue
                self._write(names[at + 1], digests.merged(older, newer))
                reach("target.digests.merged")
                del names[at]
        except OSError as problem:
            _log.info("%s: files of digests are merged later: %s", record.name, problem)
        return attrs.evolve(record, digests=tuple(names)) if len(names) < len(record.digests) else record

    def _size(self, name: str) -> int:
        try:
            return self._home.digests(name).stat().st_size
        except OSError:
            return 0

    def of(self, record: Record, point: Point) -> dict[str, PointDigests]:
        """Of each disk of a point."""
        names, name = record.digests, point.stored.id
        names = names[: names.index(name) + 1] if name in names else ()
        files = [DigestFile.read(self._home.digests(name)) for name in names]
        return {disk_id: PointDigests(files, disk_id, size) for disk_id, size in point.stored.disks.items()}

    def begins(self, point_id: str) -> bool:
        """Whether a part of a point is the first that is read, or the first since digests were recorded."""
        with _collecting:
            return (self._home.path, point_id) not in _collected

    def collect(self, point_id: str, learned: Mapping[str, Blocks], read: int, *, last: bool) -> dict[str, Blocks]:
        """Add what was learned of a part of a point; returns what is to be recorded now."""
        key = (self._home.path, point_id)
        with _collecting:
            found = _collected.setdefault(key, _Collected())
            _collected.move_to_end(key)
            found.read += read
            for disk_id, blocks in learned.items():
                together = found.learned.setdefault(disk_id, Blocks(blocks.size))
                for run in blocks.runs:
                    together.put(*run)
            if last or found.read >= LEARN_EVERY:
                return _collected.pop(key).learned
            if len(_collected) > _MOST_COLLECTED:
                _collected.popitem(last=False)
            return {}

    def learn(self, record: Record, point_id: str, learned: Mapping[str, Blocks]) -> None:
        """Record digests of a point's blocks that had none, as they were read now."""
        point = record.point(point_id)
        if point is None:
            return
        known = self.of(record, point)  # it stays as it was recorded
        try:
            if point_id in record.digests:
                file = DigestFile.read(self._home.digests(point_id))
                disks = file.disks if file else {}
            elif point is record.head and not record.digests:
                disks = {disk: Blocks(size) for disk, size in point.stored.disks.items()}
            else:
                return  # cycles between it and the next file have none
            for disk_id, blocks in learned.items():
                if disk_id in disks and disks[disk_id].size == blocks.size:
                    for start, end, state, found in blocks.runs:
                        for first, last in unknown_runs(known[disk_id].look_up(_extent(start, end))):
                            part = found[first * DIGEST_SIZE : last * DIGEST_SIZE]
                            disks[disk_id].put(start + first, start + last, state, part)
            if not disks:
                return
            self._write(point_id, disks)
        except OSError as problem:
            _log.info("%s: digests that were read are not recorded: %s", record.name, problem)
            return
        reach("target.digests.learned")
        if point_id not in record.digests:
            self._home.save(attrs.evolve(record, digests=(point_id,)))


def _extent(start: int, end: int) -> Extent:
    return Extent(start * DIGEST_BLOCK, (end - start) * DIGEST_BLOCK)
