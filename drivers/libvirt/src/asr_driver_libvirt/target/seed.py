"""A replica's first content from a stopped machine of the site whose disks resemble the source's."""

from __future__ import annotations

import os
from pathlib import Path

import attrs

from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.xml.domain import DiskKind, DomainDisk, parse_domain
from asr_storage.files.durable import fsync_directory
from asr_storage.files.sparse import SparseFile, clone_file, rounded
from asr_storage.nbd.status import BASE_ALLOCATION
from asr_storage.qemu.nbd_server import QemuNbd
from asr_storage.replica.chain import qemu_errors
from asr_storage.replica.store import Home, Record, ReplicaKind
from asrcore.crashpoint import reach
from asrcore.errors import DriverFailed, WrongState
from asrcore.model.extent import Extent, clip, normalise, split, total
from asrcore.model.watch import Watch
from asrcore.units import MiB

__all__ = ["copy_image", "seed", "seed_disk"]

_COPY = 4 * MiB
_READS_AS_ZERO = 2
_NBD_SECONDS = 60.0


def seed(host: LibvirtHost, home: Home, record: Record, watch: Watch) -> Record:
    """Copy the disks that are not seeded yet; the record as saved. Disks that the machine lacks stay empty.

    Raises MachineNotFound, WrongState when it is not off, Cancelled (disks that are done stay done).
    """
    assert record.seed is not None
    domain = host.domain(record.seed)
    with host.guard("reading the machine to seed from", record.seed):
        if domain.isActive():
            raise WrongState(
                machine=domain.name(),
                event="seed a replica",
                state="running",
                reason="Its disks change while they are copied.",
                possible="shut it down first",
            )
        model = parse_domain(domain.XMLDesc())
    theirs = {disk.id: disk for disk in model.hard_disks if disk.path}
    for disk_id, head in record.heads.items():
        if disk_id in record.seeded:
            continue
        disk = theirs.get(disk_id)
        if disk is not None:
            seed_disk(host.name, disk, home.path / head, record.disks[disk_id], record.kind, watch)
        reach("target.seed.disk")
        record = attrs.evolve(record, seeded=(*record.seeded, disk_id))
        home.save(record)
    return record


def seed_disk(site: str, disk: DomainDisk, head: Path, size: int, kind: ReplicaKind, watch: Watch) -> None:
    """Make the content of one disk that of a head, in its size; the head is replaced when the copy is complete."""
    if disk.kind is DiskKind.OTHER:
        detail = f"disk {disk.id} is of type {disk.source_type}, which cannot be copied"
        raise DriverFailed(operation="seeding a replica", site=site, detail=detail)
    source, fmt = Path(disk.path), disk.format or "raw"
    building = head.with_name(head.name + ".seed")
    building.unlink(missing_ok=True)
    cloned = False
    if fmt == "raw" and disk.kind is DiskKind.FILE and kind is ReplicaKind.REFLINK:
        try:
            clone_file(source, building)
            cloned = True
        except OSError:  # another file system, most likely: copied below, which reports any other problem
            building.unlink(missing_ok=True)
    if not cloned:
        copy_image(source, fmt, building, size, watch)
    os.truncate(building, rounded(size))
    fd = os.open(building, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    building.rename(head)
    fsync_directory(head.parent)


def copy_image(source: Path, fmt: str, target: Path, size: int, watch: Watch) -> None:
    """Copy the first `size` bytes of an image with all its layers to a new sparse raw file, holes kept.

    Not synced. Raises OSError, Cancelled.
    """
    file = SparseFile(target, write=True)
    try:
        file.grow(rounded(size))
        with (
            qemu_errors(source),
            QemuNbd(source, fmt) as server,
            server.connect(contexts=[BASE_ALLOCATION], timeout=_NBD_SECONDS) as client,
        ):
            status = client.block_status(0, client.size) if client.size else iter(())
            stored = (Extent(i.offset, i.length) for i in status if not i.flags & _READS_AS_ZERO)
            wanted = clip(normalise(stored), min(size, client.size))
            watch.start(f"copying {source.name}", total(wanted))
            buffer = bytearray(_COPY)
            for piece in split(wanted, _COPY):
                view = memoryview(buffer)[: piece.length]
                client.read_into(view, piece.offset)
                file.write(piece.offset, view)
                watch.advance(piece.length)
        file.sync()
    finally:
        file.close()
