"""Replicas of kind `reflink`: a raw sparse head per disk, kept points are clones that share its blocks.

The newest point consists of the heads themselves, kept or not. A kept one gets its clones before anything writes the
heads again, at the latest when the next cycle is applied: not while the source waits for its own cycle to be sealed.

Cloning a file and deleting the clone takes time for each of the file's extents, and every small write to a shared head
adds extents. So a replica with a head of very many extents becomes one of kind `chain` with the heads as its bases: its
existing points stay clones, later ones are layers, whose cost depends only on what they hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs

from asr_storage.files.durable import fsync_directory
from asr_storage.files.sparse import clone_file, count_extents
from asr_storage.replica import raw
from asr_storage.replica.journal import Change, Kind, file_stem
from asr_storage.replica.store import FORMAT, Images, Layer, Point, Record, ReplicaKind
from asrcore.crashpoint import reach
from asrcore.driver import DiskReader
from asrcore.model.extent import Extent
from asrcore.model.watch import Watch

__all__ = ["MOST_EXTENTS", "ReflinkImages"]

_log = logging.getLogger(__name__)

MOST_EXTENTS = 10_000
"""Extents of a head. XFS took 30-90 us for each: a kept point of 20,000 took 1.8 s with the source frozen, a layer 0.1
s."""
_BLOCK = 4096  # blocks are shared whole: what is not aligned to them is copied


class ReflinkImages(Images):
    """See `Images`. Only the journal writes a head, and nothing writes a clone."""

    def create(self, record: Record, disk_id: str, size: int) -> Record:
        name = f"images/{file_stem(disk_id)}.{record.next:06d}.raw"
        raw.create(self.home.path / name, size)
        return attrs.evolve(record, next=record.next + 1, heads={**record.heads, disk_id: name})

    def open_heads(self, record: Record, disks: Mapping[str, int]) -> Record:
        record = self.preserve(record)
        for disk_id, size in disks.items():
            if disk_id in record.heads:
                raw.grow(self.home.path / record.heads[disk_id], size)
            else:
                record = self.create(record, disk_id, size)
        return record

    def apply(self, image: str, changes: Sequence[Change], data: Path) -> None:
        raw.apply(self.home.path / image, changes, data)

    def cost(self, record: Record, changes: Sequence[Change]) -> int:
        # Shared blocks take no space; each extent may have two unaligned ends and needs its place in the map.
        return 3 * _BLOCK * sum(change.kind in (Kind.DATA, Kind.ZERO) for change in changes)

    def to_preserve(self, record: Record) -> bool:
        point = record.head
        return point is not None and point.stored.kept and any(map(_is_head, point.images.values()))

    def preserve(self, record: Record) -> Record:
        if not self.to_preserve(record):
            return record
        self.preserve_ahead(record)
        point = record.points[-1]
        images = {disk_id: str(self._clone(point, disk_id).relative_to(self.home.path)) for disk_id in point.images}
        return attrs.evolve(record, points=(*record.points[:-1], attrs.evolve(point, images=images)))

    def preserve_ahead(self, record: Record) -> None:
        point = record.points[-1]
        with self.shared.cloning:
            for disk_id, image in point.images.items():
                clone = self._clone(point, disk_id)
                # It gets its name only when it is complete, and the head is not written meanwhile.
                if _is_head(image) and not clone.exists():
                    building = clone.with_name(clone.name + ".new")
                    clone_file(self.home.path / image, building)
                    building.rename(clone)
                    reach("target.keep.cloned")
            fsync_directory(self.home.point(point.stored.id))

    def _clone(self, point: Point, disk_id: str) -> Path:
        return self.home.point(point.stored.id) / f"{file_stem(disk_id)}.raw"

    def tidy(self, record: Record, watch: Watch | None = None) -> Record:
        if all(count_extents(self.home.path / head) <= MOST_EXTENTS for head in record.heads.values()):
            try:
                return self.preserve(record)
            except OSError as problem:  # a full disk, say: it is tried again before the heads are written
                _log.info("%s: %s", record.name, problem)
                return record
        bases = {
            head: Layer(disk_id, None, (self.home.path / head).stat().st_size) for disk_id, head in record.heads.items()
        }
        return attrs.evolve(record, kind=ReplicaKind.CHAIN, layers=bases, format=FORMAT)

    def free(self, record: Record, save: Callable[[Record], None], watch: Watch | None = None) -> Record:
        self.home.sweep(record)
        return record

    def allocated(self, image: str, extent: Extent) -> list[Extent]:
        return raw.allocated(self.home.path / image, extent)

    def reader(self, find: Callable[[], str], replica_id: str) -> DiskReader:
        return raw.RawReader(self.home.path, find, self.shared, replica_id)

    def layer_count(self, record: Record) -> int:
        return 1


def _is_head(image: str) -> bool:
    return image.startswith("images/")
