"""Scratch files of backups: where they are, and the deletion of those that a crash of the host left."""

from __future__ import annotations

import contextlib
import logging
import posixpath
from collections.abc import Iterable
from pathlib import Path

import libvirt

from asr_driver_libvirt.host import volumes
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.xml.domain import DiskKind, DomainDisk, DomainModel
from asr_driver_libvirt.xml.mark import is_ours

__all__ = ["path", "places", "sweep"]

_log = logging.getLogger(__name__)
# Where QEMU may write on every distribution, for disks that are devices and have no directory.
_DEVICE_DIRECTORY = "/var/lib/libvirt/images"


def path(host: LibvirtHost, disk: DomainDisk, machine_id: str, name: str) -> str:
    """Beside the disk (same space, same access rights) unless the site's settings name a directory.

    libvirt deletes the file with the job; after a crash of the host the name says whose it is.
    """
    directory, prefix = _place(host, disk, machine_id)
    return posixpath.join(directory, f"{prefix}.{name}")


def places(host: LibvirtHost, disks: Iterable[DomainDisk], machine_id: str) -> list[str]:
    """The directories of `path`."""
    return sorted({_place(host, disk, machine_id)[0] for disk in disks})


def _place(host: LibvirtHost, disk: DomainDisk, machine_id: str) -> tuple[str, str]:
    if not host.settings.scratch_dir and disk.kind is DiskKind.FILE:
        return posixpath.split(disk.path)
    return host.settings.scratch_dir or _DEVICE_DIRECTORY, f"{machine_id}-{disk.id}"


def sweep(host: LibvirtHost, model: DomainModel, in_use: str) -> None:
    """Delete left-over scratch files of a machine, except those of the checkpoint `in_use`. Raises OSError,
    libvirtError."""
    prefixes: dict[str, list[str]] = {}
    for disk in model.hard_disks:
        if disk.kind is not DiskKind.OTHER and disk.path:
            directory, prefix = _place(host, disk, model.uuid)
            prefixes.setdefault(directory, []).append(prefix)
    for directory, starts in prefixes.items():
        if host.settings.local:
            _sweep_local(Path(directory), starts, in_use, host.settings.owner)
        else:
            _sweep_remote(host.conn(), directory, starts, in_use, host.settings.owner)


def _left_over(name: str, prefixes: list[str], in_use: str, owner: str) -> bool:
    for prefix in prefixes:
        ending = name.removeprefix(prefix + ".")
        if ending != name and is_ours(ending, owner) and ending != in_use:
            return True
    return False


def _sweep_local(directory: Path, prefixes: list[str], in_use: str, owner: str) -> None:
    if not directory.is_dir():
        return
    for file in directory.iterdir():
        if _left_over(file.name, prefixes, in_use, owner):
            _log.info("deleting left-over scratch file %s", file)
            file.unlink(missing_ok=True)


def _sweep_remote(conn: libvirt.virConnect, directory: str, prefixes: list[str], in_use: str, owner: str) -> None:
    with contextlib.ExitStack() as stack:
        for volume in volumes.pool_of(conn, directory, stack).listAllVolumes(0):
            if _left_over(volume.name(), prefixes, in_use, owner):
                _log.info("deleting left-over scratch file %s", volume.path())
                volume.delete(0)
