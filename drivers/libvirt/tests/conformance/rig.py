"""The rig of the libvirt driver: a guest at site a over the link, replicas at site b, where this runs (inside.py)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from xml.etree import ElementTree

import libvirt

from asr_driver_libvirt.driver import LibvirtDriver
from asr_driver_libvirt.site import LibvirtSite
from asr_driver_libvirt.source.view import LibvirtDiskView, LibvirtView
from asrcore.driver import Closing, CycleWriter, Instance
from asrcore.model.machine import Machine
from asrcore.model.point import Consistency
from asrcore.testing.conformance import ConformanceRig
from asrcore.units import GiB, KiB, MiB
from tests.lab import Kind, Lab
from tests.lab._console import parse_audit

__all__ = ["LibvirtRig"]

NAME = "kit"
EXTRA = "sdb"
OTHER_NETWORK = "dmz"
COMMAND_SECONDS = 60.0
REMOTE = "qemu+tcp://10.77.0.1/system"

# The lab's disks are 256 + 64 + 256 MiB, and the kit reads all of them about 300 times.
SHRINK = f"""
for disk in vda sda; do
    qemu-img convert -O raw {NAME}-$disk.qcow2 {NAME}-$disk.raw
    e2fsck -fy {NAME}-$disk.raw || test $? = 1
    resize2fs {NAME}-$disk.raw 32M
    truncate -s 32M {NAME}-$disk.raw
    qemu-img convert -O qcow2 -f raw {NAME}-$disk.raw {NAME}-$disk.qcow2
    rm {NAME}-$disk.raw
done
truncate -s 16M {NAME}-vdb.raw
"""

# QEMU writes cached qcow2 tables at a flush; `sync` flushes only where a file system requests it.
FLUSH = "sync; for disk in vda vdb sda; do dd if=/dev/null of=/dev/$disk conv=fsync,notrunc; done"

WRITE = (
    "set -e; for place in lab-ledger lab-scratch; do "
    "dd if=/dev/urandom of=/mnt/$place/{name} bs=64k count=2 conv=fsync; done; "
    "dd if=/dev/urandom of=/dev/vdb bs=64k seek={at} count=2 conv=fsync,notrunc; sync"
)


class LibvirtRig(ConformanceRig):
    """Machine `kit`: ext4 on qcow2 (vda), no file system on raw (vdb), ext4 with discard on SCSI (sda). Its workload is
    paused: the kit decides when it writes."""

    consistency = Consistency.FILESYSTEM
    driver = LibvirtDriver()

    def __init__(self, lab: Lab, replica_dir: str) -> None:
        super().__init__()
        self._lab = lab
        self._replica_dir = Path(replica_dir)
        self._random = random.Random(20261202)
        self._number = 0
        self._gone = 0
        """Number of the file to discard next: it was written before any mark."""
        self._extra = ""
        with ExitStack() as stack:
            # Direct access to site a, without the driver.
            self._platform = libvirt.open(REMOTE)
            stack.callback(self._platform.close)
            self._start_guest(stack)
            self._define_network(stack)
            self._source, self._target = self._connect()
            self._stack = stack.pop_all()

    def _start_guest(self, stack: ExitStack) -> None:
        self._lab.define_guest("a", Kind.BIOS_DIRECT, NAME, rate=0)
        stack.callback(self._lab.remove_guest, "a", NAME)
        self._at_a("sh", "-ec", f"cd /srv/images; {SHRINK}")
        self._lab.start("a", NAME)
        self._guest("rate 50")
        self._lab.wait_row("a", NAME, 30)  # content for an audit
        self._guest("rate 0")
        self._guest(f"dd if=/dev/urandom of=/mnt/lab-scratch/gone{self._gone} bs=64k count=8 conv=fsync")
        self.machine_id = self._at_a("virsh", "domuuid", NAME).strip()
        self.wait_for_guest(self.machine_id)

    def _define_network(self, stack: ExitStack) -> None:
        xml = f"<network><name>{OTHER_NETWORK}</name><bridge name='virbr-{OTHER_NETWORK}'/></network>"
        self._virsh("net-define", "/dev/stdin", text=xml)
        stack.callback(self._virsh, "net-undefine", OTHER_NETWORK)
        self._virsh("net-start", OTHER_NETWORK)
        stack.callback(self._stop_network)

    def _stop_network(self) -> None:
        if OTHER_NETWORK in self._virsh("net-list", "--name").split():  # not after a restart of the host's services
            self._virsh("net-destroy", OTHER_NETWORK)

    def _connect(self) -> tuple[LibvirtSite, LibvirtSite]:
        here = {"uri": "qemu:///system", "replica_dir": str(self._replica_dir)}
        source = self.driver.connect("a", {"uri": REMOTE})
        return source, self.driver.connect("b", here)

    def close(self) -> None:
        super().close()
        with self._stack:
            self._source.close()
            self._target.close()

    # -- commands: at site a, in its guest, and here at site b

    def _at_a(self, *command: str) -> str:
        return self._lab.run_in("a", command).stdout

    def _guest(self, line: str) -> str:
        """A guest that is still booting runs the command when it is up."""
        return self._lab.command("a", NAME, line)

    def _here(self, *command: str | Path, text: str | None = None) -> str:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _virsh(self, *words: str, text: str | None = None) -> str:
        return self._here("virsh", "-q", *words, text=text)

    # -- both

    @property
    def source_site(self) -> LibvirtSite:
        return self._source

    @property
    def target_site(self) -> LibvirtSite:
        return self._target

    def restart(self) -> None:
        for site in (self._source, self._target):
            site.close()  # like the end of a process: it closes the socket and leaves everything at the host
        self._source, self._target = self._connect()

    def abandon(self, handle: Closing) -> None:
        if isinstance(handle, CycleWriter):
            handle.close()  # flushes nothing: the lock is released and its helpers end, as when the process dies
        elif isinstance(handle, LibvirtView):
            for machine in handle.machines.values():
                for disk in machine.disks.values():
                    assert isinstance(disk, LibvirtDiskView)
                    disk.close()  # its sockets; the backup job stays

    # -- source

    def wait_for_guest(self, machine_id: str) -> None:
        # A channel that a guest opens while a backup runs blocks libvirt 9's thread for events for 30 s.
        domain, end = self._platform.lookupByName(NAME), time.monotonic() + self.boot_timeout
        while domain.isActive() and time.monotonic() < end:
            xml = ElementTree.fromstring(domain.XMLDesc())
            if [item.get("state") for item in xml.findall("devices/channel/target")] == ["connected"] * 2:
                return
            time.sleep(0.05)
        raise AssertionError(f"the guest is off, or has not opened its channels within {self.boot_timeout:g} s")

    def change(self, machine_id: str) -> None:
        self._number += 1
        self._guest(WRITE.format(name="change", at=128 + self._number % 64))

    def discard(self, machine_id: str) -> None:
        gone, self._gone = self._gone, self._gone + 1
        self._guest(
            f"set -e; cd /mnt/lab-scratch; dd if=/dev/urandom of=gone{self._gone} bs=64k count=8 conv=fsync; "
            f"rm gone{gone}; sync; fstrim -v ."
        )

    @contextmanager
    def still(self, machine_id: str) -> Iterator[None]:
        self._guest(FLUSH)
        yield

    def sha256(self, machine_id: str, disk_id: str) -> str:
        path, fmt = {"vdb": ("vdb.raw", "raw")}.get(disk_id, (f"{disk_id}.qcow2", "qcow2"))
        image, copy = f"/srv/images/{NAME}-{path}", "/srv/images/copy"
        self._at_a("qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", image, copy)
        digest = self._at_a("sha256sum", copy).split()[0]
        self._at_a("rm", copy)
        return digest

    def lose_tracking(self, machine_id: str) -> None:
        self._lab.kill_qemu("a", NAME)
        self._lab.start("a", NAME)
        self.wait_for_guest(machine_id)

    def lose_view(self, machine_id: str) -> None:
        domain, end = self._platform.lookupByName(NAME), time.monotonic() + COMMAND_SECONDS
        domain.abortJob()
        # It returns immediately, and a QEMU 7.2 that stops serving during a connection attempt hangs forever.
        while _is_backed_up(domain):
            assert time.monotonic() < end, "the backup job does not end"
            time.sleep(0.05)

    def leftovers(self, machine_id: str) -> list[str]:
        checkpoints = self._at_a("virsh", "-q", "checkpoint-list", NAME, "--name").split()
        job = _is_backed_up(self._platform.lookupByName(NAME))
        query = json.dumps({"execute": "query-named-block-nodes", "arguments": {"flat": True}})
        nodes = json.loads(self._at_a("virsh", "-q", "qemu-monitor-command", NAME, query))["return"]
        bitmaps = {f"bitmap {bitmap.get('name')}" for node in nodes for bitmap in node.get("dirty-bitmaps", ())}
        known = {f"{NAME}-vda.qcow2", f"{NAME}-vdb.raw", f"{NAME}-sda.qcow2", self._extra}
        files = set(self._at_a("ls", "/srv/images").split()) - known
        return [*checkpoints, *sorted(bitmaps), *sorted(files), *(["backup job"] if job else [])]

    def add_disk(self, machine_id: str) -> str:
        self._plug()
        return EXTRA

    def _plug(self) -> None:
        self._number += 1
        self._extra = f"{NAME}-extra{self._number}.qcow2"
        path = f"/srv/images/{self._extra}"
        self._at_a("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
        driver = ["--driver", "qemu", "--subdriver", "qcow2", "--targetbus", "scsi", "--persistent"]
        self._at_a("virsh", "-q", "attach-disk", NAME, path, EXTRA, *driver)
        self._guest(
            f"for i in 1 2 3 4 5 6 7 8 9; do test -b /dev/{EXTRA} && break; sleep 0.3; done; test -b /dev/{EXTRA} && "
            f"dd if=/dev/urandom of=/dev/{EXTRA} bs=64k seek={self._number % 32} count=4 conv=fsync,notrunc"
        )

    def replace_disk(self, machine_id: str, disk_id: str) -> None:
        self.remove_disk(machine_id, disk_id)
        self._plug()

    def grow_disk(self, machine_id: str, disk_id: str) -> None:
        self._at_a("virsh", "-q", "blockresize", NAME, disk_id, "12M")

    def remove_disk(self, machine_id: str, disk_id: str) -> None:
        self._at_a("virsh", "-q", "detach-disk", NAME, disk_id, "--persistent")
        self._at_a("rm", f"/srv/images/{self._extra}")
        self._extra = ""

    # -- power and quarantine

    @contextmanager
    def ignore_shutdown(self, machine_id: str) -> Iterator[None]:
        button, program = "/sys/firmware/acpi/interrupts/ff_pwr_btn", "/sbin/shutdown"
        self._guest(f"set -e; echo disable > {button}; mv {program} {program}.away")  # neither ACPI nor the agent
        try:
            yield
        finally:
            self._guest(f"set -e; mv {program}.away {program}; echo clear > {button} || true; echo enable > {button}")

    def start_past_driver(self, machine_id: str) -> None:
        self._lab.start("a", NAME, wait=False)

    # -- target

    @contextmanager
    def full_target(self) -> Iterator[None]:
        ballast = self._replica_dir / "ballast"
        fill(ballast, leave=MiB)
        try:
            yield
        finally:
            ballast.unlink()

    @contextmanager
    def read_only_target(self) -> Iterator[None]:
        self._here("mount", "-o", "remount,ro", self._replica_dir)
        try:
            yield
        finally:
            self._here("mount", "-o", "remount,rw", self._replica_dir)

    @contextmanager
    def unreachable_target(self) -> Iterator[None]:
        self._lab.site_down("b")
        try:
            yield
        finally:
            self._lab.site_up("b")

    # -- failover

    def change_instance(self, instance: Instance) -> None:
        self._lab.command("b", instance.name, WRITE.format(name="instance", at=200))

    def check_instance(self, instance: Instance) -> None:
        audit = parse_audit(self._lab.command("b", instance.name, "audit"))
        assert audit.intact, audit
        assert audit.last >= 30, audit

    def target_sha256(self, machine_id: str, disk_id: str) -> str:
        image, fmt = self._disks(machine_id)[disk_id]
        with tempfile.TemporaryDirectory(prefix="asr-kit-") as work:
            copy = Path(work) / "copy"
            self._here("qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", image, copy)
            with copy.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

    def _disks(self, machine_id: str) -> dict[str, tuple[Path, str]]:
        """Image and format of each disk of a machine here."""
        found = {}
        for disk in ElementTree.fromstring(self._virsh("dumpxml", "--inactive", machine_id)).findall("devices/disk"):
            target, source, driver = (disk.find(tag) for tag in ("target", "source", "driver"))
            assert target is not None
            assert source is not None
            assert driver is not None
            found[target.get("dev", "")] = (Path(source.get("file", "")), driver.get("type", ""))
        return found

    def remove_target_machine(self, machine_id: str) -> None:
        if machine_id not in self._virsh("list", "--all", "--uuid").split():
            return
        images = [path for path, _ in self._disks(machine_id).values()]
        if machine_id in self._virsh("list", "--uuid").split():
            self._virsh("destroy", machine_id)
        forget = ["--nvram", "--managed-save", "--checkpoints-metadata", "--snapshots-metadata"]
        self._virsh("undefine", machine_id, *forget)
        for path in images:
            path.unlink(missing_ok=True)
            if path.parent.parent == self._replica_dir / "machines":  # made by a failover: a separate directory
                shutil.rmtree(path.parent, ignore_errors=True)

    def make_target_machine(self, machine: Machine) -> str:
        machine_id = machine.id if _is_uuid(machine.id) else str(uuid.uuid5(uuid.NAMESPACE_URL, machine.id))
        disks = []
        for disk in machine.disks:
            path = f"/srv/images/{machine_id}-{disk.id}.raw"
            with Path(path).open("wb") as file:
                file.truncate(disk.size)
                file.seek(8 * KiB)
                file.write(self._random.randbytes(min(200 * KiB, disk.size // 2)))
            bus = "scsi" if disk.id.startswith("sd") else "virtio"
            disks.append(
                f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/>"
                f"<target dev='{disk.id}' bus='{bus}'/></disk>"
            )
        self._virsh(
            "define",
            "/dev/stdin",
            text=f"<domain type='qemu'><name>{machine.name}</name><uuid>{machine_id}</uuid>"
            f"<memory unit='MiB'>64</memory>"
            f"<vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os><devices>{''.join(disks)}</devices></domain>",
        )
        return machine_id

    def other_network(self) -> str:
        return OTHER_NETWORK

    def target_leftovers(self, replica_id: str) -> list[str]:
        files = [
            str(path)
            for place in (self._replica_dir, Path("/srv/console"), Path("/srv/images"))
            for path in place.rglob("*")
        ]
        domains = self._virsh("list", "--all", "--name").split()
        return sorted([*files, *domains, *self._virsh("net-list", "--all", "--name").split()])


def fill(ballast: Path, *, leave: int) -> None:
    """Fill a file system except for this many bytes."""
    with ballast.open("wb") as file:
        taken, step = 0, GiB
        while step >= 4 * KiB:
            # Space of files deleted just before is available only once the deletion is durable.
            subprocess.run(["sync", "-f", ballast], timeout=COMMAND_SECONDS, check=True)
            try:
                os.posix_fallocate(file.fileno(), taken, step)
                taken += step
            except OSError as problem:
                if problem.errno != errno.ENOSPC:
                    raise
                step //= 2
        file.truncate(taken - leave)  # not by statvfs: part of what it reports as free is reserved by the file system
    subprocess.run(["sync", "-f", ballast], timeout=COMMAND_SECONDS, check=True)


def _is_backed_up(domain: libvirt.virDomain) -> bool:
    try:
        return bool(domain.backupGetXMLDesc())
    except libvirt.libvirtError:
        return False


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
