"""Scratch files of backups: where they are, and the deletion of those that a crash of the host left."""

from __future__ import annotations

import contextlib
import logging
import posixpath
from collections.abc import Callable, Iterable
from pathlib import Path

from asr_driver_libvirt.host import volumes
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.xml.domain import DiskKind, DomainDisk, DomainModel
from asr_driver_libvirt.xml.mark import CheckpointName

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


def sweep(host: LibvirtHost, model: DomainModel, in_use: str, ours: Callable[[str], bool]) -> list[str]:
    """Delete the vault's left-over scratch files of a machine, except those of the checkpoint `in_use`. `ours`: whether
    a checkpoint of that name is the vault's. Returns the paths of those that have no tag and are not certainly the
    vault's. Raises OSError, libvirtError."""
    prefixes: dict[str, list[str]] = {}
    unsure: list[str] = []
    for disk in model.hard_disks:
        if disk.kind is not DiskKind.OTHER and disk.path:
            directory, prefix = _place(host, disk, model.uuid)
            prefixes.setdefault(directory, []).append(prefix)
    for directory, starts in prefixes.items():
        found: list[tuple[str, str, Callable[[], object]]]
        if host.settings.local:
            found = [(file.name, str(file), file.unlink) for file in _files(Path(directory))]
            unsure += _delete(found, starts, in_use, ours)
        else:
            with contextlib.ExitStack() as stack:
                pool = volumes.pool_of(host.conn(), directory, stack)
                found = [(volume.name(), volume.path(), volume.delete) for volume in pool.listAllVolumes(0)]
                unsure += _delete(found, starts, in_use, ours)
    return sorted(unsure)


def _files(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _delete(
    found: Iterable[tuple[str, str, Callable[[], object]]],
    prefixes: list[str],
    in_use: str,
    ours: Callable[[str], bool],
) -> list[str]:
    """`found`: name, path and what deletes it. Returns what is left, having no tag."""
    unsure = []
    for name, path, delete in found:
        for prefix in prefixes:
            ending = name.removeprefix(prefix + ".")
            checkpoint = None if ending in (name, in_use) else CheckpointName.parse(ending)
            if checkpoint is None:
                continue
            if ours(ending):
                _log.info("deleting left-over scratch file %s", path)
                with contextlib.suppress(FileNotFoundError):
                    delete()
            elif not checkpoint.owner:
                unsure.append(path)
            break
    return unsure
