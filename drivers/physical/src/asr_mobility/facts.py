"""Facts about the server: its identity, and what readiness is derived from. Changes nothing."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from asr_mobility import bpf
from asr_mobility.disks import SYS_BLOCK, find_disks
from asr_mobility.freeze import mounts_on

__all__ = ["boot_id", "identity", "machine", "readiness"]

_DMI = Path("/sys/class/dmi/id")
_COMMAND_SECONDS = 20.0
# What boards have whose maker did not enter a UUID: the default of AMI's firmware, in both byte orders, and examples
# from the specification and from firmware sources.
_PLACEHOLDERS = (
    "03000200-0400-0500-0006-000700080009",
    "00020003-0004-0005-0006-000700080009",
    "12345678-1234-5678-90ab-cddeefaabbcc",
    "00112233-4455-6677-8899-aabbccddeeff",
    "01234567-8910-1112-1314-151617181920",
)
_ANY_NAME = re.compile(r"^(en\*|eth\*|e\*|\*)$")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def boot_id() -> str:
    """Differs at each boot of the kernel."""
    return _text(Path("/proc/sys/kernel/random/boot_id"))


def identity() -> str:
    """Distinguishes this machine from a copy of its disks that runs elsewhere: the firmware's description of the
    hardware."""
    names = ("sys_vendor", "product_name", "product_serial", "product_uuid", "board_serial", "chassis_serial")
    words = [_text(_DMI / name) for name in names]
    if not any(words):  # no DMI (ARM boards): the device tree
        words = [_text(Path("/proc/device-tree") / name).strip("\0") for name in ("model", "serial-number")]
    return hashlib.blake2b("\0".join(words).encode(), digest_size=16).hexdigest()


def machine() -> dict[str, Any]:
    """The machine as every hypervisor would describe it."""
    return {
        "id": machine_id(),
        "hostname": platform.node(),
        "cpus": os.cpu_count() or 1,
        "memory": _memory(),
        "firmware": "uefi" if Path("/sys/firmware/efi").is_dir() else "bios",
        "secure_boot": _secure_boot(),
        "tpm": Path("/sys/class/tpm/tpm0").exists(),
        "os": _os_name(),
        "kernel": platform.release(),
        "vendor": " ".join(filter(None, (_text(_DMI / "sys_vendor"), _text(_DMI / "product_name")))),
        "disks": [_disk(disk) for disk in find_disks()],
        "attached": [{"name": disk.name, "why": disk.attached} for disk in find_disks() if disk.attached],
        "nics": _nics(),
    }


def machine_id() -> str:
    """The UUID that the firmware gives the machine; where it gives none, or the vendor's placeholder, one derived from
    the system's id."""
    given = _text(_DMI / "product_uuid").lower()
    plain = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", given)
    if plain and len(set(given.replace("-", ""))) > 2 and given not in _PLACEHOLDERS:
        return given
    digits = (_text(Path("/etc/machine-id")) or hashlib.md5(identity().encode()).hexdigest())[:32].ljust(32, "0")
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _memory() -> int:
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def _secure_boot() -> bool:
    with suppress(OSError, IndexError):
        for path in Path("/sys/firmware/efi/efivars").glob("SecureBoot-*"):
            return path.read_bytes()[4] == 1
    return False


def _os_name() -> str:
    for line in _text(Path("/etc/os-release")).splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip().strip('"')
    return platform.system()


def _disk(disk: Any) -> dict[str, Any]:
    return {
        "id": disk.id,
        "name": disk.name,
        "size": disk.size,
        "stable": disk.stable,
        "read_only": disk.read_only,
        "sector_size": disk.sector_size,
    }


def _nics() -> list[dict[str, str]]:
    """Physical network cards."""
    found = []
    for path in sorted(Path("/sys/class/net").iterdir()):
        if (path / "device").exists():
            mac = _text(path / "bonding_slave/perm_hwaddr") or _text(path / "address")
            found.append({"name": path.name, "mac": mac, "driver": (path / "device/driver").resolve().name})
    return found


# -- readiness -------------------------------------------------------------------------------------------------------


def readiness() -> dict[str, Any]:
    """Facts about tracking here, and about booting as a virtual machine."""
    disks = find_disks()
    names = [disk.name for disk in disks]
    mounts = mounts_on(names)
    return {
        "machine": machine(),
        "identity": identity(),
        "root": os.geteuid() == 0,
        "python": ".".join(map(str, sys.version_info[:2])),
        "systemd": Path("/run/systemd/system").is_dir(),
        "tracking": _tracking(),
        "lockdown": _lockdown(),
        "mounts": [
            {"path": mount.path, "kind": mount.kind, "device": mount.device, "read_only": mount.read_only}
            for mount in mounts
        ],
        "fstab": _fstab(),
        "swap": [line.split()[0] for line in _text(Path("/proc/swaps")).splitlines()[1:]],
        "encrypted": _device_mapper("CRYPT-"),
        "multipath": _device_mapper("mpath-"),
        "arrays": sorted(path.name for path in SYS_BLOCK.iterdir() if path.name.startswith("md")),
        "boot_loader": _boot_loader(names),
        "initramfs": _initramfs(),
        "network": _network(),
        "free": _free("/opt" if Path("/opt").is_dir() else "/"),
        "memory_limit": _memory_limit(),
    }


def _tracking() -> str:
    """Empty if this kernel can track; else the reason why not."""
    try:
        os.close(bpf.create_array(1))
        bpf.trace_point("block_rq_complete")
    except (OSError, ValueError) as problem:
        return str(problem)
    return ""


def _memory_limit() -> int:
    """Memory limit of this process with its tracking maps, in bytes; 0 if there is none."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, kinds, path = line.split(":", 2)
        for place in ("/sys/fs/cgroup" + path + "/memory.max", f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"):
            if "memory" in kinds.split(",") or not kinds:
                limit = _text(Path(place))
                if limit.isdigit() and int(limit) < 1 << 60:
                    return int(limit)
    return 0


def _lockdown() -> str:
    found = re.search(r"\[(\w+)\]", _text(Path("/sys/kernel/security/lockdown")))
    return found[1] if found else "none"


def _fstab() -> list[dict[str, str]]:
    lines = (line.split() for line in _text(Path("/etc/fstab")).splitlines())
    return [{"device": words[0], "path": words[1]} for words in lines if len(words) > 1 and words[0][:1] != "#"]


def _device_mapper(prefix: str) -> list[str]:
    uuids = ((path.parent.parent.name, _text(path)) for path in SYS_BLOCK.glob("dm-*/dm/uuid"))
    return sorted(name for name, uuid in uuids if uuid.startswith(prefix))


def _boot_loader(disks: list[str]) -> list[str]:
    """Disks that carry a boot loader: a boot record with code, or an EFI system partition."""
    found = []
    for name in disks:
        with suppress(OSError), open("/dev/" + name, "rb") as disk:
            record = disk.read(512)
            if record[510:] == b"\x55\xaa" and any(record[:440]):
                found.append(name)
                continue
        for part in SYS_BLOCK.joinpath(name).glob(name + "*"):
            kind = Path("/run/udev/data/b" + _text(part / "dev"))
            if "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" in _text(kind):
                found.append(name)
                break
    return found


def _initramfs() -> dict[str, Any]:
    """Which disk drivers of virtual machines the running kernel's initramfs, or the kernel itself, has."""
    release = platform.release()
    wanted = ("virtio_blk", "virtio_pci", "virtio_scsi", "ahci", "ata_piix", "nvme")
    modules = Path("/lib/modules") / release
    have = {
        name
        for name in wanted
        if re.search(r"/{}\.ko".format(name.replace("_", "[-_]")), _text(modules / "modules.builtin"))
    }
    image = next(
        (
            path
            for path in (Path("/boot/initrd.img-" + release), Path(f"/boot/initramfs-{release}.img"))
            if path.exists()
        ),
        None,
    )
    listed = ""
    if image is not None:
        for command in (["lsinitramfs", str(image)], ["lsinitrd", str(image)]):
            with suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True)
                listed = done.stdout
                break
    have |= {name for name in wanted if re.search(r"/{}\.ko".format(name.replace("_", "[-_]")), listed)}
    return {"image": str(image or ""), "listed": bool(listed), "drivers": sorted(have)}


def _network() -> list[dict[str, Any]]:
    """For each card, whether the network's configuration uses a name that depends on its slot in the machine."""
    places = [Path("/etc/network/interfaces"), *Path("/etc/network/interfaces.d").glob("*")]
    places += [*Path("/etc/systemd/network").glob("*.network"), *Path("/etc/netplan").glob("*.yaml")]
    places += [
        *Path("/etc/NetworkManager/system-connections").glob("*"),
        *Path("/etc/sysconfig/network-scripts").glob("ifcfg-*"),
    ]
    texts = {str(path): _text(path) for path in places if path.is_file()}
    links = "\n".join(_text(path).lower() for path in Path("/etc/systemd/network").glob("*.link"))
    found = []
    for nic in _nics():
        named = [
            path for path, text in texts.items() if re.search(r"\b{}\b".format(re.escape(nic["name"])), text + path)
        ]
        found.append({**nic, "named_in": named, "kept": nic["mac"].lower() in links})
    return found


def _free(path: str) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
