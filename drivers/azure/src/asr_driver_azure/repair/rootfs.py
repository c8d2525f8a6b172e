"""The root file system in an image of a machine's first disk, read and changed through e2fsprogs.

Nothing is mounted and no program of the guest is run: its file system is data for programs with this process's rights.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs

from asr_driver_azure.repair.plan import DIRECTORIES, FILES, FSTAB, Change, Guest
from asrcore.driver import Closing
from asrcore.model.extent import Extent
from asrcore.units import MiB

__all__ = ["Image", "NotUnderstood", "Partition", "RootFs", "missing", "partitions"]

_TOOLS = {"blkid": "util-linux", "debugfs": "e2fsprogs", "e2fsck": "e2fsprogs", "sfdisk": "fdisk"}
"""Programs that are run, and their Debian packages."""
_TABLE = MiB  # holds a partition table, and what identifies a file system
_SECONDS, _CHECK_SECONDS = 60.0, 1800.0
_MOST_TEXT, _MOST_FILES = MiB, 200  # limits in bytes and files: the guest's disk decides how many exist
_SECTOR = 512
_PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_FOUND = re.compile(r"^Inode: (\d+)\s+Type: (\w+(?: \w+)*)\s+Mode:\s+0*(\d+)", re.MULTILINE)
_OWNER = re.compile(r"^User:\s+(\d+)\s+Group:\s+(\d+).*\bSize: (\d+)", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^\s+([\w.-]+) \(\d+\)", re.MULTILINE)


def missing() -> dict[str, str]:
    """The required programs that this host lacks."""
    return {tool: package for tool, package in _TOOLS.items() if shutil.which(tool, path=_PATH["PATH"]) is None}


class NotUnderstood(Exception):
    """The disk holds no root file system that can be changed here; the message says why."""


class Image(Closing):
    """A sparse file of `size` bytes that has no name: it is deleted with the process, however that ends."""

    def __init__(self, size: int) -> None:
        self.file = tempfile.TemporaryFile(prefix="asr-repair-", buffering=0)  # noqa: SIM115
        self.file.truncate(size)
        self.size = size

    @property
    def path(self) -> str:
        """For programs that `run` runs."""
        return f"/proc/self/fd/{self.file.fileno()}"

    def put(self, offset: int, data: bytes | bytearray) -> None:
        """Thread-safe. Raises OSError."""
        if os.pwrite(self.file.fileno(), data, offset) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, extent: Extent) -> bytes:
        """Its bytes."""
        return os.pread(self.file.fileno(), extent.length, extent.offset)

    def stored(self) -> list[Extent]:
        """Where it holds data."""
        found: list[Extent] = []
        end = 0
        while True:
            try:
                start = os.lseek(self.file.fileno(), end, os.SEEK_DATA)
            except OSError as problem:
                if problem.errno == errno.ENXIO:
                    return found
                raise
            end = os.lseek(self.file.fileno(), start, os.SEEK_HOLE)
            found.append(Extent(start, end - start))

    def run(self, *words: str, good: Sequence[int] = (0,), seconds: float = _SECONDS) -> str:
        """The output of a program run on the image. Raises NotUnderstood."""
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=(self.file.fileno(),),
                env=_PATH,
                timeout=seconds,
                check=False,
            )
        except FileNotFoundError as problem:
            raise NotUnderstood(f"{words[0]} is not installed where the engine runs") from problem
        except subprocess.TimeoutExpired as problem:
            raise NotUnderstood(f"{words[0]} took longer than {seconds:g} s") from problem
        if done.returncode not in good:
            said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            raise NotUnderstood(f"{words[0]} ended with {done.returncode}: {said[-1] if said else 'no output'}")
        return done.stdout.decode(errors="surrogateescape")

    def close(self) -> None:
        """Delete the file."""
        self.file.close()


@attrs.frozen
class Partition:
    """`start`, `size`: bytes. `kind`, `uuid`: of what lies on it, empty where that is unknown."""

    number: int
    start: int
    size: int
    kind: str
    uuid: str


def partitions(size: int, read: Callable[[int, memoryview], None]) -> list[Partition]:
    """Of a disk of `size` bytes, of which little is read. Raises NotUnderstood."""
    with Image(size) as image:

        def fetch(start: int, end: int) -> None:
            data = bytearray(min(end, size) - start)
            read(start, memoryview(data))
            image.put(start, data)

        fetch(0, _TABLE)
        fetch(max(0, size - _TABLE), size)  # the second copy of a GPT
        try:
            table = json.loads(image.run("sfdisk", "--json", image.path))["partitiontable"]
        except NotUnderstood as problem:
            raise NotUnderstood(f"its first disk has no partition table ({problem})") from problem
        found = []
        for item in table.get("partitions", []):
            number = int(item["node"].rpartition("p")[2])
            start, length = int(item["start"]) * _SECTOR, int(item["size"]) * _SECTOR
            if start + length > size:
                raise NotUnderstood(f"partition {number} ends beyond the end of the disk")
            fetch(start, min(start + _TABLE, start + length))
            words = ("-p", "-o", "export", "--offset", str(start), "--size", str(length), image.path)
            lines = image.run("blkid", *words, good=(0, 2, 8)).splitlines()  # 2: nothing known there; 8: several things
            reported = dict(line.split("=", 1) for line in lines if "=" in line)
            found.append(Partition(number, start, length, reported.get("TYPE", ""), reported.get("UUID", "")))
        return found


class RootFs:
    """An ext file system, in an image of its partition, that is a system's root if it has an /etc/fstab."""

    def __init__(self, image: Image) -> None:
        self._image = image

    def is_root(self) -> bool:
        """Whether it looks like one."""
        return self._stat(FSTAB) is not None

    def settle(self) -> None:
        """What the guest itself does before it mounts: replay the journal, and safe repairs. Raises NotUnderstood where
        that is not enough."""
        self._image.run("e2fsck", "-f", "-p", self._image.path, good=(0, 1), seconds=_CHECK_SECONDS)

    def _debugfs(self, *requests: str, write: bool = False) -> str:
        """Raises NotUnderstood. debugfs always exits with status 0, so its result has to be checked."""
        with tempfile.NamedTemporaryFile("w", prefix="asr-repair-") as file:
            file.write("".join(f"{request}\n" for request in requests))
            file.flush()
            return self._image.run("debugfs", *(["-w"] if write else []), "-f", file.name, self._image.path)

    def _stat(self, path: str) -> tuple[str, str, str] | None:
        """(mode, owner, group) of a plain file of a size that a text has; None if it is none."""
        said = self._debugfs(f"stat {path}")
        found, owner = _FOUND.search(said), _OWNER.search(said)
        if found is None or owner is None or found[2] != "regular" or int(owner[3]) > _MOST_TEXT:
            return None
        return found[3], owner[1], owner[2]

    def _attributes(self, path: str) -> list[str]:
        """Its extended attributes, as debugfs prints them."""
        return sorted(line for line in self._debugfs(f"ea_list {path}").splitlines() if line.startswith(" "))

    def _read(self, path: str) -> str | None:
        """Text of a plain file, None if it is none, or no text."""
        if not self._stat(path):
            return None
        with tempfile.TemporaryDirectory(prefix="asr-repair-") as directory:
            copy = Path(directory) / "text"
            self._debugfs(f"dump {path} {copy}")
            data = copy.read_bytes() if copy.exists() else b"\xff"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return None

    def look(self, number: int, uuids: Mapping[int, str]) -> Guest:
        """What a plan is made from; `number` is the partition's. Raises NotUnderstood."""
        paths = list(FILES)
        for directory in DIRECTORIES:
            rows = [line.split("/") for line in self._debugfs(f"ls -p {directory}").splitlines() if line[:1] == "/"]
            paths += [f"{directory}/{row[5]}" for row in rows if re.fullmatch(r"[\w.@-]*\w[\w.@-]*", row[5])]
        if len(paths) > _MOST_FILES:
            raise NotUnderstood(f"{' and '.join(DIRECTORIES)} hold more than {_MOST_FILES} files")
        texts = {path: self._read(path) for path in paths}
        files = {path: text for path, text in texts.items() if text is not None}
        if FSTAB not in files:
            raise NotUnderstood(f"its {FSTAB} is not a text file")
        return Guest(files, number, uuids)

    def write(self, changes: Sequence[Change]) -> None:
        """Write files, with mode, owner and attributes as they were. Raises NotUnderstood, and then the image is
        damaged."""
        for change in changes:
            self._write(change)
        self._image.run("e2fsck", "-f", "-n", self._image.path, seconds=_CHECK_SECONDS)

    def _write(self, change: Change) -> None:
        directory, _, name = change.path.rpartition("/")
        known, attributes = self._stat(change.path), self._attributes(change.path)
        mode, owner, group = known or ("644", "0", "0")
        with tempfile.TemporaryDirectory(prefix="asr-repair-") as place:
            new = Path(place) / "new"
            new.write_text(change.text)
            keep, give = [], []
            for number, attribute in enumerate(_ATTRIBUTE.findall("\n".join(attributes))):
                keep.append(f"ea_get -f {place}/{number} {change.path} {attribute}")
                give.append(f"ea_set -f {place}/{number} {change.path} {attribute}")
            if keep:
                self._debugfs(*keep)
            requests = [f"rm {change.path}"] if known else []
            requests += [f"cd {directory}", f"write {new} {name}", "cd /"]
            requests += [f"sif {change.path} mode 0100{mode}"]
            requests += [f"sif {change.path} uid {owner}", f"sif {change.path} gid {group}", *give]
            self._debugfs(*requests, write=True)
        written = self._read(change.path), self._stat(change.path), self._attributes(change.path)
        if written != (change.text, (mode, owner, group), attributes):
            raise NotUnderstood(f"{change.path} could not be written")
