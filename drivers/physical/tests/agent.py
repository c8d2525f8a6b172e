"""The mobility service of a server whose disks are loop devices of this host: a file lists them, by id.

    python agent.py PROGRAM HOME DISKS PINS run

The service itself is the packed one; only the places of its disks and of its pinned maps differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

program, home, listing, pins, *rest = sys.argv[1:]
sys.path.insert(0, program)

from asr_mobility import disks, facts, service, tracker  # noqa: E402
from asr_mobility.__main__ import main  # noqa: E402


class LoopDisk(disks.Disk):
    """A loop device that counts as a disk."""

    def __init__(self, disk_id: str, path: str) -> None:
        super().__init__(Path(path).name)
        self.serial = self.id = disk_id
        # It includes the backing file: another file in its place is another disk.
        backing = Path(f"/sys/block/{self.name}/loop/backing_file").read_text()
        self._whose = hashlib.blake2b((disk_id + backing).encode(), digest_size=16).digest()

    @property
    def identity(self) -> bytes:
        return self._whose


def find_disks() -> list[Any]:
    return [LoopDisk(name, path) for name, path in sorted(json.loads(Path(listing).read_text()).items())]


def power_off(*_: Any, **__: Any) -> Any:
    """Does not power off this host: the agent ends, as on a server that is switched off."""
    Path(home, "off").touch()
    os.kill(os.getpid(), 15)
    return {}, b""


def readiness() -> dict[str, Any]:
    """The facts of a real server: this host may be a container without systemd, whose disk has no boot loader."""
    initramfs = {"image": "", "listed": False, "drivers": []}
    return {**look(), "systemd": True, "boot_loader": ["vda"], "initramfs": initramfs, "fstab": [], "multipath": []}


def witnessed(this: Any, held: Any, watched: Any, *more: Any) -> bool:
    """The service's own step; then, still frozen, the digest of each disk is recorded. A test can make it hang."""
    still: bool = take_in(this, held, watched, *more)
    hang = Path(home, "hang")
    if hang.exists():
        Path(home, "hanging").touch()
        time.sleep(float(hang.read_text()))
    seen = {}
    for key, item in watched.items():
        whole, reader = hashlib.sha256(), disks.Reader(item.disk.path, item.disk.size)
        for at in range(0, item.disk.size, 1 << 20):
            whole.update(reader.read(at, min(1 << 20, item.disk.size - at)))
        reader.close()
        seen[key] = whole.hexdigest()
    if any(item.tracker.pending() for item in watched.values()):
        seen = {"": "the disks were written to while frozen"}
    Path(home, "frozen.json").write_text(json.dumps(seen))
    return still


service.SCRIPT_SECONDS = 2.0
take_in = service.Service._take_in
service.Service._take_in = witnessed  # type: ignore[method-assign,assignment]
look, facts.readiness = facts.readiness, readiness
service.Service._power_off = power_off  # type: ignore[method-assign]
for module in (service, facts):
    vars(module)["find_disks"] = find_disks
tracker.PIN_ROOT = pins
sys.exit(main(["--home", home, *rest]))
