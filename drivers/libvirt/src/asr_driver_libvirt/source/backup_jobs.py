"""Backup jobs and checkpoints of a domain: which there are, how they are begun, ended and released."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

import libvirt

from asr_driver_libvirt.host import stalled
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.source.ours import Ours
from asr_driver_libvirt.source.tracking import DiskPlan
from asr_driver_libvirt.xml import backup as backup_xml
from asr_driver_libvirt.xml.backup import NbdServer, RunningBackup
from asr_driver_libvirt.xml.domain import DomainModel
from asr_driver_libvirt.xml.mark import CheckpointName, LibvirtMark
from asrcore.driver import Tracking
from asrcore.errors import DriverFailed, MachineBusy
from asrcore.model.point import Mark

__all__ = [
    "END_SECONDS",
    "TIDY_SECONDS",
    "Notes",
    "begin_backup",
    "checkpoints_of_others",
    "current_backup",
    "delete_checkpoint",
    "end_backup",
    "find_checkpoint",
    "has_stopped",
    "is_our_backup",
    "our_checkpoints",
    "refuse_if_busy",
    "whole_bitmaps",
]

_log = logging.getLogger(__name__)
_WITH_SIZES = libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE | libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
# libvirt 9.0 has one thread for all events of QEMU, and a channel that the guest opens or closes while a backup runs
# (its agent starts or stops: a boot, a shutdown) blocks that thread for 30 s: "Cannot start job (modify migration
# safe) in API qemu-event ... current job is backup". A backup that is ended meanwhile, like a machine that stops, is
# seen to have ended only afterwards. The limit allows for three such channels.
END_SECONDS = 95.0
# Clean-up does not wait for that; the next user of the domain does.
TIDY_SECONDS = 3.0
_PORT_TRIES = 20


def current_backup(domain: libvirt.virDomain) -> RunningBackup | None:
    """The machine's backup job, whoever began it. Raises libvirtError."""
    try:
        return backup_xml.parse_backup(domain.backupGetXMLDesc(0))
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_OPERATION_INVALID):
            return None
        raise


def is_our_backup(domain: libvirt.virDomain, name: CheckpointName, ours: Ours) -> bool:
    """Whether the backup job of that name is the vault's. Raises libvirtError."""
    return ours(str(name)) or str(name) in {found.getName() for found in our_checkpoints(domain, ours)}


def refuse_if_busy(domain: libvirt.virDomain, ours: Ours) -> None:
    """Raises MachineBusy when another job holds the domain: libvirt would block 30 s before it says so. A backup of
    another vault is such a job."""
    backup = current_backup(domain)
    if backup is not None and backup.name is None:
        raise MachineBusy(machine=domain.name(), work="a backup of another application")
    if backup is not None and backup.name is not None and not is_our_backup(domain, backup.name, ours):
        raise MachineBusy(machine=domain.name(), work=_foreign(domain, backup.name.owner))
    if backup is None and domain.isActive() and domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
        raise MachineBusy(machine=domain.name(), work="a job of libvirt (migration, save, dump or snapshot)")


def _foreign(domain: libvirt.virDomain, tag: str) -> str:
    if tag:
        return f"a backup of another vault (tag {tag})"
    return (
        "a backup without a vault's tag: another vault's, or left from before this site had its tag (then end it: "
        f"`virsh domjobabort {shlex.quote(domain.name())}`)"
    )


def end_backup(host: LibvirtHost, domain: libvirt.virDomain, wait: float = END_SECONDS) -> bool:
    """End a job of this driver, and wait until it has ended: the next one would block on it. A machine that the job
    stopped for lack of space is resumed; returns whether it was stopped. Raises libvirtError, DriverFailed when the job
    still exists after `wait` seconds (it ends later without another call)."""
    backup = current_backup(domain)
    stopped = has_stopped(domain)
    try:
        domain.abortJob()
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
            raise
        # No job any more, or no running machine.
    else:
        if not host.lifecycle.wait(lambda: current_backup(domain) is None, wait):
            raise DriverFailed(operation="ending a backup", site=host.name, detail=f"it still exists after {wait:g} s")
    if stopped and backup is not None and backup.name is not None:
        stalled.resume(domain, backup.name.owner)
    return stopped


def has_stopped(domain: libvirt.virDomain) -> bool:
    """Whether this driver's backup job stopped the machine for lack of space; it is marked then, to be resumed after
    the job. Raises libvirtError."""
    if not stalled.is_stalled(domain):
        return False
    backup = current_backup(domain)
    return backup is not None and backup.name is not None and stalled.claim(domain, str(backup.name))


def begin_backup(
    host: LibvirtHost, domain: libvirt.virDomain, disks: list[backup_xml.BackupDisk], checkpoint: str | None
) -> NbdServer:
    """Freeze: from here on the job serves this instant. Raises libvirtError; a failed attempt leaves nothing behind."""
    place = host.settings.nbd
    if not place.tcp:
        server = NbdServer(socket=_socket_path(host, domain))
        domain.backupBegin(backup_xml.backup_xml(server, disks), checkpoint, 0)
        return server
    # libvirt 9 does not choose a port. Start somewhere else for each machine, so that a clash is rare.
    ports = list(range(place.low, place.high + 1))
    first = int.from_bytes(hashlib.sha256(domain.UUID()).digest()[:4], "big") % len(ports)
    tries = [*ports[first:], *ports[:first]][:_PORT_TRIES]
    for number, port in enumerate(tries, 1):
        server = NbdServer(host=place.host, port=port, tls=host.settings.nbd_tls is not None)
        try:
            domain.backupBegin(backup_xml.backup_xml(server, disks), checkpoint, 0)
        except libvirt.libvirtError as error:
            # libvirt passes QEMU's message on without a specific code (seen: "Failed to find an available port").
            if "available port" not in str(error) or number == len(tries):
                raise
            continue
        return server
    raise AssertionError("a range has a port")


def _socket_path(host: LibvirtHost, domain: libvirt.virDomain) -> str:
    if host.settings.nbd.directory:
        return f"{host.settings.nbd.directory}/asr-{domain.UUIDString()}.sock"
    # The domain's own directory: QEMU may write there whatever user it runs as and whatever AppArmor or SELinux
    # say, since its monitor socket is there too; and libvirt deletes it with the domain.
    for base in (Path("/var/lib/libvirt/qemu"), Path.home() / ".config/libvirt/qemu/lib"):
        for directory in base.glob(f"domain-{domain.ID()}-*"):
            return str(directory / "asr-nbd.sock")
    return f"/tmp/asr-nbd-{domain.UUIDString()}.sock"


# -- checkpoints ----------------------------------------------------------------------------------------------------


def our_checkpoints(domain: libvirt.virDomain, ours: Ours) -> list[libvirt.virDomainCheckpoint]:
    """Those of the vault; others are never touched. Raises libvirtError.

    A checkpoint from which one of these was opened is this vault's too, whatever its name says, and so is one without a
    tag that was opened from one of these: both were made before the site got its tag.
    """
    found, others = {}, {}
    for checkpoint in domain.listAllCheckpoints(0):
        name = checkpoint.getName()
        if ours(name):
            found[name] = checkpoint
        elif CheckpointName.parse(name):
            others[name] = checkpoint
    since = {name: _since(checkpoint) for name, checkpoint in [*found.items(), *others.items()] if others}
    while linked := [name for name in others if name not in found and _linked(name, found, since)]:
        found.update((name, others[name]) for name in linked)
    return list(found.values())


def _linked(name: str, found: Collection[str], since: Mapping[str, str]) -> bool:
    parsed = CheckpointName.parse(name)
    opened_from_ours = parsed is not None and not parsed.owner and since[name] in found
    return opened_from_ours or any(since[other] == name for other in found)


def _since(checkpoint: libvirt.virDomainCheckpoint) -> str:
    """Name of the checkpoint from which this one's view was opened; "" if that is not known."""
    text = backup_xml.checkpoint_description(checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN))
    notes = Notes.read(text)
    mark = None if notes is None else LibvirtMark.parse(Mark(notes[1]))
    return "" if mark is None else mark.checkpoint


def checkpoints_of_others(domain: libvirt.virDomain, ours: Ours) -> list[str]:
    """Names of other vaults' checkpoints. Raises libvirtError."""
    names = [checkpoint.getName() for checkpoint in domain.listAllCheckpoints(0)]
    if all(ours(name) for name in names if CheckpointName.parse(name)):
        return []
    found = {checkpoint.getName() for checkpoint in our_checkpoints(domain, ours)}
    return sorted(name for name in names if CheckpointName.parse(name) and name not in found)


def find_checkpoint(domain: libvirt.virDomain, name: str) -> libvirt.virDomainCheckpoint | None:
    """None when libvirt does not know it. Raises libvirtError."""
    try:
        return domain.checkpointLookupByName(name, 0)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            return None
        raise


def whole_bitmaps(domain: libvirt.virDomain, model: DomainModel, since: LibvirtMark | None) -> set[str]:
    """Disks of a running domain in which the mark's bitmap is whole. Raises libvirtError."""
    if since is None or not since.checkpoint:
        return set()
    known = find_checkpoint(domain, since.checkpoint)
    checkpoint = known or _redefine(domain, model, since)
    if checkpoint is None:
        return set()
    whole = backup_xml.bitmap_sizes(checkpoint.getXMLDesc(_WITH_SIZES))
    if known is None and not whole:
        delete_checkpoint(checkpoint)  # only the record was restored
    return whole


def _redefine(domain: libvirt.virDomain, model: DomainModel, since: LibvirtMark) -> libvirt.virDomainCheckpoint | None:
    # libvirt forgets checkpoints when a machine is renamed (after its daemon's restart) or undefined and defined
    # again; the bitmaps are in the images. Whether they really are, and whole, is seen by their sizes afterwards.
    present = [disk.id for disk in model.hard_disks if disk.tracked and since.disks.get(disk.id, None) is not None]
    ids = [disk_id for disk_id in present if since.disks[disk_id].tracked]
    if not ids:
        return None
    xml = backup_xml.redefine_xml(since.checkpoint, ids, domain.XMLDesc(0), created=0)
    try:
        return domain.checkpointCreateXML(xml, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
    except libvirt.libvirtError as error:
        _log.warning("checkpoint %s of %s is unknown and not restored: %s", since.checkpoint, domain.name(), error)
        return None


def delete_checkpoint(checkpoint: libvirt.virDomainCheckpoint) -> None:
    """Delete bitmaps and record; of a running domain only. Raises libvirtError when not even the record can be
    deleted."""
    try:
        # This also removes inconsistent bitmaps, which otherwise stay for ever and block resizing the disk
        # ("Bitmap ... is inconsistent and cannot be used").
        checkpoint.delete(0)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            return
        # Its bitmap does not exist (a killed QEMU never saved it, a replaced disk never had it): only the record is
        # left.
        _log.info("checkpoint %s: %s; deleting its record", checkpoint.getName(), error)
        with contextlib.suppress(libvirt.libvirtError):
            _log.debug("deleted: %s", checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN))
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


# -- what a restarted engine finds in the checkpoint of its view ------------------------------------------------------


class Notes:
    """The checkpoint's description: the view's mark, what it was asked from, and the plan per disk."""

    @staticmethod
    def write(mark: LibvirtMark, since: str, plans: Mapping[str, DiskPlan]) -> str:
        """Text for the checkpoint's XML."""
        disks = {key: [plan.tracking.value, plan.reason, plan.base] for key, plan in plans.items()}
        return json.dumps({"mark": mark.token().token, "since": since, "disks": disks})

    @staticmethod
    def read(text: str) -> tuple[str, str, dict[str, DiskPlan]] | None:
        """The mark's token, the token it was asked from, the plans; None when that is not what the text is."""
        try:
            content = json.loads(text)
            plans = {
                str(key): DiskPlan(Tracking(tracking), str(reason), str(base))
                for key, (tracking, reason, base) in content["disks"].items()
            }
            return str(content["mark"]), str(content["since"]), plans
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
