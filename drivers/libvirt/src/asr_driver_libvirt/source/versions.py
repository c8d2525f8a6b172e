"""Images of qcow2 version 2 (`compat=0.10`): they cannot hold bitmaps, and the domain's definition does not say so."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import attrs
import libvirt

from asr_driver_libvirt.host import volumes
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.xml.domain import DiskKind, DomainDisk, parse_xml
from asr_storage.qemu import img
from asr_storage.qemu.process import QemuError
from asrcore.errors import AsrError

__all__ = ["REFUSAL", "marked"]

REFUSAL = "qcow2 v2"
"""In QEMU's message when a bitmap is to be kept in such an image."""
_OLD = "0.10"


def marked(host: LibvirtHost, disks: Sequence[DomainDisk]) -> list[DomainDisk]:
    """The disks, those with such images marked as `old`. What cannot be read counts as new. Raises SiteUnreachable."""
    return [attrs.evolve(disk, old=_compat(host, disk) == _OLD) for disk in disks]


def _compat(host: LibvirtHost, disk: DomainDisk) -> str:
    if disk.format != "qcow2" or disk.kind is DiskKind.OTHER or not disk.path:
        return ""
    if host.settings.local:
        with contextlib.suppress(QemuError, AsrError, OSError):
            return img.info(Path(disk.path), "qcow2", in_use=True).compat
        return ""
    with contextlib.suppress(libvirt.libvirtError), contextlib.ExitStack() as stack:
        file = volumes.volume(host.conn(), disk.path, stack)
        target = parse_xml(file.XMLDesc(0)).find("target")
        # libvirt 9.0 names the version of a newer image only.
        if target is not None and target.find("format[@type='qcow2']") is not None:
            return target.findtext("compat") or _OLD
    return ""
