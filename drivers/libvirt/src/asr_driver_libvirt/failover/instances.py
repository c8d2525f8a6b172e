"""What tests and promotions have in common: images for an instance, its NVRAM, and its domain at the site."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import libvirt

from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.xml.description import DOMAIN_XML, NVRAM, PLATFORM
from asr_driver_libvirt.xml.domain import parse_domain
from asr_driver_libvirt.xml.foreign import by_target, domain_of
from asr_driver_libvirt.xml.instance import DiskFile, Made, made_of
from asr_storage.files.durable import fsync_file
from asr_storage.files.sparse import clone_file, rounded
from asr_storage.qemu.process import run
from asr_storage.replica.chain import qemu_errors
from asr_storage.replica.journal import file_stem
from asr_storage.replica.replica import FileReplica
from asr_storage.replica.store import FORMAT, Point, Record, ReplicaKind
from asrcore.errors import DriverFailed, PointNotFound
from asrcore.model.machine import Description, Firmware

__all__ = [
    "Platform",
    "disks_of",
    "disks_of_domain",
    "domain_xml",
    "hold",
    "make_images",
    "of_point",
    "released",
    "write_nvram",
]

_QEMU_IMG_SECONDS = 60.0

_UNDEFINES_TPM = 8_009_000  # libvirt's version; older ones refuse the flags
_UNDEFINE = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
)


def domain_xml(description: Description, *, emulated: bool) -> bytes:
    """The domain as it was at the point; for a machine of another platform, one made of its neutral values."""
    xml = description.artifact(DOMAIN_XML)
    if description.platform != PLATFORM or xml is None:
        return domain_of(description, kvm=not emulated)
    return xml


def disks_of_domain(description: Description, images: Mapping[str, DiskFile]) -> Mapping[str, DiskFile]:
    """Images of a point's disks by the names that the domain has for them: in domains of this driver these are the
    ids."""
    return images if description.artifact(DOMAIN_XML) is not None else by_target(description, images)


def of_point(record: Record, point_id: str) -> Point:
    """The point. Raises PointNotFound."""
    point = record.point(point_id)
    if point is None:
        raise PointNotFound(machine=record.name, point=point_id)
    return point


def hold(replica: FileReplica, record: Record, holder: str, point: Point) -> Record:
    """Record what uses a point's images, so that they are neither written nor deleted.

    With `reflink` only clones are used: a point that is not kept is the head itself, which cycles write.
    """
    if record.kind is ReplicaKind.REFLINK and not point.stored.kept:
        return record
    if point == record.head:
        record = replica.images(record).preserve(record)
        point = of_point(record, point.stored.id)
    if record.holds.get(holder) == point.images:
        return record
    record = attrs.evolve(record, holds={**record.holds, holder: dict(point.images)}, format=FORMAT)
    replica.home.save(record)
    return record


def released(replica: FileReplica, record: Record, holder: str) -> Record:
    """The holder was removed; what only it needed is freed."""
    if holder not in record.holds:
        return record
    record = attrs.evolve(record, holds={name: held for name, held in record.holds.items() if name != holder})
    replica.home.save(record)
    return replica.images(record).free(record, replica.home.save)


def make_images(
    replica: FileReplica, record: Record, holder: str, point: Point, directory: Path, *, own: bool
) -> dict[str, DiskFile]:
    """Images in a directory that have a point's content and may be written. A repeat creates them again.

    Overlays over the images that the holder uses; a clone costs 30-90 us for each extent of the disk, an overlay the
    same for any disk. With `reflink` a holder that uses no images gets clones, and so does one whose disks become its
    `own` in the end: with overlays, so that their changes can be tracked.
    """
    stands = record.kind is ReplicaKind.CHAIN or (not own and holder in record.holds)
    made = {}
    for disk_id, image in (record.holds[holder] if stands else point.images).items():
        path = replica.home.path / image
        stem = file_stem(disk_id)
        fmt = "raw" if image.endswith(".raw") else "qcow2"
        if not stands:
            clone = directory / (f"{stem}.base.raw" if own else f"{stem}.raw")
            clone_file(path, clone)
            if not own:
                made[disk_id] = DiskFile(str(clone), "raw")
                continue
            path = clone
        top = directory / f"{stem}.qcow2"
        _overlay(top, path, fmt, point.stored.disks[disk_id])
        made[disk_id] = DiskFile(str(top), "qcow2")
    fsync_file(directory)
    return made


def _overlay(path: Path, backing: Path, fmt: str, size: int) -> None:
    path.unlink(missing_ok=True)
    backing.stat()
    # A relative name: the directory may be mounted elsewhere one day. -u: the layers are opened when it starts.
    name = os.path.relpath(backing, path.parent)
    command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", fmt]
    command += [str(path), str(max(512, rounded(size)))]
    with qemu_errors(path):
        run(command, what=f"create {path}", timeout=_QEMU_IMG_SECONDS)
    path.chmod(0o600)
    fsync_file(path)


def write_nvram(description: Description, directory: Path) -> str | None:
    """The UEFI variables of the point as a file of the instance; None for a machine without."""
    data = description.artifact(NVRAM)
    path = directory / "nvram.fd"
    path.unlink(missing_ok=True)
    if data is None:
        # libvirt makes it from the firmware's template: the machine boots by its default boot entry.
        own = description.artifact(DOMAIN_XML)
        firmware = parse_domain(own).firmware if own is not None else description.machine.firmware
        return str(path) if firmware is Firmware.UEFI else None
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    return str(path)


class Platform:
    """The domains and networks of a site, as instances need them; libvirt's errors are translated."""

    def __init__(self, host: LibvirtHost) -> None:
        self._host = host

    @property
    def name(self) -> str:
        """Of the site."""
        return self._host.name

    def domain_xml(self, description: Description) -> bytes:
        """The domain for a machine of a point, see `domain_xml`."""
        return domain_xml(description, emulated=self._host.settings.emulates)

    def find(self, machine_id: str) -> libvirt.virDomain | None:
        """The domain of that UUID, or None."""
        with self._host.guard("looking up a machine", machine_id):
            return self._find(lambda conn: conn.lookupByUUIDString(machine_id))

    def find_name(self, name: str) -> libvirt.virDomain | None:
        """The domain of that name, or None."""
        with self._host.guard("looking up a machine", name):
            return self._find(lambda conn: conn.lookupByName(name))

    def _find(self, look: Callable[[libvirt.virConnect], libvirt.virDomain]) -> libvirt.virDomain | None:
        try:
            return look(self._host.conn())
        except libvirt.libvirtError as problem:
            if problem.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise

    def running(self, domain: libvirt.virDomain) -> bool:
        """Whether it has a QEMU process."""
        with self._host.guard("reading a machine's power"):
            return bool(domain.isActive())

    def definition(self, domain: libvirt.virDomain) -> str:
        """Its persistent definition, with secrets: to be put back as it was."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        with self._host.guard("reading a machine's definition"):
            return domain.XMLDesc(flags)

    def made(self, domain: libvirt.virDomain) -> Made | None:
        """Of which replica it was made, or None."""
        return made_of(self.definition(domain))

    def define(self, xml: str) -> libvirt.virDomain:
        """Define a domain; it does not start with its host. Raises DriverFailed with libvirt's reason."""
        with self._host.guard("defining a machine"):
            domain = self._host.conn().defineXML(xml)
            if domain.autostart():
                domain.setAutostart(0)
            return domain

    def start(self, domain: libvirt.virDomain) -> None:
        """Start it; a running one is left alone."""
        with self._host.guard("starting a machine"):
            if not domain.isActive():
                domain.create()

    def remove(self, domain: libvirt.virDomain, *, tpm: bool) -> None:
        """Stop and undefine; files are kept, a TPM's state is deleted with `tpm`."""
        with self._host.guard("removing a machine"):
            if domain.isActive():
                _ignoring(domain.destroy, libvirt.VIR_ERR_OPERATION_INVALID)
            self.undefine(domain, tpm=tpm)

    def undefine(self, domain: libvirt.virDomain, *, tpm: bool) -> None:
        """Undefine a stopped domain; its NVRAM file is kept."""
        flags = _UNDEFINE | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
        with self._host.guard("removing a machine's definition"):
            if self._host.conn().getLibVersion() >= _UNDEFINES_TPM:
                flags |= libvirt.VIR_DOMAIN_UNDEFINE_TPM if tpm else libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
            _ignoring(lambda: domain.undefineFlags(flags), libvirt.VIR_ERR_NO_DOMAIN)

    def autostarts(self, domain: libvirt.virDomain) -> bool:
        """Whether it starts with its host."""
        with self._host.guard("reading a machine's autostart"):
            return bool(domain.autostart())

    def set_autostart(self, domain: libvirt.virDomain) -> None:
        """Let it start with its host."""
        with self._host.guard("setting a machine's autostart"):
            domain.setAutostart(1)

    def network_names(self) -> frozenset[str]:
        """All networks that libvirt has here."""
        with self._host.guard("listing networks"):
            return frozenset(network.name() for network in self._host.conn().listAllNetworks())

    def make_network(self, name: str, xml: str) -> None:
        """Make a transient network unless it is there."""
        with self._host.guard("making an isolated network"):
            if name not in self.network_names():
                self._host.conn().networkCreateXML(xml)

    def remove_network(self, name: str) -> None:
        """Remove a transient network; a missing one is no error."""
        with self._host.guard("removing an isolated network"):
            try:
                network = self._host.conn().networkLookupByName(name)
                network.destroy()
            except libvirt.libvirtError as problem:
                if problem.get_error_code() != libvirt.VIR_ERR_NO_NETWORK:
                    raise

    def pull(self, domain: libvirt.virDomain, disk_id: str) -> tuple[int, int] | None:
        """Begin, or look at, copying all that a running machine's disk takes from below into its top layer.

        Gives (done, total) in bytes while it is under way and None when there is none (any more).
        """
        with self._host.guard("looking at a disk's block job"):
            job = domain.blockJobInfo(disk_id, 0)
        if not job:
            return None
        if job["type"] != libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL:
            detail = f"another block job is running on disk {disk_id}"
            raise DriverFailed(operation="making a machine's disks independent", site=self.name, detail=detail)
        return int(job["cur"]), int(job["end"])

    def begin_pull(self, domain: libvirt.virDomain, disk_id: str) -> None:
        """Begin copying."""
        with self._host.guard("making a machine's disks independent"):
            domain.blockPull(disk_id, 0, 0)

    def abort_pull(self, domain: libvirt.virDomain, disk_id: str) -> None:
        """End copying; what was copied is kept."""
        with self._host.guard("ending a block job"):
            _ignoring(lambda: domain.blockJobAbort(disk_id, 0), libvirt.VIR_ERR_OPERATION_INVALID)

    def unmark(self, domain: libvirt.virDomain, uri: str) -> None:
        """Remove the driver's mark."""
        with self._host.guard("changing a machine's metadata"):
            kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
            flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
            if domain.isActive():
                flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
            _ignoring(lambda: domain.setMetadata(kind, None, None, uri, flags), libvirt.VIR_ERR_NO_DOMAIN_METADATA)


def _ignoring(call: Callable[[], object], code: int) -> None:
    try:
        call()
    except libvirt.libvirtError as problem:
        if problem.get_error_code() != code:
            raise


def disks_of(xml: str) -> Mapping[str, str]:
    """Paths of a domain's disks by id."""
    return {disk.id: disk.path for disk in parse_domain(xml).hard_disks if disk.path}
