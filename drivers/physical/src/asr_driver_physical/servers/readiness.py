"""What the facts about a server mean for protecting it. Pure: facts in, findings out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asr_mobility.tracker import map_bytes
from asrcore.model.finding import Finding, Severity
from asrcore.units import MiB, format_size

__all__ = ["RENEW_SECONDS", "boot_bus", "certificate_finding", "findings", "memory_needed", "nics_to_name"]

_ERROR, _WARNING, _INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
_FREEZABLE = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "reiserfs", "nilfs2"}
_LEAST_FREE = 16 * MiB
_MEMORY_BESIDE = 128 * MiB
_DAY = 24 * 3600.0
RENEW_SECONDS = 60 * _DAY
"""A certificate that ends so soon is renewed when its server is connected."""
_TELL_SECONDS = 42 * _DAY
# Names that the kernel gives in the order in which it finds things, and that are others in another machine.
_BY_ORDER = ("/dev/sd", "/dev/hd", "/dev/vd", "/dev/nvme", "/dev/xvd")


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """All findings, the worst first."""
    found = [*_about_agent(facts), *_about_disks(facts), *_about_boot(facts), *_about_network(facts)]
    order = [_ERROR, _WARNING, _INFO]
    return sorted(found, key=lambda item: order.index(item.severity))


def boot_bus(facts: Mapping[str, Any]) -> str:
    """The bus that the server's system can boot from as a virtual machine."""
    drivers = set(facts.get("initramfs", {}).get("drivers", ()))
    if not facts.get("initramfs", {}).get("listed") or {"virtio_blk", "virtio_pci"} <= drivers:
        return "virtio"
    return "sata" if "ahci" in drivers else "ide" if "ata_piix" in drivers else "virtio"


def memory_needed(facts: Mapping[str, Any]) -> int:
    """Bytes that the agent may have to take: the maps of all disks, what is held at a freeze, and itself."""
    return _MEMORY_BESIDE + sum(map_bytes(disk["size"]) for disk in facts["machine"]["disks"])


def certificate_finding(ends: float, now: float | None = None) -> Finding | None:
    """Of a certificate that ends then (seconds of the epoch; 0: not known) and was not renewed by itself."""
    left = ends - (time.time() if now is None else now)
    if not ends or left > _TELL_SECONDS:
        return None
    return Finding(
        "certificate-ends",
        _WARNING,
        "the agent's certificate has run out"
        if left < 0
        else f"the agent's certificate ends in {left / _DAY:.0f} days",
        "It is renewed by itself 60 days before its end, if the server is connected; that has not happened.",
        "Push to the server again.",
    )


def nics_to_name(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Cards whose name the server's configuration relies on and that would have another one in another machine."""
    return [nic for nic in facts.get("network", ()) if nic["named_in"] and not nic["kept"] and nic["mac"]]


def _about_agent(facts: Mapping[str, Any]) -> Iterator[Finding]:
    if not facts["root"]:
        yield Finding("not-root", _ERROR, "the user is not root", "Tracking blocks needs root.", "Use root, or sudo.")
    version = tuple(int(part) for part in facts["python"].split("."))
    if version < (3, 9):
        yield Finding(
            "python-old",
            _ERROR,
            f"Python {facts['python']} is too old",
            "The mobility service needs Python 3.9 or newer.",
            "Install a newer one beside it and name it with --python.",
        )
    if not facts["systemd"]:
        yield Finding(
            "no-systemd",
            _ERROR,
            "the server does not run systemd",
            "It starts the mobility service, limits what it costs, and thaws if it is killed.",
            "Protect this server by other means.",
        )
    if facts["tracking"]:
        yield Finding(
            "tracking-unavailable",
            _ERROR,
            "this kernel cannot track changed blocks",
            f"{facts['tracking']} (lockdown: {facts['lockdown']}).",
            "Use a kernel from 5.8 on with eBPF and trace points, and lockdown no stricter than `integrity`.",
        )
    needed, limit = memory_needed(facts), facts.get("memory_limit", 0)
    if limit and limit < needed:
        yield Finding(
            "memory-short",
            _WARNING,
            f"the agent may take {format_size(limit)} of memory, and may need {format_size(needed)}",
            "Tracking takes two bytes for each granule of each disk; beyond the limit the agent is killed.",
            "Push again, without --memory or with more.",
        )
    if facts["free"] < _LEAST_FREE:
        yield Finding(
            "server-full",
            _ERROR,
            f"only {format_size(facts['free'])} are free on the server",
            "The mobility service needs a little space.",
            "Free some space on the server's root file system.",
        )


def _about_disks(facts: Mapping[str, Any]) -> Iterator[Finding]:
    disks: Sequence[Mapping[str, Any]] = facts["machine"]["disks"]
    if not disks:
        yield Finding("no-disks", _ERROR, "the server has no disks of its own", "None was found.", "Check the server.")
    for disk in disks:
        if not disk["stable"]:
            yield Finding(
                "disk-unnamed",
                _WARNING,
                f"disk {disk['name']} has no serial number",
                "It is known by its name, which may be that of another disk after a restart.",
                "Keep the disks where they are plugged in; a mix-up is found and compared, at the cost of a full read.",
            )
    for name in facts["multipath"]:
        yield Finding(
            "disk-multipath",
            _ERROR,
            f"{name} is a multipath disk",
            "Its paths are disks of the same content; this was never tested.",
            "Protect its content by means of the storage system.",
        )
    for name in facts["encrypted"]:
        yield Finding(
            "disk-encrypted",
            _WARNING,
            f"{name} is encrypted",
            "The replica is encrypted as well: it boots only where its passphrase is given.",
            "Have the passphrase at the recovery site; a key in a TPM does not travel.",
        )
    for mount in facts["mounts"]:
        if mount["kind"] not in _FREEZABLE and not mount["read_only"]:
            yield Finding(
                "not-freezable",
                _INFO,
                f"{mount['path']} ({mount['kind']}) cannot be frozen",
                "A point taken while it is written is crash-consistent only.",
                "Nothing, where it is an EFI system partition.",
            )


def _about_boot(facts: Mapping[str, Any]) -> Iterator[Finding]:
    if not facts["boot_loader"] and facts["machine"]["firmware"] == "bios":
        yield Finding(
            "no-boot-loader",
            _ERROR,
            "none of the disks has a boot loader",
            "The server boots from something else (a network, a medium), which the replica does not have.",
            "Install a boot loader on one of its disks.",
        )
    initramfs = facts["initramfs"]
    if not initramfs["listed"]:
        yield Finding(
            "initramfs-unknown",
            _WARNING,
            "which disk drivers the initramfs has is not known",
            "Neither lsinitramfs nor lsinitrd could list it.",
            "Test a failover before you rely on it.",
        )
    elif not {"virtio_blk", "virtio_pci"} <= set(initramfs["drivers"]):
        bus = boot_bus(facts)
        other = bus in initramfs["drivers"] or bus in ("sata", "ide")
        yield Finding(
            "initramfs-without-virtio",
            _WARNING if other else _ERROR,
            "the initramfs has no driver for virtio disks",
            f"The replica would {'boot from slower emulated disks' if other else 'not find its root'}.",
            "Set MODULES=most (Debian) or --no-hostonly (dracut) and build the initramfs anew.",
        )
    for line in facts["fstab"]:
        if line["device"].startswith(_BY_ORDER):
            yield Finding(
                "fstab-by-name",
                _ERROR,
                f"fstab names {line['path']} by {line['device']}",
                "The disk has another name in another machine.",
                "Use UUID=... (`blkid`) in /etc/fstab.",
            )
    if facts["machine"]["secure_boot"]:
        yield Finding(
            "secure-boot",
            _WARNING,
            "Secure Boot is on",
            "Keys that the owner enrolled in the firmware do not travel.",
            "Test a failover; the replica boots without Secure Boot.",
        )
    if facts["machine"]["tpm"]:
        yield Finding(
            "tpm",
            _WARNING,
            "the server has a TPM",
            "What is sealed in it does not travel.",
            "Have recovery keys at the recovery site.",
        )


def _about_network(facts: Mapping[str, Any]) -> Iterator[Finding]:
    for nic in facts["network"]:
        if not nic["named_in"]:
            continue
        if nic["kept"]:
            yield Finding(
                "nic-name-kept",
                _INFO,
                f"network card {nic['name']} keeps its name by its address {nic['mac']}",
                "A .link file says so.",
                "Nothing.",
            )
        else:
            yield Finding(
                "nic-name-by-place",
                _WARNING,
                f"{', '.join(nic['named_in'])} name network card {nic['name']}",
                "That name is of its place in this machine: the replica's card would have another and no address.",
                f"Push with --keep-nic-names (the default): a .link file keeps the name by the address {nic['mac']}.",
            )
