"""One site: a network, mount and UTS namespace with its own libvirtd and replica directories."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab import _anchor, _places
from tests.lab._disks import MIB
from tests.lab._run import COMMAND_SECONDS, LabError, run

START_SECONDS = 30.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02
LINK = "wan0"
BRIDGE = "virbr-lab"

# Hidden in a site and replaced by the site's own.
LIBVIRT_DIRS = {
    "/etc/libvirt": "etc",
    "/var/lib/libvirt": "lib",
    "/var/cache/libvirt": "cache",
    "/var/log/libvirt": "log",
}


@dataclass(frozen=True)
class ReplicaDir:
    """A directory at a site, on a separate file system."""

    name: str
    filesystem: str
    size: int

    @property
    def path(self) -> str:
        """Its path inside the site."""
        return f"/srv/{self.name}"


REPLICA_DIRS = (
    ReplicaDir("xfs", "xfs", 8192 * MIB),
    ReplicaDir("ext4", "ext4", 8192 * MIB),
    ReplicaDir("small", "ext4", 96 * MIB),
    ReplicaDir("small-xfs", "xfs", 320 * MIB),  # mkfs.xfs refuses less than 300 MiB
)

LIBVIRTD_CONF = """\
listen_tls = 0
listen_tcp = 1
listen_addr = "{address}"
auth_tcp = "none"
auth_unix_rw = "none"
unix_sock_group = "root"
host_uuid = "{uuid}"
"""

# No cgroups, no namespaces per guest: there is no systemd to ask for them, and a site is a namespace already.
# The console is written to its file directly, without virtlogd.
QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 1
remember_owner = 0
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
stdio_handler = "file"
vnc_listen = "127.0.0.1"
auto_dump_path = "/var/lib/libvirt/qemu/dump"
"""

NETWORK_XML = f"""\
<network>
  <name>lab</name>
  <bridge name='{BRIDGE}' stp='off' delay='0'/>
</network>
"""


def wait_until(true: Callable[[], bool], what: str, timeout: float, poll: float = POLL_SECONDS) -> None:
    """Poll for a condition of other processes. Raises LabError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not true():
        if time.monotonic() > end:
            raise LabError(f"{what}: not true after {timeout:g} s")
        time.sleep(poll)


@dataclass
class Site:
    """A site of a lab. Made by `Lab`; every attribute is derived from the names."""

    lab: str
    name: str
    address: str
    boot_files: Path
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    @property
    def namespace(self) -> str:
        """Name of the network namespace."""
        return _places.namespace(self.lab, self.name)

    @property
    def disk_dir(self) -> Path:
        """The site's files, as the host sees them."""
        return _places.disk_dir(self.lab) / self.name

    @property
    def run_dir(self) -> Path:
        """The site's /run, as the host sees it."""
        return _places.run_dir(self.lab) / self.name

    @property
    def socket(self) -> Path:
        """libvirtd's socket, as the host sees it."""
        return self.run_dir / "libvirt/libvirt-sock"

    @property
    def uri(self) -> str:
        """libvirt URI that works on the host, outside the sites."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def inner_uri(self) -> str:
        """libvirt URI that works inside this site."""
        return "qemu:///system"

    @property
    def remote_uri(self) -> str:
        """libvirt URI that works inside the other site, over the link."""
        return f"qemu+tcp://{self.address}/system"

    # -- namespaces

    def processes(self) -> list[int]:
        """All processes inside the site's network namespace."""
        done = run(["ip", "netns", "pids", self.namespace], check=False)
        return [int(pid) for pid in done.stdout.split()]

    @property
    def _anchor_file(self) -> Path:
        return _places.run_dir(self.lab) / f"{self.name}.anchor"

    @property
    def _commands_file(self) -> Path:
        return _places.run_dir(self.lab) / f"{self.name}.commands"

    def anchor(self) -> int:
        """Process that holds the site's namespaces. Raises LabError if the site is not up."""
        try:
            pid = int(self._anchor_file.read_text())
            here = Path(f"/run/netns/{self.namespace}").stat()
            there = Path(f"/proc/{pid}/ns/net").stat()
        except (OSError, ValueError) as error:
            raise LabError(f"site {self.name} of lab {self.lab} is not up: {error}") from error
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise LabError(f"site {self.name} of lab {self.lab} is not up: process {pid} is not its anchor")
        return pid

    def host_path(self, path: str | Path) -> Path:
        """The host's path to an absolute path of the site, including what is mounted only there."""
        return Path(f"/proc/{self.anchor()}/root") / str(path).lstrip("/")

    def enter(self, argv: Sequence[str | Path]) -> list[str]:
        """The command line that runs `argv` inside the site; the process keeps its id."""
        pid = self.anchor()
        words = [str(word) for word in argv]
        return ["nsenter", "-t", str(pid), "--net", "--mount", "--uts", f"--wdns={Path.cwd()}", "--", *words]

    def _inside(self, *argv: str | Path, check: bool = True) -> None:
        run(self.enter(argv), check=check)

    # -- up and down

    def create(self) -> None:
        """Make the namespaces and directories, mount, start libvirtd. The lab makes the network link."""
        for directory in (self.disk_dir, self.run_dir / "libvirt"):
            directory.mkdir(parents=True)
        self._start_anchor()
        self._prepare_libvirt_dirs()
        self._mount_all()
        self.start_libvirtd()
        self.virsh("net-define", "/dev/stdin", text=NETWORK_XML)
        self.virsh("net-autostart", "lab")
        self.virsh("net-start", "lab")

    def _start_anchor(self) -> None:
        command = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--mount", "--uts"]
        command += ["--propagation", "private", sys.executable, "-I", _anchor.__file__]
        command += [str(self._commands_file), str(self.disk_dir / "daemons.log")]
        anchor = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._children.append(anchor)
        assert anchor.stdout is not None
        assert anchor.stderr is not None
        if anchor.stdout.readline() != b"ready\n":
            raise LabError(f"cannot make the namespaces of site {self.name}: {anchor.stderr.read().decode()}")
        anchor.stdout.close()
        anchor.stderr.close()
        self._anchor_file.write_text(f"{anchor.pid}\n")

    def _prepare_libvirt_dirs(self) -> None:
        for part in (*LIBVIRT_DIRS.values(), "srv"):
            (self.disk_dir / part).mkdir()
        etc = self.disk_dir / "etc"
        host_uuid = uuid.uuid5(uuid.NAMESPACE_OID, f"asr-lab/{self.lab}/{self.name}")
        (etc / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(address=self.address, uuid=host_uuid))
        (etc / "qemu.conf").write_text(QEMU_CONF)
        for sub in ("images", "console", "boot", *(replica.name for replica in REPLICA_DIRS)):
            (self.disk_dir / "srv" / sub).mkdir()

    def _mount_all(self) -> None:
        inside = self._inside
        inside("hostname", f"site-{self.name}")
        # Otherwise this mount namespace would keep the network namespaces of other labs alive after those are removed.
        inside("umount", "-l", "/run/netns", check=False)
        # A view of this network namespace, where libvirt looks for its bridges; it also hides the host's cgroups.
        inside("mount", "-t", "sysfs", "sysfs", "/sys")
        # Not the host's /run: libvirt would register its guests on the host's system bus.
        inside("mount", "--bind", self.run_dir, "/run")
        for path, part in LIBVIRT_DIRS.items():
            inside("mount", "--bind", self.disk_dir / part, path)
        inside("mount", "--bind", self.disk_dir / "srv", "/srv")
        inside("mount", "--bind", self.boot_files, "/srv/boot")
        inside("mount", "-o", "remount,bind,ro", "/srv/boot")
        for replica in REPLICA_DIRS:
            self._mount_replica_dir(replica)
        # No path leads to another site or another lab.
        inside("mount", "-t", "tmpfs", "-o", "ro,size=4k", "none", _places.CACHE / "sites")

    def _mount_replica_dir(self, replica: ReplicaDir) -> None:
        backing = self.disk_dir / f"{replica.name}.img"
        with backing.open("wb") as file:
            file.truncate(replica.size)
        if replica.filesystem == "xfs":
            run(["mkfs.xfs", "-q", "-m", "reflink=1", backing])
        else:
            run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", backing])
        self._inside("mount", "-o", "loop", backing, replica.path)

    def disk_loses_power(self, name: str) -> None:
        """Stop the XFS of that replica directory immediately, as in a power cut: its log is not flushed and its memory
        is lost; durable and already written data stay."""
        self._inside("xfs_io", "-x", "-c", "shutdown", self._replica_dir(name).path)

    def disk_gets_power(self, name: str) -> None:
        """Mount it again from its disk: XFS replays its log. Raises LabError if one of its files stays open."""
        replica, backing = self._replica_dir(name), self.disk_dir / f"{name}.img"
        # A killed process is no longer listed once its first thread has ended; other threads may still hold files.
        unmount = self.enter(["umount", replica.path])
        wait_until(lambda: run(unmount, check=False).returncode == 0, f"{replica.path} can be unmounted", 30, poll=0.2)
        device = run(["losetup", "--find", "--show", backing]).stdout.strip()  # the site does not see the image
        try:
            self._inside("mount", device, replica.path)
        finally:
            run(["losetup", "--detach", device])  # once it is unmounted

    @staticmethod
    def _replica_dir(name: str) -> ReplicaDir:
        return next(item for item in REPLICA_DIRS if item.name == name)

    def start_libvirtd(self) -> None:
        """Start the daemon, as at a host's boot, and wait until it answers."""
        self._inside("ip", "link", "set", "lo", "up")
        self.anchor()  # otherwise no process would read the command, and the writer would block forever
        with self._commands_file.open("r+b", buffering=0) as commands:
            commands.write(b"libvirtd --listen -p /run/libvirtd.pid\n")

        def answers() -> bool:
            return self.virsh("uri", check=False).returncode == 0

        wait_until(answers, f"libvirtd of site {self.name} answers (see {self.disk_dir}/daemons.log)", START_SECONDS)

    def virsh(
        self, *words: str | Path, check: bool = True, text: str | None = None, timeout: float = COMMAND_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run virsh against this site, from the host. Raises CommandFailed."""
        return run(["virsh", "-q", "-c", self.uri, *words], check=check, text=text, timeout=timeout)

    def hypervisor_processes(self) -> list[int]:
        """The site's libvirtd and its QEMUs."""
        found = []
        for pid in self.processes():
            try:
                program = Path(f"/proc/{pid}/exe").readlink().name
            except OSError:
                continue
            if program == "libvirtd" or program.startswith("qemu-system"):
                found.append(pid)
        return found

    def burn(self) -> None:
        """The host fails: libvirtd and every QEMU are killed; everything in memory (/run, bridges) is lost."""
        self._kill(self.hypervisor_processes)
        run(["ip", "-n", self.namespace, "link", "del", BRIDGE], check=False)
        for entry in self.run_dir.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (self.run_dir / "libvirt").mkdir()

    def _kill(self, find: Callable[[], list[int]]) -> None:
        def gone() -> bool:
            for pid in (left := find()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            for child in self._children:
                child.poll()
            return not left

        wait_until(gone, f"processes of site {self.name} are gone", STOP_SECONDS)

    def destroy(self) -> None:
        """Remove everything of the site, whichever process made it; does nothing if the site does not exist."""
        if Path(f"/run/netns/{self.namespace}").exists():
            self._kill(lambda: [pid for pid in self.processes() if not self._is_anchor(pid)])
            with contextlib.suppress(LabError):  # no anchor and therefore no mounts
                # The kernel would remove the mounts with the namespace, but at an unknown time.
                self._inside("umount", "-l", "/srv/boot", *(replica.path for replica in REPLICA_DIRS), check=False)
            self._kill(self.processes)
            for child in self._children:  # is no longer in the namespace, but may not have ended yet
                child.wait(STOP_SECONDS)
            self._children.clear()
            run(["ip", "netns", "del", self.namespace])
        wait_until(lambda: not self._loops(), f"loop devices of site {self.name} are free", STOP_SECONDS)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.rmtree(self.disk_dir, ignore_errors=True)
        self._anchor_file.unlink(missing_ok=True)
        self._commands_file.unlink(missing_ok=True)

    def _is_anchor(self, pid: int) -> bool:
        try:
            return pid == self.anchor()
        except LabError:
            return False

    def _loops(self) -> list[str]:
        listed = run(["losetup", "--list", "--noheadings", "--raw", "--output", "NAME,BACK-FILE"]).stdout
        return [line for line in listed.splitlines() if f"{self.disk_dir}/" in line]
