"""Domain definitions read as values. Pure: XML in, values out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum

import attrs
from lxml import etree

from asrcore.driver import Fence
from asrcore.model.machine import Disk, Firmware, Machine, Nic, PowerState

__all__ = [
    "FENCE_URI",
    "METADATA_URI",
    "DiskKind",
    "DomainDisk",
    "DomainModel",
    "fence_from_xml",
    "fence_xml",
    "machine_of",
    "parse_domain",
    "parse_xml",
]

METADATA_URI = "https://asrcore.dev/xmlns/libvirt/1.0"
# libvirt keeps one metadata element per URI, so each kind of record has a separate one.
FENCE_URI = METADATA_URI + "/fence"
"""XML namespace of what the driver keeps in a domain's <metadata>."""

AGENT_CHANNEL = "org.qemu.guest_agent.0"
_SIZES = {"b": 1, "bytes": 1, "KB": 1000, "k": 1024, "KiB": 1024, "MB": 1000**2, "M": 1024**2, "MiB": 1024**2}
_SIZES |= {"GB": 1000**3, "G": 1024**3, "GiB": 1024**3, "TB": 1000**4, "T": 1024**4, "TiB": 1024**4}


class DiskKind(Enum):
    """What backs a disk."""

    FILE = "file"
    BLOCK = "block"
    OTHER = "other"
    """Network storage, NVMe, vhost-user, storage volumes by name, directories."""


@attrs.frozen
class DomainDisk:
    """A <disk> with what matters to replication. `device`: disk, cdrom, floppy or lun."""

    id: str
    device: str
    kind: DiskKind
    source_type: str
    path: str
    format: str
    bus: str
    read_only: bool = False
    shareable: bool = False
    transient: bool = False
    encrypted: bool = False
    sliced: bool = False
    data_file: bool = False
    mirrored: bool = False
    sector_size: int = 512
    old: bool = False
    """Its image is of qcow2 version 2. The definition does not say so: see `source.versions`."""

    @property
    def hard_disk(self) -> bool:
        """A disk of the machine, as opposed to a medium in a drive."""
        return self.device in ("disk", "lun")

    @property
    def tracked(self) -> bool:
        """Whether QEMU can keep a persistent dirty bitmap in it."""
        return self.format == "qcow2" and not self.old


@attrs.frozen
class DomainModel:
    """A domain as defined (or as running)."""

    uuid: str
    name: str
    type: str
    title: str
    cpus: int
    memory: int
    firmware: Firmware
    secure_boot: bool
    nvram: str
    disks: tuple[DomainDisk, ...]
    nics: tuple[Nic, ...]
    os: str
    cpu_mode: str
    tpm: bool
    host_devices: tuple[str, ...]
    shared_folders: tuple[str, ...]
    nvdimms: int
    shared_memory: bool
    launch_security: bool
    direct_kernel: bool
    agent_channel: bool
    agent_connected: bool
    media: tuple[str, ...]

    @property
    def hard_disks(self) -> tuple[DomainDisk, ...]:
        """Without CD-ROM and floppy drives."""
        return tuple(disk for disk in self.disks if disk.hard_disk)


def parse_xml(xml: str | bytes) -> etree._Element:
    """The root element; nothing outside of the text is ever loaded. ValueError when it is not XML."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, remove_blank_text=False)
    data = xml.encode() if isinstance(xml, str) else xml
    try:
        return etree.fromstring(data, parser)
    except etree.XMLSyntaxError as problem:
        raise ValueError(f"not XML: {problem}") from problem


def parse_domain(xml: str | bytes) -> DomainModel:
    """Read a domain's XML. ValueError when it is not a domain's."""
    root = parse_xml(xml)
    if root.tag != "domain":
        raise ValueError(f"<{root.tag}> is not a domain")
    disks = tuple(_disk(element) for element in root.findall("devices/disk"))
    return DomainModel(
        uuid=_text(root, "uuid"),
        name=_text(root, "name"),
        type=root.get("type", ""),
        title=_text(root, "title"),
        cpus=int(_text(root, "vcpu") or 1),
        memory=_memory(root),
        firmware=Firmware.UEFI if _uefi(root) else Firmware.BIOS,
        secure_boot=root.find("os/loader[@secure='yes']") is not None,
        nvram=_nvram(root),
        disks=disks,
        nics=tuple(_nic(element) for element in root.findall("devices/interface")),
        os=_os(root),
        cpu_mode=_attribute(root, "cpu", "mode"),
        tpm=root.find("devices/tpm") is not None,
        host_devices=tuple(_host_devices(root)),
        shared_folders=tuple(_attribute(item, "target", "dir") or "?" for item in root.findall("devices/filesystem")),
        nvdimms=sum(item.get("model") in ("nvdimm", "virtio-pmem") for item in root.findall("devices/memory")),
        shared_memory=root.find("devices/shmem") is not None,
        launch_security=root.find("launchSecurity") is not None,
        direct_kernel=root.find("os/kernel") is not None,
        agent_channel=_agent(root) is not None,
        agent_connected=_agent(root) == "connected",
        media=tuple(disk.id for disk in disks if not disk.hard_disk and disk.path),
    )


def machine_of(model: DomainModel, sizes: Mapping[str, int], power: PowerState) -> Machine:
    """The hypervisor-neutral value. `sizes`: bytes by disk id; a disk without one counts 0."""
    return Machine(
        id=model.uuid,
        name=model.name,
        cpus=model.cpus,
        memory=model.memory,
        firmware=model.firmware,
        disks=tuple(neutral_disk(disk, sizes.get(disk.id, 0)) for disk in model.hard_disks),
        nics=model.nics,
        power=power,
        os=model.os,
        secure_boot=model.secure_boot,
        tpm=model.tpm,
    )


def neutral_disk(disk: DomainDisk, size: int) -> Disk:
    """One disk of the neutral value."""
    return Disk(
        id=disk.id, size=size, format=disk.format, bus=disk.bus, location=disk.path, sector_size=disk.sector_size
    )


# -- fence ---------------------------------------------------------------------------------------------------------


def fence_xml(fence: Fence) -> str:
    """The element kept in the domain's metadata."""
    element = etree.Element("fence", epoch=str(fence.epoch), reason=_printable(fence.reason))
    return etree.tostring(element, encoding="unicode")


def fence_from_xml(xml: str) -> Fence | None:
    """The fence in such an element; one that cannot be read counts as a fence that no epoch releases: releasing by
    mistake is the worse error."""
    try:
        element = parse_xml(xml)
    except ValueError:
        return Fence(epoch=2**62, reason="the record of the fence is damaged")
    if etree.QName(element).localname != "fence":
        return None
    text = element.get("epoch", "")
    epoch = int(text) if text.isascii() and text.isdigit() else 2**62
    return Fence(epoch=epoch, reason=element.get("reason", ""))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


# -- parts ----------------------------------------------------------------------------------------------------------


def _text(root: etree._Element, path: str) -> str:
    return (root.findtext(path) or "").strip()


def _attribute(root: etree._Element, path: str, name: str) -> str:
    found = root.find(path)
    return "" if found is None else found.get(name, "")


def _memory(root: etree._Element) -> int:
    element = root.find("memory")
    if element is None or not element.text:
        return 0
    return int(element.text.strip()) * _SIZES.get(element.get("unit", "KiB"), 1024)


def _uefi(root: etree._Element) -> bool:
    return _attribute(root, "os", "firmware") == "efi" or root.find("os/loader[@type='pflash']") is not None


def _nvram(root: etree._Element) -> str:
    element = root.find("os/nvram")
    if element is None:
        return ""
    return (element.text or "").strip() or _attribute(element, "source", "file")


def _disk(element: etree._Element) -> DomainDisk:
    source_type = element.get("type", "file")
    kind = {"file": DiskKind.FILE, "block": DiskKind.BLOCK}.get(source_type, DiskKind.OTHER)
    source = element.find("source")
    path = ""
    if source is not None:
        names = ("file", "dev", "name", "volume", "dir", "path")
        path = next((source.get(name, "") for name in names if source.get(name)), "")
    return DomainDisk(
        id=_attribute(element, "target", "dev"),
        device=element.get("device", "disk"),
        kind=kind,
        source_type=source_type,
        path=path,
        format=_attribute(element, "driver", "type") or "",
        bus=_attribute(element, "target", "bus"),
        read_only=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        encrypted=element.find(".//encryption") is not None,
        sliced=element.find("source/slices") is not None,
        data_file=element.find("source/dataStore") is not None,
        mirrored=element.find("mirror") is not None,
        sector_size=int(_attribute(element, "blockio", "logical_block_size") or 512),
    )


def _nic(element: etree._Element) -> Nic:
    source = element.find("source")
    network = ""
    if source is not None:
        network = next((source.get(name, "") for name in ("network", "bridge", "dev") if source.get(name)), "")
    return Nic(mac=_attribute(element, "mac", "address"), network=network, model=_attribute(element, "model", "type"))


def _os(root: etree._Element) -> str:
    for element in root.iterfind("metadata//{*}os"):
        return element.get("id", "")
    return ""


def _host_devices(root: etree._Element) -> Iterator[str]:
    for element in root.findall("devices/hostdev"):
        yield element.get("type", "") or element.get("mode", "")
    for element in root.findall("devices/interface[@type='hostdev']"):
        yield "network card " + _attribute(element, "mac", "address")


def _agent(root: etree._Element) -> str | None:
    """None without the guest agent's channel, else its state ("" when the machine is off)."""
    target = root.find(f"devices/channel/target[@name='{AGENT_CHANNEL}']")
    return None if target is None else target.get("state", "")
