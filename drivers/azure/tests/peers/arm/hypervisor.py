"""The effect of "start VM": a real QEMU guest on the machine's disks, in an isolated network, or a simulated one."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

OVMF_CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
OVMF_VARS = "/usr/share/OVMF/OVMF_VARS_4M.fd"


class Paper:
    """Simulated machines: only their power state is kept."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._running = False
        self.uefi = False
        """Whether its firmware is UEFI."""
        self.deaf = False
        """Whether the guest ignores a request to shut down."""

    @property
    def running(self) -> bool:
        """Whether it is powered on."""
        return self._running

    def start(self, disks: Sequence[Path], *, uefi: bool) -> None:
        """Power on."""
        self._running = True
        self.uefi = uefi

    def shutdown(self) -> None:
        """Press the power button."""
        if not self.deaf:
            self._running = False

    def kill(self) -> None:
        """Cut the power."""
        self._running = False

    def pause(self) -> None:
        """Pause the processors."""

    def go_on(self) -> None:
        """Resume them."""

    @property
    def console(self) -> str:
        """The serial console's output."""
        return ""


class Qemu(Paper):
    """A guest of QEMU. The console's file is kept across starts."""

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(name)
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._console = directory / f"{name}.console"
        self._sockets = Path(tempfile.mkdtemp(prefix="vm"))  # a socket's path must be short
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, disks: Sequence[Path], *, uefi: bool) -> None:
        self.kill()
        self.uefi = uefi
        qmp = self._sockets / "qmp"
        qmp.unlink(missing_ok=True)
        command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-user-config", "-m", "512"]
        command += ["-machine", "q35" if uefi else "pc", "-accel", "tcg", "-cpu", "Nehalem"]
        command += ["-smbios", "type=1,manufacturer=Lab,version=rate=10"]
        command += ["-qmp", f"unix:{qmp},server=on,wait=off"]
        command += ["-chardev", f"file,id=console,path={self._console},append=on", "-serial", "chardev:console"]
        # A network interface without a connection: the isolated network of the test.
        command += ["-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net"]
        if uefi:
            variables = self._directory / f"{self.name}.vars"
            if not variables.exists():
                shutil.copy(OVMF_VARS, variables)
            command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={OVMF_CODE}"]
            command += ["-drive", f"if=pflash,unit=1,format=raw,file={variables}"]
        for disk in disks:
            command += ["-drive", f"file={disk},format=raw,if=virtio,cache=writeback"]
        with (self._directory / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._ask("query-status")

    def shutdown(self) -> None:
        if self.running:
            self._ask("system_powerdown")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        if self.running:
            self._ask("stop")

    def go_on(self) -> None:
        if self.running:
            self._ask("cont")

    def _ask(self, command: str) -> None:
        end = time.monotonic() + 60
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as talk:
                    talk.settimeout(60)
                    talk.connect(str(self._sockets / "qmp"))
                    lines = talk.makefile("rwb")
                    lines.readline()
                    for word in ("qmp_capabilities", command):
                        lines.write(json.dumps({"execute": word}).encode() + b"\n")
                        lines.flush()
                        while b'"return"' not in (answer := lines.readline()):
                            assert b'"event"' in answer, f"QEMU: {command}: {answer!r}"
                    return
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.running, f"QEMU exited immediately, see {self._directory}/{self.name}.log"
                assert time.monotonic() < end
                time.sleep(0.05)

    @property
    def console(self) -> str:
        return self._console.read_text(errors="replace") if self._console.exists() else ""
