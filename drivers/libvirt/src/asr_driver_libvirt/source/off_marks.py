"""Ending change tracking in a machine that is off. libvirt deletes bitmaps only of running machines, and refuses to
undefine a machine with checkpoints; after the end of protection no later call would find it running."""

from __future__ import annotations

import logging
import posixpath
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import libvirt

from asr_driver_libvirt.host import paused
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.source import backup_jobs
from asr_driver_libvirt.source.ours import Ours
from asr_driver_libvirt.xml.domain import DiskKind, DomainDisk, DomainModel
from asr_storage.qemu import img
from asr_storage.qemu.process import QemuError
from asrcore.errors import HostIncomplete, MarksLeft

__all__ = ["end_tracking", "left"]

_log = logging.getLogger(__name__)


def end_tracking(host: LibvirtHost, domain: libvirt.virDomain, model: DomainModel, ours: Ours) -> None:
    """Delete this vault's checkpoints and bitmaps: in the images where they are this host's files, else while the
    machine is held for about two seconds. Raises MarksLeft, libvirtError."""
    checkpoints = backup_jobs.our_checkpoints(domain, ours)
    names = [checkpoint.getName() for checkpoint in checkpoints]
    if host.settings.local:
        try:
            for disk in model.hard_disks:
                _clear(disk, names, ours)
            # Last: a checkpoint without bitmaps is found again by a later call, bitmaps without a checkpoint are not.
            for checkpoint in checkpoints:
                checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        except (QemuError, HostIncomplete) as problem:
            _log.info("bitmaps of %s cannot be deleted in its images: %s", model.name, problem)
        else:
            return
    if not checkpoints:
        return
    try:
        paused.hold(domain, host.settings.owner)
        try:
            for checkpoint in checkpoints:
                backup_jobs.delete_checkpoint(checkpoint)
        finally:
            paused.release(domain, host.settings.owner)
    except (libvirt.libvirtError, ValueError) as problem:
        raise left(host, model, names, str(problem), active=False) from problem


def left(host: LibvirtHost, model: DomainModel, names: Sequence[str], detail: str, *, active: bool) -> MarksLeft:
    """The error for checkpoints of these names that stay, with the commands that delete them."""
    machine = shlex.quote(model.name)
    commands = [f"`virsh checkpoint-delete {machine} {name}{'' if active else ' --metadata'}`" for name in names]
    if not active:
        files = [shlex.quote(disk.path) for disk in model.hard_disks if disk.tracked]
        commands += [f"`qemu-img bitmap --remove {file} {name}`" for file in files for name in names]
    return MarksLeft(
        machine=model.name, site=host.name, marks=", ".join(names), detail=detail, commands=", ".join(commands)
    )


def _clear(disk: DomainDisk, names: Sequence[str], ours: Ours) -> None:
    if not disk.tracked or disk.kind is DiskKind.OTHER:
        return
    top = Path(disk.path)
    for layer in _layers(top, disk.format):
        for bitmap in img.info(layer, "qcow2").bitmaps:
            # A layer below may be the image of another machine, too (a template), with bitmaps of that one.
            if bitmap.name in names or (layer == top and ours(bitmap.name)):
                img.remove_bitmap(layer, bitmap.name)


def _layers(image: Path, fmt: str) -> Iterator[Path]:
    """The image's qcow2 layers, the uppermost first: a snapshot made later left the former bitmaps below."""
    while fmt == "qcow2":
        yield image
        info = img.info(image, fmt)
        if info.full_backing_file is None or info.backing_format is None:
            return
        image, fmt = Path(posixpath.join(image.parent, info.full_backing_file)), info.backing_format
