"""The lab: two sites, the link between them, and guests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from xml.etree import ElementTree

from tests.lab import _guest, _images, _kvm, _places
from tests.lab._console import Console, parse_console
from tests.lab._guest import BlankDisk, Kind
from tests.lab._run import COMMAND_SECONDS, LabError, run
from tests.lab._site import LINK, STOP_SECONDS, Site, wait_until

SITE_NAMES = ("a", "b")
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
"""The same in each lab: a link is inside the namespaces of its sites, so labs are isolated from each other."""

BOOT_SECONDS = 90.0
SHUTDOWN_SECONDS = 60.0
GUEST_COMMAND_SECONDS = 60.0
CONSOLE_SECONDS = 0.05
READY = b"LAB-READY "


@dataclass(frozen=True)
class _State:
    """The record of a lab that is up."""

    project: str
    pid: int
    """The process that made it."""
    started: str
    """When that process started, because process ids are reused."""
    stay: bool
    """Whether it stays up after that process has ended."""


class Lab:
    """Two sites, `a` and `b`. A context manager: up on entry, removed on exit."""

    def __init__(self, name: str = "lab", say: Callable[[str], None] = lambda _: None) -> None:
        """Name a lab; nothing is started yet. `say` is called with each longer step."""
        self.name = _places.check_name(name)
        self._say = say
        self._images: _images.Images | None = None
        self.sites: dict[str, Site] = {}
        for site in SITE_NAMES:
            self.sites[site] = Site(self.name, site, ADDRESSES[site], _places.disk_dir(self.name) / "boot")

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.down()
        except LabError as failed:
            if error is None:
                raise
            error.add_note(f"removing the lab also failed: {failed}")

    # -- up and down

    @property
    def _state_file(self) -> Path:
        return _places.run_dir(self.name) / "state.json"

    def _state(self) -> _State | None:
        try:
            return _State(**json.loads(self._state_file.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def owner(self) -> int | None:
        """The running process that uses the lab as a context manager; None for a lab started on the command line."""
        state = self._state()
        return state.pid if state and not state.stay and state.started == _start_time(state.pid) else None

    @property
    def abandoned(self) -> bool:
        """Whether the process that made it, another one of this checkout, ended without removing it."""
        state = self._state()
        return bool(state and not state.stay and state.project == str(_places.PROJECT) and self.owner() is None)

    @property
    def up_by_hand(self) -> bool:
        """Whether this checkout's `up(stay=True)` made it and it has not been removed since."""
        state = self._state()
        return state is not None and state.stay and state.project == str(_places.PROJECT)

    def up(self, *, stay: bool = False) -> None:
        """Start the lab. One left behind by a dead process is removed first.

        With `stay` the lab stays up after this process has ended. Raises LabError if one of that name is in use.
        """
        if os.geteuid() != 0:
            raise LabError("the lab needs root, for namespaces, mounts and libvirtd")
        images = self.images
        with _places.lock("sites"):
            if self.owner() is not None:
                raise LabError(f"lab {self.name} is in use by process {self.owner()}; choose another name")
            state = self._state()
            if state and state.stay:
                raise LabError(f"lab {self.name} is up; remove it (python -m tests.lab down) or choose another name")
            self._remove()
            try:
                self._create(images, stay)
            except BaseException as error:
                try:
                    self._remove()
                except LabError as failed:
                    error.add_note(f"removing the incomplete lab also failed: {failed}")
                raise

    def _create(self, images: _images.Images, stay: bool) -> None:
        _places.run_dir(self.name).mkdir(parents=True)
        state = _State(str(_places.PROJECT), os.getpid(), _start_time(os.getpid()), stay)
        self._state_file.write_text(json.dumps(asdict(state)))
        boot = _places.disk_dir(self.name) / "boot"
        boot.mkdir(parents=True)
        shutil.copy(images.kernel, boot)
        shutil.copy(images.initrd, boot)
        a, b = (self.sites[site] for site in SITE_NAMES)
        for site in (a, b):
            run(["ip", "netns", "add", site.namespace])
        ends = ["netns", a.namespace, "type", "veth", "peer", "name", LINK, "netns", b.namespace]
        run(["ip", "link", "add", LINK, *ends])
        for site in (a, b):
            run(["ip", "-n", site.namespace, "address", "add", f"{site.address}/24", "dev", LINK])
            run(["ip", "-n", site.namespace, "link", "set", LINK, "up"])
        for site in (a, b):
            self._say(f"site {site.name}: namespaces, replica directories, libvirtd at {site.address}")
            site.create()

    def down(self) -> None:
        """Remove the whole lab, whichever process made it. Does nothing if there is none."""
        with _places.lock("sites"):
            self._remove()

    def _remove(self) -> None:
        state = self._state()
        if state and state.project != str(_places.PROJECT):
            raise LabError(f"lab {self.name} belongs to another checkout: {state.project}")
        failed: list[LabError] = []
        for site in self.sites.values():
            try:
                site.destroy()
            except LabError as error:
                failed.append(error)
        if failed:
            raise LabError("\n".join(str(error) for error in failed))
        for directory in (_places.disk_dir(self.name), _places.run_dir(self.name)):
            if directory.exists():
                shutil.rmtree(directory)
            with contextlib.suppress(OSError):  # never made, or not empty because of other labs
                directory.parent.rmdir()

    @property
    def images(self) -> _images.Images:
        """The guests' images, built on first use."""
        if self._images is None:
            self._images = _images.build_images(self._say)
        return self._images

    # -- the link

    def cut(self, *, carrier: bool = True) -> None:
        """Cut the link: packets are dropped silently. Without `carrier` the hosts see their cable unplugged."""
        for site in self.sites.values():
            if carrier:
                run(["tc", "-n", site.namespace, "qdisc", "replace", "dev", LINK, "root", "pfifo", "limit", "0"])
            else:
                run(["ip", "-n", site.namespace, "link", "set", LINK, "down"])

    def restore(self) -> None:
        """Restore the link at full speed."""
        for site in self.sites.values():
            run(["ip", "-n", site.namespace, "link", "set", LINK, "up"])
            run(["tc", "-n", site.namespace, "qdisc", "del", "dev", LINK, "root"], check=False)

    def slow(self, mbit: float) -> None:
        """Limit the link to `mbit` megabits a second in each direction; `restore` removes the limit."""
        rate = f"{int(mbit * 1000)}kbit"
        for site in self.sites.values():
            shape = ["root", "tbf", "rate", rate, "burst", "128kb", "latency", "200ms"]
            run(["tc", "-n", site.namespace, "qdisc", "replace", "dev", LINK, *shape])

    # -- sites

    def uri(self, site: str) -> str:
        """libvirt URI of a site, for use on the host outside the sites."""
        return self.sites[site].uri

    def run_in(
        self,
        site: str,
        argv: Sequence[str | Path],
        *,
        timeout: float = COMMAND_SECONDS,
        check: bool = True,
        text: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside a site. Raises CommandFailed."""
        return run(self.sites[site].enter(argv), timeout=timeout, check=check, text=text, env=env)

    def popen_in(
        self,
        site: str,
        argv: Sequence[str | Path],
        *,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command inside a site; its pid is the command's own, so that it can be killed."""
        return subprocess.Popen(self.sites[site].enter(argv), stdin=stdin, stdout=stdout, stderr=stderr, env=env)

    def host_path(self, site: str, path: str | Path) -> Path:
        """The host's path to an absolute path of a site."""
        return self.sites[site].host_path(path)

    def site_down(self, site: str) -> None:
        """The site fails: its QEMUs and its libvirtd are killed immediately. Commands that tests run in it continue."""
        self.sites[site].burn()

    def site_up(self, site: str) -> None:
        """The host returns: libvirtd starts, together with the network and the guests with autostart."""
        self.sites[site].start_libvirtd()

    # -- guests

    def define_guest(
        self,
        site: str,
        kind: Kind | str,
        name: str,
        *,
        extra_disks: Sequence[BlankDisk] = (),
        rate: float = 10,
        memory: int | None = None,
        autostart: bool = False,
    ) -> str:
        """Make the guest's disks and define it; `rate` is rows a second, `memory` bytes. Returns the XML given."""
        kind = Kind(kind)
        where = self.sites[site]
        if where.virsh("domstate", name, check=False).returncode == 0:
            raise LabError(f"{name} is already defined at site {site}")
        disks = _guest.disks_of(kind, name, self.images, extra_disks)
        for disk in disks:
            path = where.disk_dir / disk.path.lstrip("/")
            if disk.template is not None:
                run(["cp", "--sparse=always", disk.template, path])
            else:
                run(["qemu-img", "create", "-q", "-f", disk.format, path, str(disk.size)])
        virtualised = _kvm.kvm_boots(self.images)
        xml = _guest.domain_xml(kind, name, disks, rate=rate, virtualised=virtualised, memory=memory)
        where.virsh("define", "/dev/stdin", text=xml)
        if autostart:
            where.virsh("autostart", name)
        return xml

    def remove_guest(self, site: str, name: str) -> None:
        """Stop a guest immediately and remove its definition, checkpoints' metadata, NVRAM, disks and console."""
        where = self.sites[site]
        if self.state(site, name) != "shut off":
            where.virsh("destroy", name)
        where.virsh("undefine", name, "--nvram", "--managed-save", "--checkpoints-metadata", "--snapshots-metadata")
        for pattern in (f"srv/images/{name}-*", f"srv/console/{name}.log"):
            for path in where.disk_dir.glob(pattern):
                path.unlink()

    def _console_path(self, site: str, name: str) -> Path:
        return self.sites[site].disk_dir / _guest.console_path(name).lstrip("/")

    def console(self, site: str, name: str) -> Console:
        """The guest's console at this site so far; empty if it never ran there."""
        return parse_console(_tail(self._console_path(site, name)).decode(errors="replace"))

    def start(self, site: str, name: str, *, wait: bool = True, timeout: float = BOOT_SECONDS) -> None:
        """Start a guest; with `wait`, return after it has audited its disks and started its workload."""
        before = _tail(self._console_path(site, name)).count(READY)
        self.sites[site].virsh("start", name)
        if wait:
            self.wait_ready(site, name, boots=before + 1, timeout=timeout)

    def wait_ready(self, site: str, name: str, *, boots: int = 1, timeout: float = BOOT_SECONDS) -> None:
        """Wait until the console at this site shows this many boots of the guest. Raises LabError with its last
        lines."""
        path = self._console_path(site, name)
        try:
            wait_until(lambda: _tail(path).count(READY) >= boots, f"{name} is ready", timeout, CONSOLE_SECONDS)
        except LabError as error:
            raise LabError(f"{error}\nconsole:\n{_tail(path, 2000).decode(errors='replace')}") from error

    def wait_row(self, site: str, name: str, row: int, *, timeout: float = BOOT_SECONDS) -> None:
        """Wait until the guest has acknowledged this row at this site. Raises LabError."""
        path = self._console_path(site, name)

        def acknowledged() -> bool:
            last = parse_console(_tail(path, 4096).decode(errors="replace")).last_ack
            return last is not None and last.row >= row

        wait_until(acknowledged, f"{name} has written row {row}", timeout, CONSOLE_SECONDS)

    def state(self, site: str, name: str) -> str:
        """The guest's state, as libvirt names it. Raises CommandFailed for a guest unknown at the site."""
        return self.sites[site].virsh("domstate", name).stdout.strip()

    def shutdown(self, site: str, name: str, *, timeout: float = SHUTDOWN_SECONDS) -> float:
        """Press the guest's power button and wait until it is off; returns the seconds it took."""
        begun = time.monotonic()
        pid = self.qemu_pid(site, name)
        self.sites[site].virsh("shutdown", name, "--mode", "acpi")
        self._wait_off(site, name, pid, timeout)
        return time.monotonic() - begun

    def _wait_off(self, site: str, name: str, pid: int, timeout: float) -> None:
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"QEMU of {name} has ended", timeout)
        wait_until(lambda: self.state(site, name) == "shut off", f"{name} is shut off", STOP_SECONDS)

    def qemu_pid(self, site: str, name: str) -> int:
        """The QEMU process of a running guest. Raises LabError."""
        try:
            return int((self.sites[site].run_dir / "libvirt/qemu" / f"{name}.pid").read_text())
        except (OSError, ValueError) as error:
            raise LabError(f"no QEMU process of {name} at site {site}: {error}") from error

    def kill_qemu(self, site: str, name: str) -> None:
        """SIGKILL the guest's QEMU, like a power failure, and wait until libvirt has noticed."""
        pid = self.qemu_pid(site, name)
        os.kill(pid, signal.SIGKILL)
        self._wait_off(site, name, pid, STOP_SECONDS)

    def command(self, site: str, name: str, line: str, *, timeout: float = GUEST_COMMAND_SECONDS) -> str:
        """Run a command line in a running guest and return its output.

        `pause` and `resume` the workload; `rate N` rows a second; `audit` now; `fill PATH OFFSET_MIB MIB` with
        incompressible data; `poweroff`; anything else, up to 1000 bytes, is run by the guest's shell. Raises LabError
        if it fails there.
        """
        xml = ElementTree.fromstring(self.sites[site].virsh("dumpxml", name).stdout)
        source = xml.find(f"devices/channel/target[@name='{_guest.COMMAND_PORT}']/../source")
        path = None if source is None else source.get("path")
        if path is None:
            raise LabError(f"{name} has no command channel at site {site}: is it running?")
        inside = Path(path.replace("/var/lib/libvirt", str(self.sites[site].disk_dir / "lib"), 1))
        directory = os.open(inside.parent, os.O_PATH | os.O_DIRECTORY)
        try:  # through /proc, because a socket's path is limited to 107 bytes
            with socket.socket(socket.AF_UNIX) as channel:
                channel.settimeout(timeout)
                channel.connect(f"/proc/self/fd/{directory}/{inside.name}")
                channel.sendall(line.encode() + b"\n")
                said = b""
                while b"LAB-DONE " not in said or not said.endswith(b"\n"):
                    if not (more := channel.recv(65536)):
                        raise LabError(
                            f"{name} closed the connection at {line!r} after {said.decode(errors='replace')!r}"
                        )
                    said += more
        except OSError as error:
            raise LabError(f"{name} does not run {line!r}: {error}") from error
        finally:
            os.close(directory)
        text, _, status = said.decode(errors="replace").rpartition("LAB-DONE ")
        if int(status):
            raise LabError(f"{name}: {line!r} failed with status {status.strip()}:\n{text}")
        return text


def _start_time(pid: int) -> str:
    """When the process started, in the kernel's ticks; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _tail(path: Path, length: int | None = None) -> bytes:
    """The file's last bytes, or all of it; empty if there is none."""
    try:
        with path.open("rb") as file:
            if length is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - length))
            return file.read()
    except FileNotFoundError:
        return b""


def lab_names() -> list[str]:
    """Names of the labs that exist, completely or in part."""
    names: set[str] = set()
    for parent in (_places.RUN, _places.CACHE / "sites"):
        if parent.is_dir():
            names.update(path.name for path in parent.iterdir() if path.is_dir())
    return sorted(names)
