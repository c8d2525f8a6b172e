"""A server made of loop devices with file systems on this host, its real agent process, and a site to which it
dials."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from asr_driver_physical.driver import PhysicalDriver
from asr_driver_physical.enrol.package import mobility_service
from asr_driver_physical.enrol.push import HOME, Limits, enrolment
from asr_driver_physical.servers.identity import Identity
from asr_driver_physical.site import PhysicalSite
from asr_mobility.tracker import remove_pins

__all__ = ["HOST", "LoopServer", "old_python", "wait_until"]

HOST = "127.0.0.1"
MIB = 1 << 20


def wait_until(true: object, what: str, seconds: float = 30.0) -> None:
    """Wait for a condition of another process."""
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not true after {seconds:g} s"
        time.sleep(0.05)


def old_python() -> str:
    """The oldest installed Python that the mobility service supports; otherwise this one."""
    for root in (os.environ.get("PYENV_ROOT"), str(Path.home() / ".pyenv")):
        for path in sorted(Path(root or "/nowhere").glob("versions/3.9.*/bin/python3.9")):
            return str(path)
    return shutil.which("python3.9") or sys.executable


def run(*words: str | Path) -> str:
    """Run a program to its end; returns its output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    assert not done.returncode, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class LoopServer:
    """Disks `vda`, `vdb`: ext4 file systems, mounted. `close` removes everything."""

    def __init__(self, root: Path, name: str = "box", disks: int = 2, size: int = 24 * MIB) -> None:
        self.root, self.name = root, name
        self.home, self.listing = root / "home", root / "disks.json"
        self.pins = f"/sys/fs/bpf/asr-test-{os.getpid()}-{name}"
        self.loops: dict[str, str] = {}
        self._images: dict[str, Path] = {}
        self._made = 0
        self._agent: subprocess.Popen[bytes] | None = None
        for directory in (self.home, root / "mnt"):
            directory.mkdir(parents=True)
        for number in range(disks):
            self.add_disk(f"vd{'abc'[number]}", size)
        with socket.create_server((HOST, 0)) as probe:
            self.port = probe.getsockname()[1]
        self.settings = {
            "listen": f"{HOST}:{self.port}",
            "identity": str(root / "identity"),
            "spool": str(root / "spool"),
        }
        self.program = root / "asr-mobility.pyz"
        self.program.write_bytes(mobility_service())
        self._enrol()
        self.site = self.connect()

    def connect(self) -> PhysicalSite:
        """A connection of an engine."""
        return PhysicalDriver().connect("dc", self.settings)

    def _command(self, *words: str) -> list[str]:
        harness = Path(__file__).with_name("agent.py")
        return [old_python(), str(harness), str(self.program), str(self.home), str(self.listing), self.pins, *words]

    def probe(self) -> str:
        """The output of the probe on the server."""
        return run(*self._command("probe"))

    def _enrol(self) -> None:
        facts = json.loads(self.probe())
        identity = Identity(self.root / "identity")
        made = enrolment(identity, self.name, [f"{HOST}:{self.port}"], facts, Limits(), python=sys.executable)
        for name in ("ca.pem", "agent.pem", "config.json"):
            (self.home / name).write_bytes(made.files[f"{HOME}/{name}"][0])
        identity.save(made.record)

    @property
    def machine_id(self) -> str:
        """The server's id."""
        return str(self.site.servers.identity.servers()[0].facts["machine"]["id"])

    # -- the agent

    def set_process_servers(self, *ports: int) -> None:
        """Make the agent dial these ports of this host, in turn."""
        path = self.home / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "servers": [f"{HOST}:{port}" for port in ports]}))

    def start(self, *, wait: bool = True) -> None:
        """Start the agent and, by default, wait until it has dialled in."""
        log = (self.root / "agent.log").open("ab")
        self._agent = subprocess.Popen(self._command("run"), stdout=log, stderr=log)
        log.close()
        if wait:
            wait_until(
                lambda: self.name in self.site.servers.gateway.connected(), f"the agent; see {self.root}/agent.log"
            )

    @property
    def agent_pid(self) -> int:
        """The agent's log."""
        assert self._agent is not None
        return self._agent.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Stop the agent; its state in the kernel stays."""
        if self._agent is not None:
            self._agent.send_signal(number)
            self._agent.wait(30)
            self._agent = None
            wait_until(lambda: self.name not in self.site.servers.gateway.connected(), "the agent's end")

    def lose_tracking(self) -> None:
        """Like a restart of the server: the kernel's maps are lost."""
        self.kill()
        for path in Path(self.pins).glob("*"):
            path.unlink()
        self.start()

    # -- disks

    def _tell(self) -> None:
        fresh = self.listing.with_suffix(".new")
        fresh.write_text(json.dumps(self.loops))
        fresh.replace(self.listing)

    def image(self, disk_id: str) -> Path:
        """The file behind a disk."""
        return self._images[disk_id]

    def mount(self, disk_id: str) -> Path:
        """Where a disk's file system is mounted."""
        return self.root / "mnt" / disk_id

    def add_disk(self, disk_id: str, size: int = 16 * MIB) -> None:
        """Attach one with a file system and some data."""
        self._made += 1  # a disk that replaces another one is a different disk
        self._images[disk_id] = self.root / f"{disk_id}-{self._made}.img"
        with self.image(disk_id).open("wb") as file:
            file.truncate(size)
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", self.image(disk_id))
        self.loops[disk_id] = run("losetup", "--find", "--show", self.image(disk_id)).strip()
        self.mount(disk_id).mkdir()
        run("mount", "-o", "noatime,commit=300", self.loops[disk_id], self.mount(disk_id))
        self.write(disk_id, "first", 300 * 1024)
        self._tell()

    def remove_disk(self, disk_id: str) -> None:
        """Detach and delete one."""
        run("umount", self.mount(disk_id))
        self.mount(disk_id).rmdir()
        run("losetup", "-d", self.loops.pop(disk_id))
        self.image(disk_id).unlink()
        self._tell()

    def grow_disk(self, disk_id: str, size: int) -> None:
        """Grow one while it is mounted, with some data in its new part."""
        old = self.image(disk_id).stat().st_size
        os.truncate(self.image(disk_id), size)
        run("losetup", "-c", self.loops[disk_id])
        with Path(self.loops[disk_id]).open("r+b") as device:
            device.seek(old + MIB)
            device.write(os.urandom(300_000))
            os.fsync(device.fileno())

    def write(self, disk_id: str, name: str, size: int) -> None:
        """Write a file of random data; it is on the disk when this returns."""
        path = self.mount(disk_id) / name
        with path.open("wb") as file:
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
        self.sync()

    def sync(self) -> None:
        """Write all dirty data to the disks."""
        for disk_id in self.loops:
            run("sync", "-f", self.mount(disk_id))

    def trim(self, disk_id: str) -> None:
        """Discard what the file system does not use."""
        run("fstrim", self.mount(disk_id))

    def sha256(self, disk_id: str) -> str:
        """The digest of the disk's present content, without the driver. The loop device's cache is written back
        first."""
        run("blockdev", "--flushbufs", self.loops[disk_id])
        return hashlib.sha256(self.image(disk_id).read_bytes()).hexdigest()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A workload that continuously overwrites, creates and deletes files on both disks."""
        script = """
import os, random, sys
number = 0
while True:
    number += 1
    for directory in sys.argv[1:]:
        path = os.path.join(directory, f"w{random.randrange(12)}")
        with open(path, "wb") as file:
            file.write(os.urandom(random.randrange(1, 90000)))
            file.flush()
            os.fsync(file.fileno())
        if number % 7 == 0:
            os.remove(path)
"""
        mounts = [str(self.mount(disk_id)) for disk_id in self.loops]
        writer = subprocess.Popen([sys.executable, "-c", script, *mounts])
        try:
            yield
            assert writer.poll() is None, "the workload has ended early"
        finally:
            writer.kill()
            writer.wait(30)

    def close(self) -> None:
        """Remove everything; may be called twice."""
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait(30)
            self._agent = None
        self.site.close()
        for disk_id in list(self.loops):
            subprocess.run(["fsfreeze", "-u", str(self.mount(disk_id))], capture_output=True, check=False)
            self.remove_disk(disk_id)
        remove_pins(*map(str, Path(self.pins).glob("*")))
        with contextlib.suppress(OSError):
            Path(self.pins).rmdir()
