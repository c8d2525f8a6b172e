"""The definitions of the guests: the hardware of each kind, and its domain XML."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from xml.sax.saxutils import quoteattr

from tests.lab._disks import COMMAND_LINE, MIB
from tests.lab._images import Images

MEMORY = 128 * MIB
UEFI_MEMORY = 256 * MIB  # with 224, GRUB runs out of memory when it loads the kernel
COMMAND_PORT = "lab.command"
AGENT_PORT = "org.qemu.guest_agent.0"
OVMF_CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
OVMF_VARS = "/usr/share/OVMF/OVMF_VARS_4M.fd"


class Kind(Enum):
    """Ways to boot."""

    BIOS_DIRECT = "bios-direct"
    """The host hands over kernel and initramfs; three data disks: vda qcow2, vdb raw, sda qcow2 on virtio-scsi."""
    BIOS_DISK = "bios-disk"
    """GRUB on its only disk, vda qcow2."""
    UEFI = "uefi"
    """OVMF with its own NVRAM, GRUB in the EFI system partition of its only disk, vda qcow2."""


@dataclass(frozen=True)
class BlankDisk:
    """An extra disk, empty."""

    target: str
    """vdc, sdb, ...: the bus follows from the name."""
    size: int = 64 * MIB
    format: str = "qcow2"


@dataclass(frozen=True)
class Disk:
    """A disk of a guest: its path inside the site, and its template."""

    target: str
    format: str
    path: str
    template: Path | None
    size: int | None = None


def mac_address(name: str) -> str:
    """The guest's fixed address, from its name."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"52:54:00:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}"


def console_path(name: str) -> str:
    """File of the serial console, the same path at each site."""
    return f"/srv/console/{name}.log"


def disks_of(kind: Kind, name: str, images: Images, extra: Sequence[BlankDisk]) -> list[Disk]:
    """The disks of a guest."""
    targets = ("vda", "vdb", "sda") if kind is Kind.BIOS_DIRECT else ("vda",)
    disks = []
    for target in targets:
        template = images.disk(kind.value, target)
        suffix = template.suffix.lstrip(".")
        disks.append(Disk(target, suffix, f"/srv/images/{name}-{target}.{suffix}", template))
    for blank in extra:
        path = f"/srv/images/{name}-{blank.target}.{blank.format}"
        disks.append(Disk(blank.target, blank.format, path, None, blank.size))
    return disks


def disk_xml(disk: Disk) -> str:
    """The <disk> element; disks on SCSI pass trims on."""
    scsi = disk.target.startswith("sd")
    discard = " discard='unmap'" if scsi else ""
    return f"""\
    <disk type='file' device='disk'>
      <driver name='qemu' type='{disk.format}'{discard}/>
      <source file={quoteattr(disk.path)}/>
      <target dev='{disk.target}' bus='{"scsi" if scsi else "virtio"}'/>
    </disk>
"""


def domain_xml(
    kind: Kind, name: str, disks: Sequence[Disk], *, rate: float, virtualised: bool, memory: int | None
) -> str:
    """The domain's definition. It refers to nothing that only one site has: its paths are valid at both."""
    uefi = kind is Kind.UEFI
    boot = "<boot dev='hd'/>"
    if kind is Kind.BIOS_DIRECT:
        boot = f"""<kernel>/srv/boot/vmlinuz</kernel>
    <initrd>/srv/boot/initrd</initrd>
    <cmdline>{COMMAND_LINE}</cmdline>"""
    if uefi:
        boot = f"""<loader readonly='yes' type='pflash'>{OVMF_CODE}</loader>
    <nvram template='{OVMF_VARS}'/>
    {boot}"""
    size = memory or (UEFI_MEMORY if uefi else MEMORY)
    return f"""\
<domain type='{"kvm" if virtualised else "qemu"}'>
  <name>{name}</name>
  <memory unit='b'>{size}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='{"pc-q35-7.2" if uefi else "pc-i440fx-7.2"}'>hvm</type>
    {boot}
    <smbios mode='sysinfo'/>
  </os>
  <sysinfo type='smbios'>
    <system><entry name='manufacturer'>Lab</entry><entry name='version'>rate={rate:g}</entry></system>
  </sysinfo>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>Nehalem</model></cpu>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
{"".join(disk_xml(disk) for disk in disks)}\
    <controller type='scsi' model='virtio-scsi'/>
    <controller type='usb' model='none'/>
    <interface type='network'>
      <mac address='{mac_address(name)}'/>
      <source network='lab'/>
      <model type='virtio'/>
    </interface>
    <serial type='file'>
      <source path='{console_path(name)}' append='on'/>
      <target port='0'/>
    </serial>
    <console type='file'>
      <source path='{console_path(name)}' append='on'/>
      <target type='serial' port='0'/>
    </console>
    <channel type='unix'>
      <target type='virtio' name='{COMMAND_PORT}'/>
    </channel>
    <channel type='unix'>
      <target type='virtio' name='{AGENT_PORT}'/>
    </channel>
    <memballoon model='none'/>
  </devices>
</domain>
"""
