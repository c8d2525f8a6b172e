"""The disk that everything is measured on: 4 GiB, half allocated, made from this machine's own files."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from asrcore.units import MiB
from tests.bench._change import BLOCK
from tests.lab import _disks, _images, _places
from tests.lab._run import run

__all__ = ["DATA_START", "DISK_SIZE", "BenchDisk", "build_disk"]

DISK_SIZE = 4096 * MiB
DATA_START = 256 * MiB
"""The disk starts with the lab's boot disk, so that the guest boots from the disk that is measured."""
TREE_BYTES = 1400 * MiB
RANDOM_BYTES = 512 * MiB
FILE_SYSTEM = 3072 * MiB
POOL_BYTES = 64 * MiB
BUILD_SECONDS = 300.0
TREES = (Path("/usr/lib"), Path("/usr/share"), Path("/usr/bin"))
VERSION = "2"


@attrs.frozen
class BenchDisk:
    """`raw`: the disk as a sparse file; must not be written to."""

    raw: Path

    def blocks(self) -> list[int]:
        """Offsets of the blocks of 64 KiB that contain data."""
        found: list[int] = []
        with self.raw.open("rb") as file:
            for start, end in _data(file.fileno()):
                first = max(start // BLOCK * BLOCK, found[-1] + BLOCK if found else 0)
                found.extend(range(first, end, BLOCK))
        return found

    def allocated(self) -> int:
        """Bytes allocated to the file."""
        return self.raw.stat().st_blocks * 512

    def pool(self) -> bytes:
        """The content of changed blocks: content of the file tree, which compresses as files do."""
        parts, left = [], POOL_BYTES
        with self.raw.open("rb") as file:
            for start, end in _data(file.fileno()):
                if end <= DATA_START or left <= 0:
                    continue
                part = os.pread(file.fileno(), min(end - start, left), start)
                parts.append(part)
                left -= len(part)
        return b"".join(parts)


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts that are not holes."""
    at, size = 0, os.fstat(fd).st_size
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at


def build_disk(images: _images.Images, say: Callable[[str], None]) -> BenchDisk:
    """Return the disk, building it if it is not there. An interrupted build leaves no disk behind."""
    directory = _places.PROJECT / "build" / "bench"
    final = directory / f"disk-{VERSION}-{images.directory.name}.raw"
    if final.exists():
        return BenchDisk(final)
    say("disk: 4 GiB, half of it a file tree and 512 MiB of incompressible data (made once, kept in build/bench)")
    work = directory / "work"
    shutil.rmtree(work, ignore_errors=True)
    (work / "tree").mkdir(parents=True)
    for old in directory.glob("disk-*.raw"):
        old.unlink()
    try:
        _fill_tree(work / "tree")
        _write_random(work / "tree" / "random", RANDOM_BYTES)
        template = images.disk("bios-disk", "vda")
        run(["qemu-img", "convert", "-q", "-O", "raw", template, work / "disk.raw"], timeout=BUILD_SECONDS)
        os.truncate(work / "disk.raw", DISK_SIZE)
        _disks.make_ext4(work / "disk.raw", FILE_SYSTEM, "bench", work / "tree", DATA_START)
        run(["sync", "-f", work], timeout=BUILD_SECONDS)
        (work / "disk.raw").rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return BenchDisk(final)


def _fill_tree(directory: Path) -> None:
    """Files of this machine's /usr, in order, until there are enough bytes; repeated if there are too few."""
    left, turn = TREE_BYTES, 0
    while left > 0:
        before = left
        for root in TREES:
            for place, names, files in os.walk(root):
                names.sort()
                target = directory / str(turn) / Path(place).relative_to("/")
                for name in sorted(files):
                    source = Path(place, name)
                    if left <= 0:
                        return
                    if source.is_symlink() or not source.is_file():
                        continue
                    target.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target / name)
                    left -= source.stat().st_size
        if left == before:
            raise RuntimeError(f"no files below {', '.join(map(str, TREES))}")
        turn += 1


def _write_random(path: Path, size: int) -> None:
    """The same bytes each time."""
    dice = random.Random(20)
    with path.open("wb") as file:
        for _ in range(0, size, MiB):
            file.write(dice.randbytes(MiB))
