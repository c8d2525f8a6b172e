"""The rig of the folder driver: two folders, and a machine in one of them."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import msgspec
from asr_driver_folder.site import FolderDriver, FolderSite

from asrcore.driver import Closing, CycleWriter, Instance
from asrcore.model.machine import Firmware, Machine, Nic
from asrcore.testing.conformance import ConformanceRig
from asrcore.units import KiB, MiB

__all__ = ["FolderRig", "make_machine"]

_NOBODY = 65534
_random = random.Random(7)


def make_machine(site: Path, machine: Machine, disks: dict[str, int]) -> Path:
    """A machine as its owner would make it: a folder with disks that hold some data."""
    folder = site / machine.id
    folder.mkdir()
    (folder / "machine.json").write_bytes(msgspec.json.encode(machine))
    for disk_id, size in disks.items():
        write(folder / f"{disk_id}.raw", 64 * KiB, _random.randbytes(128 * KiB), size)
    return folder


def write(image: Path, offset: int, data: bytes, size: int = 0) -> None:
    """Write as a guest does; make a missing image of `size` bytes first."""
    with image.open("r+b" if image.exists() else "w+b") as file:
        file.truncate(max(size, image.stat().st_size))
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class FolderRig(ConformanceRig):
    """Folders `home` and `away`, machine `web1`."""

    driver = FolderDriver()
    machine_id = "web1"

    def __init__(self) -> None:
        super().__init__()
        root = Path(tempfile.mkdtemp(prefix="asr-folder-"))
        root.chmod(0o755)  # for `read_only_target`
        self.shared.callback(shutil.rmtree, root)
        self.home, self.away = root / "home", root / "away"
        self.home.mkdir()
        self.away.mkdir()
        machine = Machine("web1", "web1", 1, 64 * MiB, Firmware.BIOS, (), (Nic("52:54:00:00:00:01", "lan"),))
        (make_machine(self.home, machine, {"vda": 2 * MiB, "vdb": MiB + 512}) / "running").touch()
        self._extra = 0
        self.restart()

    # -- both

    @property
    def source_site(self) -> FolderSite:
        return self._source

    @property
    def target_site(self) -> FolderSite:
        return self._target

    def restart(self) -> None:
        self._source = self.driver.connect("home", {"path": str(self.home)})
        self._target = self.driver.connect("away", {"path": str(self.away)})

    def abandon(self, handle: Closing) -> None:
        if isinstance(handle, CycleWriter):
            handle.close()  # as the end of a process: it flushes nothing

    # -- source

    def change(self, machine_id: str) -> None:
        for image in (self.home / machine_id).glob("*.raw"):
            size = image.stat().st_size
            write(image, _random.randrange(64 * KiB, size // 2), _random.randbytes(5000))
            write(image, size - 100, _random.randbytes(100))

    def discard(self, machine_id: str) -> None:
        image = self.home / machine_id / "vda.raw"
        hole = ["--punch-hole", "--offset", str(128 * KiB), "--length", str(64 * KiB)]
        write(image, 128 * KiB, _random.randbytes(64 * KiB))
        subprocess.run(["fallocate", *hole, image], check=True, timeout=10)

    def still(self, machine_id: str) -> AbstractContextManager[None]:
        return nullcontext()  # it writes in `change` only

    def sha256(self, machine_id: str, disk_id: str) -> str:
        return hashlib.sha256((self.home / machine_id / f"{disk_id}.raw").read_bytes()).hexdigest()

    def lose_tracking(self, machine_id: str) -> None:
        shutil.rmtree(self.home / ".asr" / "snapshots" / machine_id)

    lose_view = lose_tracking

    def leftovers(self, machine_id: str) -> list[str]:
        return [str(path) for path in (self.home / ".asr").rglob("*") if path.is_file()]

    def add_disk(self, machine_id: str) -> str:
        self._extra += 1
        disk_id = f"extra{self._extra}"
        self.replace_disk(machine_id, disk_id)
        return disk_id

    def replace_disk(self, machine_id: str, disk_id: str) -> None:
        new = self.home / machine_id / "new"
        write(new, 64 * KiB, _random.randbytes(64 * KiB), 192 * KiB)
        new.replace(self.home / machine_id / f"{disk_id}.raw")

    def grow_disk(self, machine_id: str, disk_id: str) -> None:
        os.truncate(self.home / machine_id / f"{disk_id}.raw", 320 * KiB)

    def remove_disk(self, machine_id: str, disk_id: str) -> None:
        (self.home / machine_id / f"{disk_id}.raw").unlink()

    def start_past_driver(self, machine_id: str) -> None:
        (self.home / machine_id / "running").touch()

    # -- target

    @contextmanager
    def full_target(self) -> Iterator[None]:
        former = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, former[1]))  # no file may grow beyond
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)

    @contextmanager
    def read_only_target(self) -> Iterator[None]:
        paths = [self.away, *self.away.rglob("*")]
        for path in paths:
            path.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(_NOBODY)  # for root a folder is never read-only
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
            for path in paths:
                path.chmod(0o755)

    @contextmanager
    def unreachable_target(self) -> Iterator[None]:
        away = self.away.rename(self.away.with_name("unmounted"))
        try:
            yield
        finally:
            away.rename(self.away)

    # -- failover

    def change_instance(self, instance: Instance) -> None:
        for image in (self.away / instance.machine_id).glob("*.raw"):
            write(image, 0, b"written by the instance")

    def target_sha256(self, machine_id: str, disk_id: str) -> str:
        return hashlib.sha256((self.away / machine_id / f"{disk_id}.raw").read_bytes()).hexdigest()

    def remove_target_machine(self, machine_id: str) -> None:
        shutil.rmtree(self.away / machine_id, ignore_errors=True)

    def make_target_machine(self, machine: Machine) -> str:
        make_machine(self.away, machine, {disk.id: disk.size for disk in machine.disks})
        return machine.id

    def other_network(self) -> str:
        return "dmz"

    def target_leftovers(self, replica_id: str) -> list[str]:
        return sorted(str(path) for path in self.away.rglob("*") if "points" not in path.parts)
