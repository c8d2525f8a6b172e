"""Whether a machine can be protected. Pure: facts in, findings out. The codes are stable."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from asr_driver_libvirt.source.facts import SourceFacts
from asr_driver_libvirt.xml.domain import DiskKind, DomainDisk, DomainModel
from asr_driver_libvirt.xml.mark import CheckpointName
from asr_storage.qemu.img import ImageInfo
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Firmware
from asrcore.model.point import Consistency
from asrcore.model.policy import Policy
from asrcore.units import format_size

__all__ = ["disk_findings", "findings", "notices", "old_image", "other_vaults"]

_ERROR, _WARNING, _INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
# libvirt 7.1 added backupmode and incremental for each disk separately (a new disk has no bitmap yet).
_OLDEST_LIBVIRT = 7_001_000
# Of a machine's disks: what is overwritten while a long first copy runs. Rarely more, and a view that needs more ends.
_SCRATCH_SHARE = 10


def findings(facts: SourceFacts, policy: Policy) -> list[Finding]:
    """All findings, errors first."""
    found = [*_host(facts), *_scratch(facts), *_domain(facts), *_devices(facts.model), *_agent(facts, policy)]
    for disk in facts.model.hard_disks:
        found += disk_findings(disk)
        if disk.id in facts.missing:
            detail = facts.missing[disk.id]
            what = "its image cannot be opened"
            found.append(_about(disk, "disk-unreadable", _ERROR, what, detail, "Correct its path or fix its storage."))
        if disk.id in facts.old_images:
            found.append(old_image(disk))
        if disk.id in facts.images:
            found += _image(disk, facts.images[disk.id])
    order = [_ERROR, _WARNING, _INFO]
    return sorted(found, key=lambda item: order.index(item.severity))


def _host(facts: SourceFacts) -> Iterator[Finding]:
    if facts.libvirt_version < _OLDEST_LIBVIRT:
        yield Finding(
            "libvirt-too-old",
            _ERROR,
            "the host's libvirt is older than 7.1",
            "Its backups cannot combine tracked and untracked disks.",
            "Upgrade libvirt and QEMU on the host.",
        )
    if facts.nbd_in_the_clear:
        yield Finding(
            "nbd-in-the-clear",
            _WARNING,
            "disks are read over the network without encryption",
            "The site's setting nbd_tls is not set.",
            "Set up backup_tls_x509_cert_dir in the host's qemu.conf and nbd_tls here, or use a private link only.",
        )


def _scratch(facts: SourceFacts) -> Iterator[Finding]:
    for space, disks in facts.scratch:
        if not space.short and space.free * _SCRATCH_SHARE >= disks:
            continue
        what = f"{format_size(space.free)} are free for scratch files at {space.place}"
        cause = "While a view is open, QEMU keeps there what the machine overwrites"
        if space.short:
            cause += (
                f". No view is opened with less than {format_size(space.reserve)}: without space the machine stops."
            )
        else:
            cause += (
                f", at most the size of its disks, {format_size(disks)}. The view ends before the space is gone, so a "
                "long initial copy may have to be resumed many times."
            )
        action = "Free or add space there, or set the site's scratch_dir to a larger directory of the host."
        yield Finding("scratch-small", _ERROR if space.short else _WARNING, what, cause, action)


def _domain(facts: SourceFacts) -> Iterator[Finding]:
    model = facts.model
    if not facts.persistent:
        yield Finding(
            "transient-domain",
            _ERROR,
            "the machine is transient: it is removed when it stops",
            "libvirt keeps neither its definition nor its checkpoints.",
            "Make it persistent with `virsh define`.",
        )
    if facts.snapshots:
        yield Finding(
            "machine-has-snapshots",
            _ERROR,
            f"the machine has {facts.snapshots} snapshot(s)",
            "Reverting to one changes disks unseen by change tracking, and libvirt refuses to combine both.",
            "Merge or delete the snapshots: `virsh snapshot-list`, `virsh snapshot-delete`.",
        )
    if facts.other_vaults:
        yield other_vaults(model, facts.other_vaults, active=facts.active)
    if facts.foreign_checkpoints:
        yield Finding(
            "machine-has-foreign-checkpoints",
            _INFO,
            f"another application tracks changes too: {', '.join(facts.foreign_checkpoints)}",
            "Each checkpoint has its own bitmaps, so neither affects the other; but only one backup runs at a time.",
            "No action needed; keep its backups short.",
        )
    if facts.foreign_backup:
        yield Finding(
            "foreign-backup-running",
            _WARNING,
            "a backup of another application or vault is running",
            "QEMU serves one backup of a machine at a time: replication cycles wait until it has ended.",
            "Wait, or end it with `virsh domjobabort`.",
        )
    if facts.halted:
        yield Finding(
            "source-paused",
            _WARNING,
            f"the machine does not run: {facts.halted}",
            "A disk failed or had no space left.",
            "Repair its storage or free space there, then resume it with `virsh resume`.",
        )
    if facts.managed_save:
        yield Finding(
            "managed-save-present",
            _WARNING,
            "the machine is suspended to disk",
            "Its saved memory is not replicated: at the target it starts as after a power cut.",
            "Start it, or delete the saved memory with `virsh managedsave-remove`.",
        )
    for disk_id in facts.block_jobs:
        yield Finding(
            "active-block-job",
            _ERROR,
            f"a block job works on {disk_id}",
            "A disk that is being copied or merged cannot be frozen.",
            "Wait for it (`virsh blockjob`), then protect.",
        )
    if facts.autostart:
        yield Finding(
            "autostart",
            _INFO,
            "the machine starts with its host",
            "When the host comes back after a failover, it would start again; the engine fences it as soon as it can.",
            "No action needed.",
        )
    if not facts.active and not facts.local:
        yield Finding(
            "machine-off-remote",
            _INFO,
            "the machine is off",
            "Its disks are read by starting it with its processors stopped; it cannot be started during that time.",
            "No action needed. To avoid this, start it before its initial copy.",
        )
    if facts.nvram_readable is False:
        yield Finding(
            "nvram-unreadable",
            _WARNING,
            "the UEFI variables cannot be read",
            f"{model.nvram} is not accessible from here: boot entries and Secure Boot keys are not replicated.",
            "Make it readable, or expect the firmware's defaults after a failover.",
        )
    if not model.hard_disks:
        yield Finding("no-disks", _ERROR, "the machine has no disks", "There is nothing to replicate.", "Add a disk.")


def notices(snapshots: int, others: Sequence[str], scratch: Sequence[str]) -> list[Finding]:
    """What a cycle reports of a machine that is protected already. `others`: checkpoints of other vaults; `scratch`:
    scratch files without a tag.

    The vault stores it when it changes, so it is the same in each cycle. It has placeholders for names: the machine may
    have been renamed, while its protection keeps its name.
    """
    found = []
    if others:
        found.append(
            _other_vaults(
                others,
                "List what it left with `virsh checkpoint-list MACHINE`; names that begin with `asr-` and end with its "
                "tag are its own. Delete each with `virsh checkpoint-delete MACHINE CHECKPOINT`, of a machine that is "
                "off with `--metadata`, and then also `qemu-img bitmap --remove IMAGE CHECKPOINT`",
            )
        )
    if scratch:
        found.append(
            Finding(
                "scratch-left",
                _WARNING,
                f"{len(scratch)} scratch file(s) of the machine name no vault: {', '.join(scratch)}",
                "A site without a tag left them: of another vault, or of this one before its site had a tag.",
                "If no other vault protects the machine, or none of them reads it now, delete them at the host: "
                + ", ".join(f"`rm {shlex.quote(path)}`" for path in scratch)
                + ".",
            )
        )
    if snapshots:
        found.append(
            Finding(
                "machine-has-snapshots",
                _WARNING,
                f"the machine has {snapshots} snapshot(s), made since it was protected",
                "Replication continues. But QEMU refuses to revert to one while changes are tracked, and libvirt has "
                "stopped a running machine by then.",
                "Delete those that are not needed (`virsh snapshot-delete MACHINE SNAPSHOT`). Before a revert, outside "
                "of the policy's resync window: `asr resync` of this machine, then `virsh checkpoint-delete MACHINE "
                "CHECKPOINT` for each of `virsh checkpoint-list MACHINE --name`; after the revert: `asr resync --now`. "
                "MACHINE is its name at the source, which may differ from that of its protection.",
            )
        )
    return found


def other_vaults(model: DomainModel, names: Sequence[str], *, active: bool) -> Finding:
    """That other vaults protect the machine too. `names`: of their checkpoints."""
    machine = shlex.quote(model.name)
    commands = [f"`virsh checkpoint-delete {machine} {name}{'' if active else ' --metadata'}`" for name in names]
    if not active:
        files = [shlex.quote(disk.path) for disk in model.hard_disks if disk.tracked]
        commands += [f"`qemu-img bitmap --remove {file} {name}`" for file in files for name in names]
    return _other_vaults(names, "Delete what it left: " + ", ".join(commands))


def _other_vaults(names: Sequence[str], delete: str) -> Finding:
    parsed = [CheckpointName.parse(name) for name in names]
    tags = sorted({name.owner for name in parsed if name is not None})
    cause = (
        "Both replicate it in turn, and each leaves the other's checkpoints alone; but a failover by one of them is "
        "not known to the other."
    )
    if "" in tags:
        cause += " A site without a tag was added by an earlier version; `asr site update` at that vault records one."
    action = f"Run `asr unprotect` in one of the two vaults. If the other vault is gone for good: {delete}."
    if named := [tag for tag in tags if tag]:
        action += f" Or take over its tag, and this vault deletes it: `asr site update SITE --set owner={named[0]}`."
    said = ", ".join(tag or "none" for tag in tags)
    return Finding(
        "protected-by-another-vault", _WARNING, f"another vault protects the machine too (tag {said})", cause, action
    )


def _devices(model: DomainModel) -> Iterator[Finding]:
    for device in model.host_devices:
        yield Finding(
            "host-device",
            _ERROR,
            f"a device of the host is passed through ({device})",
            "The target does not have it.",
            "Remove it from the machine.",
        )
    if model.launch_security:
        yield Finding(
            "launch-security",
            _ERROR,
            "the machine's memory is encrypted by the processor",
            "Its keys belong to this host's processor.",
            "Remove <launchSecurity> from the machine.",
        )
    if model.nvdimms:
        yield Finding(
            "persistent-memory",
            _ERROR,
            "the machine has persistent memory",
            "Its content is not on a disk and is not replicated.",
            "Move its content to a disk.",
        )
    if model.tpm:
        yield Finding(
            "tpm-present",
            _WARNING,
            "the machine has a TPM",
            "The state of an emulated TPM is not replicated: keys sealed to it (BitLocker) are not usable there.",
            "Keep the recovery keys at hand.",
        )
    if model.cpu_mode in ("host-passthrough", "maximum"):
        yield Finding(
            "cpu-passthrough",
            _WARNING,
            f"its processor is the host's own ({model.cpu_mode})",
            "On a host with a different processor the guest sees a different one.",
            "Use a named model, or host-model.",
        )
    for folder in model.shared_folders:
        yield Finding(
            "shared-folder",
            _WARNING,
            f"a folder of the host is shared ({folder})",
            "What is in it is not replicated.",
            "Move it to a disk, or provide it at the target.",
        )
    if model.shared_memory:
        yield Finding(
            "shared-memory",
            _WARNING,
            "the machine shares memory with others",
            "It is not replicated.",
            "Provide it at the target.",
        )
    if model.direct_kernel:
        yield Finding(
            "direct-kernel",
            _WARNING,
            "it boots a kernel and initial ramdisk from files of the host",
            "Files of the host are not replicated.",
            "Put the same files at the same paths at the target.",
        )
    for drive in model.media:
        yield Finding(
            "removable-medium",
            _INFO,
            f"a medium is in drive {drive}",
            "CD-ROMs and floppies are not replicated; the drive is empty at the target.",
            "No action needed.",
        )
    if model.firmware is Firmware.UEFI and not model.nvram:
        yield Finding(
            "nvram-not-made-yet",
            _INFO,
            "the machine has no UEFI variables yet",
            "libvirt creates them when it first starts.",
            "No action needed.",
        )


def _agent(facts: SourceFacts, policy: Policy) -> Iterator[Finding]:
    if policy.consistency is Consistency.CRASH:
        return
    if not facts.model.agent_channel or (facts.active and not facts.model.agent_connected):
        yield Finding(
            "guest-agent-missing",
            _WARNING,
            f"the policy asks for {policy.consistency.value} consistency, but the guest agent does not answer",
            "Without it recovery points are crash-consistent, and are recorded as such.",
            "Add a channel org.qemu.guest_agent.0 and install qemu-guest-agent in the guest.",
        )
    elif policy.consistency is Consistency.APPLICATION:
        yield Finding(
            "application-consistency-unknown",
            _INFO,
            "application consistency is available for Windows guests only (VSS)",
            "Other guests may run hook scripts unreported: their points are recorded as filesystem-consistent.",
            "No action needed.",
        )


# -- disks -----------------------------------------------------------------------------------------------------------


def disk_findings(disk: DomainDisk) -> list[Finding]:
    """Findings from a disk's definition."""
    found = []
    if disk.kind is DiskKind.OTHER:
        cause = "Only image files and block devices, named by their paths, can be replicated."
        action = "Move it to an image file, or remove it from the machine."
        if disk.source_type == "volume":
            action = (
                f"If it is a file or a block device, name it by the path that `virsh vol-path --pool POOL "
                f"{shlex.quote(disk.path)}` prints: `<disk type='file'>` with `<source file='PATH'/>`, or `block` and "
                "`dev` (`virsh edit`; the content stays)."
            )
        found.append(_about(disk, "disk-unsupported", _ERROR, f"it is of type {disk.source_type}", cause, action))
    elif disk.format not in ("qcow2", "raw"):
        named = f"format {disk.format}" if disk.format else "no format"
        cause = "Only qcow2 and raw are supported, and the format must be stated: guessing it is not safe."
        found.append(_about(disk, "disk-format", _ERROR, f"it has {named}", cause, "Convert it, or state its format."))
    elif not disk.tracked:
        cause = "QEMU keeps change tracking in qcow2 images only: each cycle reads the disk and compares."
        action = "Convert it to qcow2 (`qemu-img convert`) for cheap deltas."
        found.append(_about(disk, "disk-raw", _WARNING, "its changes are not tracked", cause, action))
    flags = (
        (disk.device == "lun", "disk-passthrough", "a SCSI device is passed through", "QEMU does not see its writes."),
        (disk.read_only, "disk-read-only", "it is read-only", "libvirt does not back up read-only disks."),
        (disk.shareable, "disk-shareable", "it is shared between machines", "Other writers would not be seen."),
        (disk.transient, "disk-transient", "its changes are dropped at shutdown", "There is no state to replicate."),
        (disk.encrypted, "disk-encrypted", "QEMU encrypts it", "Its key is in the host's secrets, not in the machine."),
        (disk.sliced, "disk-slice", "it is a slice of a larger image", "Its image holds other data too."),
        (disk.data_file, "disk-data-file", "its data is in a separate file", "Backups do not support that."),
        (disk.mirrored, "active-block-job", "it is being copied", "A disk under copy cannot be frozen."),
    )
    for holds, code, what, cause in flags:
        if holds:
            found.append(_about(disk, code, _ERROR, what, cause, "Change that, or remove the disk from the machine."))
    return found


def old_image(disk: DomainDisk) -> Finding:
    """That a disk is of qcow2 version 2."""
    cause = "Such an image cannot hold change tracking: each cycle reads the disk and compares."
    action = f"While the machine is off: `qemu-img amend -f qcow2 -o compat=1.1 {shlex.quote(disk.path)}`."
    return _about(disk, "disk-qcow2-v2", _WARNING, "its image is of qcow2 version 2 (compat=0.10)", cause, action)


def _image(disk: DomainDisk, image: ImageInfo) -> Iterator[Finding]:
    if image.encrypted and not disk.encrypted:
        cause = "Its key is in the host's secrets, not in the machine."
        yield _about(disk, "disk-encrypted", _ERROR, "its image is encrypted", cause, "Use encryption in the guest.")
    if image.data_file is not None and not disk.data_file:
        cause = "QEMU cannot keep bitmaps for it that survive."
        yield _about(disk, "disk-data-file", _ERROR, "its data is in a separate file", cause, "Convert the image.")
    if image.corrupt:
        cause = "QEMU found its structures broken and refuses to write to it."
        yield _about(disk, "disk-corrupt", _ERROR, "its image is corrupt", cause, "Repair it: `qemu-img check -r all`.")
    if image.snapshots:
        names = ", ".join(image.snapshots)
        cause = "Reverting to one changes the disk unseen by change tracking."
        yield _about(
            disk,
            "machine-has-snapshots",
            _ERROR,
            f"its image holds snapshots ({names})",
            cause,
            "Shut the machine down, then delete them with `qemu-img snapshot -d`.",
        )
    if image.backing_file is not None and image.backing_format is None:
        cause = "QEMU would guess it, which lets a guest read files of the host."
        action = "State it: `qemu-img rebase -u -F FORMAT -b FILE`."
        yield _about(disk, "backing-format", _ERROR, "the format of its backing file is not stated", cause, action)


def _about(disk: DomainDisk, code: str, severity: Severity, what: str, cause: str, action: str) -> Finding:
    return Finding(code, severity, f"disk {disk.id} ({disk.path or 'no path'}): {what}", cause, action)
