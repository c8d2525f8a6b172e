"""The lab's physical server: a QEMU process at a site, unknown to libvirt and reached by SSH only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.lab import _kvm
from tests.lab._console import Audit, Console, parse_audit, parse_console
from tests.lab._lab import Lab
from tests.lab._run import COMMAND_SECONDS, LabError, run
from tests.lab._server_image import ADDRESS, AREAS, GATEWAY, MAC, ROWS, UUID, ServerImage, build_server_image
from tests.lab._site import BRIDGE, STOP_SECONDS, wait_until

BOOT_SECONDS = 240.0
MEMORY_MIB = 512


class Server:
    """One physical server at a site of a lab that is up. Its address is the same at every site."""

    address = ADDRESS
    mac = MAC
    uuid = UUID

    def __init__(self, lab: Lab, site: str = "a", name: str = "server1") -> None:
        """Copy its disks, without starting it."""
        self.lab, self.site, self.name = lab, site, name
        self.image: ServerImage = build_server_image()
        where = lab.sites[site]
        self._disks = {
            serial: where.disk_dir / f"srv/images/{name}-{serial}.raw" for serial in ("ROOT0001", "DATA0001")
        }
        for template, path in zip((self.image.root, self.image.data), self._disks.values(), strict=True):
            run(["cp", "--sparse=always", template, path])
        self.console_file = where.disk_dir / f"srv/console/{name}.log"
        self._log = self.console_file.with_suffix(".qemu")
        self._qemu: subprocess.Popen[bytes] | None = None
        self._line: subprocess.Popen[bytes] | None = None
        give_address(lab, site)

    @property
    def _tap(self) -> str:
        return f"tap-{self.name}"[:15]

    @property
    def _line_path(self) -> str:
        return f"/run/{self.name}.ssh"

    @property
    def _monitor(self) -> str:
        return f"/run/{self.name}.qmp"

    # -- power

    def start(self, *, wait: bool = True, timeout: float = BOOT_SECONDS) -> float:
        """Press the power button; with `wait` until SSH answers and the ledger runs. Returns the seconds it took."""
        self._close_line()
        begun = time.monotonic()
        boots = len(self.console().ready)
        tap = self._tap
        inside = self.lab.sites[self.site]
        for command in (
            ["ip", "tuntap", "add", "dev", tap, "mode", "tap"],
            ["ip", "link", "set", tap, "master", BRIDGE, "up"],
        ):
            run(inside.enter(command), check=False)
        kvm = _kvm.kvm_boots(self.lab.images)
        command = ["qemu-system-x86_64", "-name", self.name, "-machine", "pc-i440fx-7.2", "-m", str(MEMORY_MIB)]
        command += ["-accel", "kvm" if kvm else "tcg,thread=multi,tb-size=128", "-cpu", "max", "-smp", "1"]
        command += ["-nodefaults", "-display", "none", "-no-user-config"]
        # On a busy host SeaBIOS gave up on the disks before QEMU's NVMe controllers were ready, and halted.
        command += ["-boot", "reboot-timeout=2000"]
        command += ["-smbios", f"type=1,manufacturer=Lab Servers,product=Rack 1,serial=LS-0001,uuid={UUID}"]
        command += ["-chardev", f"file,id=console,path=/srv/console/{self.name}.log,append=on"]
        command += ["-serial", "chardev:console"]
        command += ["-netdev", f"tap,id=net0,ifname={tap},script=no,downscript=no"]
        command += ["-device", f"virtio-net-pci,netdev=net0,mac={MAC},addr=3"]
        for number, path in enumerate(self.images_inside.values()):
            command += ["-drive", f"file={path},format=raw,if=none,id=disk{number},discard=unmap,detect-zeroes=off"]
        command += ["-device", "nvme,drive=disk0,serial=ROOT0001,addr=4,bootindex=0"]
        # QEMU cannot grow an NVMe disk while it is in use.
        command += ["-device", "virtio-scsi-pci,id=scsi0,addr=5"]
        command += ["-device", "scsi-hd,drive=disk1,bus=scsi0.0,serial=DATA0001"]
        # A monitor for growing a disk while the server runs, as a storage array would.
        command += ["-qmp", f"unix:{self._monitor},server=on,wait=off"]
        with self._log.open("wb") as log:
            self._qemu = self.lab.popen_in(self.site, command, stdout=log.fileno(), stderr=log.fileno())
        if wait:
            self.wait_ready(boots + 1, timeout)
        return time.monotonic() - begun

    def wait_ready(self, boots: int, timeout: float = BOOT_SECONDS) -> None:
        """Wait until the ledger has reported this many starts, and SSH answers."""

        def ready() -> bool:
            self._check_alive()
            return len(self.console().ready) >= boots and self.answers()

        try:
            wait_until(ready, f"{self.name} is ready", timeout, 0.5)
        except LabError as error:
            raise LabError(f"{error}\nconsole:\n{self.console().text[-3000:]}") from error
        self._open_line()

    def _open_line(self) -> None:
        """Keep an SSH connection open for commands: the emulated processor needs seconds for a handshake."""
        command = ["ssh", *_ssh_options(self.image), "-MN", "-S", self._line_path, f"root@{ADDRESS}"]
        self._line = self.lab.popen_in(self.site, command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _close_line(self) -> None:
        if self._line is not None:
            self._line.terminate()  # it removes its socket
            self._line.wait(STOP_SECONDS)
            self._line = None

    def answers(self) -> bool:
        """Whether SSH answers."""
        return self.ssh("true", check=False, timeout=20).returncode == 0

    def _check_alive(self) -> None:
        if self._qemu is not None and self._qemu.poll() is not None:
            said = self._log.read_text(errors="replace")
            raise LabError(f"QEMU of {self.name} has ended with {self._qemu.returncode}: {said}")

    @property
    def pid(self) -> int:
        """The process id of its QEMU. Raises LabError when it is off."""
        if self._qemu is None or self._qemu.poll() is not None:
            raise LabError(f"{self.name} is off")
        return self._qemu.pid

    @property
    def running(self) -> bool:
        """Whether it is powered on."""
        return self._qemu is not None and self._qemu.poll() is None

    def cut_power(self) -> None:
        """SIGKILL its QEMU."""
        self._close_line()
        if self._qemu is not None and self._qemu.poll() is None:
            self._qemu.kill()
            self._qemu.wait(STOP_SECONDS)

    def wait_off(self, timeout: float = 120) -> None:
        """Wait until it has shut down."""
        wait_until(lambda: not self.running, f"{self.name} is off", timeout, 0.2)

    def reboot(self) -> None:
        """A clean reboot from inside."""
        boots = len(self.console().ready)
        self._close_line()
        self.ssh("systemctl reboot", check=False)
        self.wait_ready(boots + 1)

    def pause_power(self) -> contextlib.AbstractContextManager[None]:
        """SIGSTOP its QEMU for a while: it stops completely, without any notification."""
        return _stopped(self.pid)

    def plug(self, *, out: bool) -> None:
        """Unplug its network cable, or plug it in again."""
        run(self.lab.sites[self.site].enter(["ip", "link", "set", self._tap, "down" if out else "up"]))

    # -- inside

    def ssh(
        self, command: str, *, check: bool = True, text: str | None = None, timeout: float = COMMAND_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root, from the server's site."""
        line = () if self._line is None else ("-S", self._line_path)  # if it is dead, SSH reconnects
        return ssh(self.lab, self.site, self.image, command, *line, check=check, text=text, timeout=timeout)

    def console(self) -> Console:
        """Its serial console at this site."""
        try:
            return parse_console(self.console_file.read_bytes().decode(errors="replace"))
        except FileNotFoundError:
            return parse_console("")

    def wait_row(self, row: int, timeout: float = 120) -> None:
        """Wait until the ledger has acknowledged this row."""

        def there() -> bool:
            last = self.console().last_ack
            return last is not None and last.row >= row

        wait_until(there, f"{self.name} has written row {row}", timeout, 0.2)

    def audit(self) -> Audit:
        """Audit the running ledger, between two of its writes."""
        return audit(self.ssh)

    def disk(self, serial: str) -> Path:
        """The raw image of a disk, as the host sees it."""
        return self._disks[serial]

    @property
    def images_inside(self) -> dict[str, str]:
        """The raw images of the disks, as paths of its site, by the names that its kernel gives the disks."""
        names = {"ROOT0001": "nvme0n1", "DATA0001": "sda"}
        return {names[serial]: f"/srv/images/{self.name}-{serial}.raw" for serial in self._disks}

    def grow_data_disk(self, size: int) -> None:
        """Grow the disk DATA0001 while the server runs, and make the server's kernel rescan it."""
        _qmp(self.lab.host_path(self.site, self._monitor), "block_resize", {"device": "disk1", "size": size})

        def seen() -> bool:
            shown = self.ssh("echo 1 > /sys/block/sda/device/rescan; cat /sys/block/sda/size").stdout
            return int(shown) * 512 == size

        wait_until(seen, f"{self.name} sees its disk grown", 60, 0.5)


def audit(command: Callable[[str], subprocess.CompletedProcess[str]]) -> Audit:
    """Audit the ledger of a machine that runs commands."""
    said = command(f"ledgerd audit {ROWS} {' '.join(AREAS)}").stdout
    return parse_audit(said.partition("LAB-AUDIT")[2])


def boot_audit(command: Callable[[str], subprocess.CompletedProcess[str]]) -> Audit:
    """The ledger's audit of its disks when the machine booted, before it wrote to them."""
    return parse_audit(command("cat /run/lab-audit").stdout.partition("LAB-AUDIT")[2])


def ssh(
    lab: Lab,
    site: str,
    image: ServerImage,
    command: str,
    *more: str,
    check: bool = True,
    text: str | None = None,
    timeout: float = COMMAND_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a command on the machine that answers at the server's address at a site, with the server's host key; `more`:
    further options."""
    words = ["ssh", *_ssh_options(image), *more, f"root@{ADDRESS}", command]
    return lab.run_in(site, words, check=check, text=text, timeout=timeout)


def _ssh_options(image: ServerImage) -> list[str | Path]:
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", f"UserKnownHostsFile={image.known_hosts}"]
    options += ["-o", "GlobalKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    return ["-F", "none", "-i", image.key, *options]


def give_address(lab: Lab, site: str) -> None:
    """Give a site's bridge the address of the server's gateway."""
    run(lab.sites[site].enter(["ip", "address", "add", f"{GATEWAY}/24", "dev", BRIDGE]), check=False)


@contextlib.contextmanager
def _stopped(pid: int):  # type: ignore[no-untyped-def]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _qmp(path: Path, command: str, arguments: dict[str, object]) -> None:
    import json
    import socket

    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:  # by way of /proc, since a socket's path may have no more than 107 bytes
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(30)
            monitor.connect(f"/proc/self/fd/{directory}/{path.name}")
            lines = monitor.makefile("rw")
            lines.readline()
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                lines.write(json.dumps(request) + "\n")
                lines.flush()
                while "event" in (answer := json.loads(lines.readline())):
                    pass
                if "error" in answer:
                    raise LabError(f"QEMU refuses {command}: {answer['error']}")
    finally:
        os.close(directory)
