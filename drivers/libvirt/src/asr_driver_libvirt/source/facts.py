"""Facts of a machine at its host, gathered for the readiness checks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import attrs
import libvirt

from asr_driver_libvirt.host import stalled
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.host.nvram import NvramReader
from asr_driver_libvirt.source import backup_jobs, scratch, versions
from asr_driver_libvirt.source.ours import Ours
from asr_driver_libvirt.source.space import Space, SpaceMeter
from asr_driver_libvirt.xml.domain import DiskKind, DomainModel, parse_domain
from asr_driver_libvirt.xml.mark import CheckpointName
from asr_storage.qemu import img
from asr_storage.qemu.img import ImageInfo
from asr_storage.qemu.process import QemuError
from asrcore.errors import AsrError

__all__ = ["SourceFacts", "gather"]


@attrs.frozen
class SourceFacts:
    """`images`: what the headers of local image files say, by disk id; empty for a remote host. `nvram_readable`:
    None for a machine without UEFI variables. `missing`: disks whose image the host cannot open. `other_vaults`:
    checkpoints of other vaults; `foreign_checkpoints`: those of other applications. `old_images`: disks of qcow2
    version 2. `scratch`: the places of scratch files whose free space is known, each with the size of the disks that
    use it (bytes). `halted`: the I/O error for which QEMU paused the machine."""

    model: DomainModel
    active: bool
    persistent: bool = True
    autostart: bool = False
    snapshots: int = 0
    foreign_checkpoints: tuple[str, ...] = ()
    other_vaults: tuple[str, ...] = ()
    foreign_backup: bool = False
    managed_save: bool = False
    block_jobs: tuple[str, ...] = ()
    images: Mapping[str, ImageInfo] = attrs.field(factory=dict)
    old_images: tuple[str, ...] = ()
    missing: Mapping[str, str] = attrs.field(factory=dict)
    nvram_readable: bool | None = None
    local: bool = True
    nbd_in_the_clear: bool = False
    libvirt_version: int = 9_000_000
    scratch: tuple[tuple[Space, int], ...] = ()
    halted: str = ""


def gather(
    host: LibvirtHost, domain: libvirt.virDomain, nvram: NvramReader, meter: SpaceMeter, ours: Ours
) -> SourceFacts:
    """Ask the host. Raises libvirtError, SiteUnreachable."""
    active = domain.isActive() == 1
    model = parse_domain(domain.XMLDesc(0 if active else libvirt.VIR_DOMAIN_XML_INACTIVE))
    backup = backup_jobs.current_backup(domain) if active else None
    names = [checkpoint.getName() for checkpoint in domain.listAllCheckpoints(0)]
    missing: dict[str, str] = {}
    needs: Counter[str] = Counter()
    for disk in model.hard_disks:
        try:
            size = domain.blockInfo(disk.id)[0]
            for place in scratch.places(host, [disk], model.uuid):
                needs[place] += size
        except libvirt.libvirtError as error:
            missing[disk.id] = error.get_error_message() or str(error)
    return SourceFacts(
        model=model,
        active=active,
        persistent=domain.isPersistent() == 1,
        autostart=domain.isPersistent() == 1 and domain.autostart() == 1,
        snapshots=domain.snapshotNum(0),
        foreign_checkpoints=tuple(name for name in names if CheckpointName.parse(name) is None),
        other_vaults=tuple(backup_jobs.checkpoints_of_others(domain, ours)),
        foreign_backup=backup is not None
        and (backup.name is None or not backup_jobs.is_our_backup(domain, backup.name, ours)),
        managed_save=domain.hasManagedSaveImage(0) == 1,
        block_jobs=tuple(_block_jobs(domain, model)) if active and backup is None else (),
        images=_images(model) if host.settings.local else {},
        old_images=tuple(disk.id for disk in versions.marked(host, model.hard_disks) if disk.old),
        missing=missing,
        nvram_readable=nvram.read(model.nvram) is not None if model.nvram else None,
        local=host.settings.local,
        nbd_in_the_clear=host.settings.nbd.tcp and host.settings.nbd_tls is None and not _loopback(host),
        libvirt_version=host.conn().getLibVersion(),
        halted=stalled.why(domain) if active else "",
        scratch=tuple((space, size) for place, size in needs.items() if (space := meter.look(place)) is not None),
    )


def _block_jobs(domain: libvirt.virDomain, model: DomainModel) -> list[str]:
    busy = []
    for disk in model.hard_disks:
        with contextlib.suppress(libvirt.libvirtError):
            if domain.blockJobInfo(disk.id, 0):
                busy.append(disk.id)
    return busy


def _images(model: DomainModel) -> dict[str, ImageInfo]:
    found = {}
    for disk in model.hard_disks:
        if disk.kind is not DiskKind.OTHER and disk.format in ("qcow2", "raw"):
            with contextlib.suppress(QemuError, AsrError, OSError):
                found[disk.id] = img.info(Path(disk.path), disk.format, in_use=True)
    return found


def _loopback(host: LibvirtHost) -> bool:
    return host.settings.nbd.host in ("localhost", "::1") or host.settings.nbd.host.startswith("127.")
