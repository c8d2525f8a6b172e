"""The XML of pull-mode backups and checkpoints. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
from lxml import etree

from asr_driver_libvirt.xml.domain import parse_xml
from asr_driver_libvirt.xml.mark import CheckpointName

__all__ = [
    "BackupDisk",
    "NbdServer",
    "RunningBackup",
    "backup_xml",
    "bitmap_sizes",
    "checkpoint_description",
    "checkpoint_domain",
    "checkpoint_xml",
    "parse_backup",
    "redefine_xml",
]


@attrs.frozen
class NbdServer:
    """Where QEMU serves a backup: a unix socket, or TCP (with TLS or without)."""

    socket: str = ""
    host: str = ""
    port: int = 0
    tls: bool = False


@attrs.frozen
class BackupDisk:
    """A disk of a backup. `base`: checkpoint whose bitmap has the changes ("": all of it). `tracked`: the new
    checkpoint gets a bitmap in it. `scratch`: file at the host that keeps what the guest overwrites meanwhile."""

    id: str
    scratch: str
    base: str = ""
    tracked: bool = False


def backup_xml(server: NbdServer, disks: Iterable[BackupDisk]) -> str:
    """For virDomainBackupBegin. Disks that are not named are left out."""
    root = etree.Element("domainbackup", mode="pull")
    if server.socket:
        etree.SubElement(root, "server", transport="unix", socket=server.socket)
    else:
        place = etree.SubElement(root, "server", transport="tcp", name=server.host, port=str(server.port))
        if server.tls:
            place.set("tls", "yes")
    listed = etree.SubElement(root, "disks")
    for disk in disks:
        element = etree.SubElement(listed, "disk", name=disk.id, backup="yes", type="file")
        if disk.base:
            element.set("backupmode", "incremental")
            element.set("incremental", disk.base)
        else:
            element.set("backupmode", "full")
        # Without a name given here libvirt 9.0 fails: "argument key 'filename' must not have null value".
        etree.SubElement(element, "scratch", file=disk.scratch)
    return etree.tostring(root, encoding="unicode")


def checkpoint_xml(name: str, disks: Iterable[BackupDisk], description: str) -> str:
    """A checkpoint with a bitmap of its name in each tracked disk."""
    root = etree.Element("domaincheckpoint")
    etree.SubElement(root, "name").text = name
    etree.SubElement(root, "description").text = description
    listed = etree.SubElement(root, "disks")
    for disk in disks:
        # libvirt refuses the whole checkpoint when it names a raw disk, so each disk is named with what to do.
        etree.SubElement(listed, "disk", name=disk.id, checkpoint="bitmap" if disk.tracked else "no")
    return etree.tostring(root, encoding="unicode")


def redefine_xml(name: str, disk_ids: Sequence[str], domain_xml: str, created: int) -> str:
    """Restores a checkpoint whose bitmaps exist but which libvirt forgot (it does when a machine is renamed and
    the daemon restarts, or when the machine is undefined and defined again)."""
    root = etree.Element("domaincheckpoint")
    etree.SubElement(root, "name").text = name
    etree.SubElement(root, "creationTime").text = str(created)
    listed = etree.SubElement(root, "disks")
    for disk_id in disk_ids:
        etree.SubElement(listed, "disk", name=disk_id, checkpoint="bitmap", bitmap=name)
    root.append(parse_xml(domain_xml))
    return etree.tostring(root, encoding="unicode")


def bitmap_sizes(xml: str) -> set[str]:
    """Ids of the disks whose bitmaps are whole, from a checkpoint's XML with sizes.

    libvirt leaves the size out where the bitmap is missing or inconsistent (a killed QEMU): so each disk is judged
    without starting anything.
    """
    disks = parse_xml(xml).findall("disks/disk[@checkpoint='bitmap']")
    return {disk.get("name", "") for disk in disks if disk.get("size") is not None}


def checkpoint_description(xml: str) -> str:
    """The text that the driver stored in a checkpoint."""
    return parse_xml(xml).findtext("description") or ""


def checkpoint_domain(xml: str) -> str:
    """The domain's definition at the time of the checkpoint; "" when the XML was asked for without."""
    element = parse_xml(xml).find("domain")
    return "" if element is None else etree.tostring(element, encoding="unicode")


@attrs.frozen
class RunningBackup:
    """A machine's backup job as libvirt reports it. `name` is None when it is another application's."""

    name: CheckpointName | None
    server: NbdServer
    disk_ids: tuple[str, ...]


def parse_backup(xml: str) -> RunningBackup:
    """Read a job's XML. It is this driver's when all its scratch files end in one of its names: after a restart of
    libvirtd the XML no longer has export names or bitmaps, only these."""
    root = parse_xml(xml)
    disks = root.findall("disks/disk[@backup='yes']")
    names = {_ending(disk.find("scratch")) for disk in disks}
    name = CheckpointName.parse(names.pop()) if len(names) == 1 else None
    place = root.find("server")
    server = NbdServer()
    if place is not None:
        server = NbdServer(
            socket=place.get("socket", ""),
            host=place.get("name", ""),
            port=int(place.get("port", "0")),
            tls=place.get("tls") == "yes",
        )
    return RunningBackup(name, server, tuple(disk.get("name", "") for disk in disks))


def _ending(scratch: etree._Element | None) -> str:
    file = "" if scratch is None else scratch.get("file", "")
    start = file.rfind(".asr-")
    return file[start + 1 :] if start >= 0 else ""
