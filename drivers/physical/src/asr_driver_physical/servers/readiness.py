"""Findings from the facts about a server. Pure: facts in, findings out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asr_mobility.tracker import map_bytes
from asrcore.model.finding import Finding, Severity
from asrcore.units import MiB, format_size

__all__ = [
    "AGENT_LIFE",
    "RENEW_SECONDS",
    "boot_bus",
    "certificate_finding",
    "fence_unknown",
    "findings",
    "memory_needed",
    "nics_to_name",
    "renewal_due",
    "shared_id",
]

_ERROR, _WARNING, _INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
_FREEZABLE = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "reiserfs", "nilfs2"}
_LEAST_FREE = 16 * MiB
_MEMORY_BESIDE = 128 * MiB
_DAY = 24 * 3600.0
AGENT_LIFE = 825 * _DAY
RENEW_SECONDS = 60 * _DAY
"""A certificate with less than this left is renewed when its server is connected."""
_TELL_SECONDS = 42 * _DAY
# Names that the kernel assigns in order of discovery, so they differ in another machine.
_BY_ORDER = ("/dev/sd", "/dev/hd", "/dev/vd", "/dev/nvme", "/dev/xvd")


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """All findings, the worst first."""
    found = [*_about_agent(facts), *_about_disks(facts), *_about_boot(facts), *_about_network(facts)]
    order = [_ERROR, _WARNING, _INFO]
    return sorted(found, key=lambda item: order.index(item.severity))


def boot_bus(facts: Mapping[str, Any]) -> str:
    """The bus from which the server's system can boot as a virtual machine."""
    drivers = set(facts.get("initramfs", {}).get("drivers", ()))
    if not facts.get("initramfs", {}).get("listed") or {"virtio_blk", "virtio_pci"} <= drivers:
        return "virtio"
    return "sata" if "ahci" in drivers else "ide" if "ata_piix" in drivers else "virtio"


def memory_needed(facts: Mapping[str, Any]) -> int:
    """Bytes that the agent may need: the maps of all disks, what is captured at a freeze, and the process."""
    return _MEMORY_BESIDE + sum(map_bytes(disk["size"]) for disk in facts["machine"]["disks"])


def renewal_due(ends: float, now: float | None = None) -> bool:
    """Whether to renew a certificate that ends then (seconds of the epoch; 0: not known). One with more than its whole
    life left was issued, or is looked at, with a wrong clock: when it really ends is not known."""
    left = ends - (time.time() if now is None else now)
    return bool(ends) and not RENEW_SECONDS <= left <= AGENT_LIFE + _DAY


def certificate_finding(ends: float, now: float | None = None) -> Finding | None:
    """For a certificate that ends then (seconds of the epoch; 0: not known) and was not renewed automatically."""
    left = ends - (time.time() if now is None else now)
    if not ends or left > _TELL_SECONDS:
        return None
    return Finding(
        "certificate-ends",
        _WARNING,
        "the agent's certificate has expired"
        if left < 0
        else f"the agent's certificate expires in {left / _DAY:.0f} days",
        "It is renewed automatically from 60 days before its end while the server is connected; that has not happened.",
        "Push to the server again (`asr physical push`), or enrol it again by hand.",
    )


def fence_unknown() -> Finding:
    """For a server that is enrolled again over a record that cannot be read."""
    return Finding(
        "quarantine-unknown",
        _WARNING,
        "whether the server was in quarantine is not known: its former record was damaged",
        "A server that was failed over is kept off by its record.",
        "If it was failed over, keep it off until the failover is undone or the server is re-protected.",
    )


def shared_id(reported: str, given: str) -> Finding:
    """For a server that calls itself what another enrolled server is."""
    return Finding(
        "machine-id-shared",
        _WARNING,
        f"another enrolled server has the machine id {reported}",
        "Its board has a placeholder for a UUID, or its system was copied together with /etc/machine-id.",
        f"If it is another server, no action is needed: it is known as {given}. If it is the same one, `asr physical "
        "forget` both names, then push it under one of them: it has its former id again.",
    )


def nics_to_name(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Cards whose name the server's configuration uses and that would have a different one in another machine."""
    return [nic for nic in facts.get("network", ()) if nic["named_in"] and not nic["kept"] and nic["mac"]]


def _about_agent(facts: Mapping[str, Any]) -> Iterator[Finding]:
    if not facts["root"]:
        yield Finding("not-root", _ERROR, "the user is not root", "Change tracking needs root.", "Use root, or sudo.")
    version = tuple(int(part) for part in facts["python"].split("."))
    if version < (3, 9):
        yield Finding(
            "python-old",
            _ERROR,
            f"Python {facts['python']} is too old",
            "The mobility service needs Python 3.9 or newer.",
            "Install a newer version beside it and select it with --python.",
        )
    if not facts["systemd"]:
        yield Finding(
            "no-systemd",
            _ERROR,
            "the server does not run systemd",
            "systemd starts the mobility service, limits its resources, and thaws file systems if it is killed.",
            "Protect this server by other means.",
        )
    if facts["tracking"]:
        yield Finding(
            "tracking-unavailable",
            _ERROR,
            "this kernel cannot track changed blocks",
            f"{facts['tracking']} (lockdown: {facts['lockdown']}).",
            "Use Linux 5.8 or newer with eBPF and trace points, and lockdown no stricter than `integrity`.",
        )
    needed, limit = memory_needed(facts), facts.get("memory_limit", 0)
    if limit and limit < needed:
        yield Finding(
            "memory-short",
            _WARNING,
            f"the agent's memory limit is {format_size(limit)}, but it may need {format_size(needed)}",
            "Tracking needs two bytes for each granule of each disk; above the limit the agent is killed.",
            "Push again, without --memory or with a higher value.",
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
        yield Finding("no-disks", _ERROR, "the server has no disks", "None was found.", "Check the server.")
    for disk in disks:
        if not disk["stable"]:
            yield Finding(
                "disk-unnamed",
                _WARNING,
                f"disk {disk['name']} has no serial number",
                "It is identified by its name, which may be another disk's after a restart.",
                "Do not swap disks between slots. A mix-up is detected, and costs a comparison of the whole disk.",
            )
    for disk in facts["machine"].get("attached", ()):
        yield Finding(
            "disk-attached",
            _WARNING,
            f"disk {disk['name']} is attached by {disk['why']}",
            "It is part of the machine, and is replicated with it, as long as it is attached.",
            "Detach it before you protect the server, if it is not the server's own.",
        )
    for name in facts["multipath"]:
        yield Finding(
            "disk-multipath",
            _ERROR,
            f"{name} is a multipath disk",
            "Each of its paths appears as a disk with the same content; this was never tested.",
            "Protect its content with the storage system's own replication.",
        )
    for name in facts["encrypted"]:
        yield Finding(
            "disk-encrypted",
            _WARNING,
            f"{name} is encrypted",
            "The replica is encrypted as well: it boots only when its passphrase is entered.",
            "Keep the passphrase at the recovery site; a key in a TPM is not replicated.",
        )
    for mount in facts["mounts"]:
        if mount["kind"] not in _FREEZABLE and not mount["read_only"]:
            yield Finding(
                "not-freezable",
                _INFO,
                f"{mount['path']} ({mount['kind']}) cannot be frozen",
                "A recovery point taken while it is written is crash-consistent only.",
                "No action needed if it is an EFI system partition.",
            )


def _about_boot(facts: Mapping[str, Any]) -> Iterator[Finding]:
    if not facts["boot_loader"] and facts["machine"]["firmware"] == "bios":
        yield Finding(
            "no-boot-loader",
            _ERROR,
            "none of the disks has a boot loader",
            "The server boots from another source (network, removable medium) that the replica does not have.",
            "Install a boot loader on one of its disks.",
        )
    initramfs = facts["initramfs"]
    if not initramfs["listed"]:
        yield Finding(
            "initramfs-unknown",
            _WARNING,
            "it is not known which disk drivers the initramfs has",
            "Neither lsinitramfs nor lsinitrd could list it.",
            "Run a test failover before you rely on it.",
        )
    elif not {"virtio_blk", "virtio_pci"} <= set(initramfs["drivers"]):
        bus = boot_bus(facts)
        other = bus in initramfs["drivers"] or bus in ("sata", "ide")
        yield Finding(
            "initramfs-without-virtio",
            _WARNING if other else _ERROR,
            "the initramfs has no driver for virtio disks",
            f"The replica would {'boot from slower emulated disks' if other else 'not find its root'}.",
            "Set MODULES=most (Debian) or --no-hostonly (dracut) and rebuild the initramfs.",
        )
    for line in facts["fstab"]:
        if line["device"].startswith(_BY_ORDER):
            yield Finding(
                "fstab-by-name",
                _ERROR,
                f"fstab names {line['path']} by {line['device']}",
                "The disk has a different name in another machine.",
                "Use UUID=... (`blkid`) in /etc/fstab.",
            )
    if facts["machine"]["secure_boot"]:
        yield Finding(
            "secure-boot",
            _WARNING,
            "Secure Boot is on",
            "Keys that were enrolled in the firmware are not replicated.",
            "Run a test failover; the replica boots without Secure Boot.",
        )
    if facts["machine"]["tpm"]:
        yield Finding(
            "tpm",
            _WARNING,
            "the server has a TPM",
            "Keys sealed in it are not replicated.",
            "Keep recovery keys at the recovery site.",
        )


def _about_network(facts: Mapping[str, Any]) -> Iterator[Finding]:
    for nic in facts["network"]:
        if not nic["named_in"]:
            continue
        if nic["kept"]:
            yield Finding(
                "nic-name-kept",
                _INFO,
                f"network card {nic['name']} keeps its name through its MAC address {nic['mac']}",
                "A .link file assigns it.",
                "No action needed.",
            )
        else:
            yield Finding(
                "nic-name-by-place",
                _WARNING,
                f"{', '.join(nic['named_in'])} name network card {nic['name']}",
                "The name depends on the slot in this machine: the replica's card gets another one and no address.",
                f"Push with --keep-nic-names (the default): a .link file keeps the name by MAC address {nic['mac']}.",
            )
