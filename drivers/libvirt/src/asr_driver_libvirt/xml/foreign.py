"""A machine of another platform as a domain: from the neutral values of its description. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from lxml import etree

from asrcore.model.machine import Description, Firmware, Nic

__all__ = ["by_target", "domain_of", "targets"]

_Value = TypeVar("_Value")
# Buses that QEMU offers, with the letters that libvirt begins the names of their disks with.
_LETTERS = {"virtio": "vd", "sata": "sd", "scsi": "sd", "ide": "hd", "usb": "sd"}
_NIC_MODELS = {"virtio", "e1000", "e1000e", "rtl8139", "vmxnet3"}
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)


def targets(description: Description) -> dict[str, str]:
    """What the domain calls each disk (`vda`, ...), by the disk's id."""
    used: dict[str, int] = {}
    result = {}
    for disk in description.machine.disks:
        letters = _LETTERS.get(disk.bus, "vd")
        number = used.get(letters, 0)
        used[letters] = number + 1
        result[disk.id] = letters + _letters(number)
    return result


def by_target(description: Description, disks: Mapping[str, _Value]) -> dict[str, _Value]:
    """The same by the domain's names of the disks."""
    names = targets(description)
    return {names[disk_id]: value for disk_id, value in disks.items() if disk_id in names}


def domain_of(description: Description, *, kvm: bool) -> bytes:
    """The domain's XML. Its disks have no images yet: those of a point are put in.

    The first disk is the one that it boots from; a card is plugged into the network of its name.
    """
    machine = description.machine
    uefi = machine.firmware is Firmware.UEFI
    root = etree.Element("domain", type="kvm" if kvm else "qemu")
    _text(root, "name", machine.name)
    _text(root, "uuid", machine.id)
    _text(root, "memory", str(machine.memory), unit="b")
    _text(root, "vcpu", str(machine.cpus))
    system = etree.SubElement(root, "os", {"firmware": "efi"} if uefi else {})
    # q35 has no IDE, and the older machine type no SATA.
    ide = any(disk.bus == "ide" for disk in machine.disks)
    _text(system, "type", "hvm", arch="x86_64", machine="pc" if ide else "q35")
    if uefi:
        firmware = etree.SubElement(system, "firmware")
        # The owner's keys stayed in the original machine's firmware; what is signed with them would not start.
        etree.SubElement(firmware, "feature", enabled="no", name="secure-boot")
    etree.SubElement(system, "boot", dev="hd")
    features = etree.SubElement(root, "features")
    for name in ("acpi", "apic"):
        etree.SubElement(features, name)
    if kvm:
        etree.SubElement(root, "cpu", mode="host-model")
    etree.SubElement(root, "clock", offset="utc")
    for event, action in (("poweroff", "destroy"), ("reboot", "restart"), ("crash", "restart")):
        _text(root, f"on_{event}", action)
    devices = etree.SubElement(root, "devices")
    for disk_id, target in targets(description).items():
        disk = machine.disk(disk_id)
        bus = disk.bus
        element = etree.SubElement(devices, "disk", type="file", device="disk")
        etree.SubElement(element, "driver", name="qemu", type="raw", discard="unmap")
        etree.SubElement(element, "target", dev=target, bus=bus if bus in _LETTERS else "virtio")
        if disk.sector_size != 512:
            size = str(disk.sector_size)
            etree.SubElement(element, "blockio", logical_block_size=size, physical_block_size=size)
    if any(disk.bus == "scsi" for disk in machine.disks):
        etree.SubElement(devices, "controller", type="scsi", model="virtio-scsi")
    for nic in machine.nics:
        _card(devices, nic)
    serial = etree.SubElement(devices, "serial", type="pty")
    etree.SubElement(serial, "target", port="0")
    video = etree.SubElement(devices, "video")
    etree.SubElement(video, "model", type="vga")
    graphics = etree.SubElement(devices, "graphics", type="vnc", autoport="yes")
    etree.SubElement(graphics, "listen", type="address", address="127.0.0.1")
    return etree.tostring(root)


def _card(devices: etree._Element, nic: Nic) -> None:
    element = etree.SubElement(devices, "interface", type="network")
    if _MAC.fullmatch(nic.mac):
        etree.SubElement(element, "mac", address=nic.mac.lower())
    etree.SubElement(element, "source", network=nic.network)
    etree.SubElement(element, "model", type=nic.model if nic.model in _NIC_MODELS else "virtio")


def _text(parent: etree._Element, tag: str, text: str, **attributes: str) -> None:
    etree.SubElement(parent, tag, attributes).text = text


def _letters(number: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    result = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        result = chr(ord("a") + letter) + result
    return result
