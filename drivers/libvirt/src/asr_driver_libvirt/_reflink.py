"""Replicas of kind `reflink`: a raw sparse head per disk, kept points are clones that share its blocks.

To clone a file and to remove the clone costs time for each of the file's extents, and every small write to a head that
is shared makes more of them. So a replica with a head of very many becomes one of kind `chain` with the heads as its
bases: its points so far stay clones, later ones are layers, which cost what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs

from asr_driver_libvirt import _raw
from asr_driver_libvirt._files import clone_file, count_extents, fsync_directory
from asr_driver_libvirt._journal import Change, Kind, file_stem
from asr_driver_libvirt._store import FORMAT, Images, Layer, Record, ReplicaKind
from asrcore.crashpoint import reach
from asrcore.driver import DiskReader
from asrcore.model.extent import Extent
from asrcore.model.watch import Watch

__all__ = ["MOST_EXTENTS", "ReflinkImages"]

MOST_EXTENTS = 10_000
"""Of a head. XFS took 30-90 us for each: a kept point of 20,000 cost 1.8 s with the source frozen, a layer 0.1 s."""
_BLOCK = 4096  # blocks are shared whole: what is not aligned to them is copied


class ReflinkImages(Images):
    """See `Images`. Nothing but the journal ever writes a head, and nothing at all a clone."""

    def create(self, record: Record, disk_id: str, size: int) -> Record:
        name = f"images/{file_stem(disk_id)}.{record.next:06d}.raw"
        _raw.create(self.home.path / name, size)
        return attrs.evolve(record, next=record.next + 1, heads={**record.heads, disk_id: name})

    def open_heads(self, record: Record, disks: Mapping[str, int]) -> Record:
        for disk_id, size in disks.items():
            if disk_id in record.heads:
                _raw.grow(self.home.path / record.heads[disk_id], size)
            else:
                record = self.create(record, disk_id, size)
        return record

    def apply(self, image: str, changes: Sequence[Change], data: Path) -> None:
        _raw.apply(self.home.path / image, changes, data)

    def cost(self, record: Record, changes: Sequence[Change]) -> int:
        # Shared blocks take no space; each extent may have two unaligned ends and needs its place in the map.
        return 3 * _BLOCK * sum(change.kind in (Kind.DATA, Kind.ZERO) for change in changes)

    def keep(self, point_id: str, heads: Mapping[str, str]) -> Mapping[str, str]:
        directory = self.home.point(point_id)
        images = {}
        for disk_id, head in heads.items():
            path = directory / f"{file_stem(disk_id)}.raw"
            clone_file(self.home.path / head, path)
            images[disk_id] = str(path.relative_to(self.home.path))
            reach("target.keep.cloned")
        fsync_directory(directory)
        return images

    def tidy(self, record: Record, watch: Watch | None = None) -> Record:
        if all(count_extents(self.home.path / head) <= MOST_EXTENTS for head in record.heads.values()):
            return record
        bases = {
            head: Layer(disk_id, None, (self.home.path / head).stat().st_size) for disk_id, head in record.heads.items()
        }
        return attrs.evolve(record, kind=ReplicaKind.CHAIN, layers=bases, format=FORMAT)

    def free(self, record: Record, save: Callable[[Record], None], watch: Watch | None = None) -> Record:
        self.home.sweep(record)
        return record

    def allocated(self, image: str, extent: Extent) -> list[Extent]:
        return _raw.allocated(self.home.path / image, extent)

    def reader(self, find: Callable[[], str], replica_id: str) -> DiskReader:
        return _raw.RawReader(self.home.path, find, self.shared, replica_id)

    def layer_count(self, record: Record) -> int:
        return 1
