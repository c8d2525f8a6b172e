"""The server's disks: listing them, identifying them, and reading them past the page cache."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
from contextlib import suppress
from pathlib import Path

__all__ = ["DIGEST_BLOCK", "Disk", "Reader", "digests", "disks_below", "find_disks"]

SYS_BLOCK = Path("/sys/class/block")
_ALIGN = 4096
DIGEST_BLOCK, _DIGEST_SIZE = 64 << 10, 16
_PIECE = 1 << 20
# Not disks of the server: RAM disks, loops, optical and floppy drives, network disks, and what is made of disks.
_NOT_DISKS = re.compile(r"(ram|loop|zram|sr|fd|nbd|dm-|md|bcache|drbd|rbd|pmem|mtd)")
_NO_SERIAL = {"", "0", "none", "n/a", "default string", "to be filled by o.e.m."}


class Disk:
    """One whole disk. `id` is the same at each boot, whatever the kernel calls the disk."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = "/dev/" + name
        self.serial = _serial(SYS_BLOCK / name)
        self.id = _clean(self.serial) or name
        self.size = int(_text(SYS_BLOCK / name / "size") or 0) * 512
        self.read_only = _text(SYS_BLOCK / name / "ro") == "1"
        place = os.path.realpath(SYS_BLOCK / name)
        # What may be attached for a while only; the path in sysfs names the bus.
        self.attached = "USB" if re.search(r"/usb\d+/", place) else "iSCSI" if re.search(r"/session\d+/", place) else ""
        self.sector_size = int(_text(SYS_BLOCK / name / "queue/logical_block_size") or 512)

    @property
    def identity(self) -> bytes:
        """16 bytes that distinguish this disk from another one in its place."""
        return hashlib.blake2b(self.id.encode(), digest_size=16).digest()

    def is_same(self, other: Disk) -> bool:
        """Whether tracking of the one continues for the other."""
        return (self.name, self.size, self.identity) == (other.name, other.size, other.identity)

    @property
    def stable(self) -> bool:
        """Whether the id belongs to the disk itself, not only to its place."""
        return bool(self.serial)


def find_disks() -> list[Disk]:
    """All disks of the server, by name; those with the same serial number are distinguished by their names."""
    found = []
    for path in sorted(SYS_BLOCK.iterdir()):
        if (path / "partition").exists() or _NOT_DISKS.match(path.name) or _text(path / "removable") == "1":
            continue
        if re.search(r"c\d+n\d+$", path.name) and path.name.startswith("nvme"):
            continue  # a path of a multipath NVMe disk, which has a separate name
        disk = Disk(path.name)
        if disk.size:
            found.append(disk)
    seen: dict[str, int] = {}
    for disk in found:
        seen[disk.id] = seen.get(disk.id, 0) + 1
    for disk in found:
        if seen[disk.id] > 1:
            disk.id = f"{disk.id}-{disk.name}"
    return found


def disks_below(name: str) -> set[str]:
    """The whole disks that a block device (partition, logical volume, array) lies on, by kernel names."""
    path = SYS_BLOCK / name
    below: set[str] = set()
    with suppress(OSError):
        for lower in os.listdir(path / "slaves"):
            below |= disks_below(lower)
    if below:
        return below
    if (path / "partition").exists():
        return disks_below(path.resolve().parent.name)
    return {name}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _serial(path: Path) -> str:
    """The serial number: virtio and NVMe have it in a file, SCSI and ATA in page 0x80 of their vital product data."""
    for place in ("serial", "device/serial"):
        text = _text(path / place)
        if text.lower() not in _NO_SERIAL:
            return text
    with suppress(OSError, ValueError, struct.error):
        page = (path / "device/vpd_pg80").read_bytes()
        (length,) = struct.unpack_from(">H", page, 2)
        text = page[4 : 4 + length].decode("ascii").strip()
        if text.lower() not in _NO_SERIAL:
            return text
    with suppress(OSError, ValueError):
        # IDE and ATA disks whose drivers offer no such page: what udev has read.
        number = _text(path / "dev")
        for line in Path("/run/udev/data/b" + number).read_text().splitlines():
            if line.startswith("E:ID_SERIAL_SHORT="):
                return line.split("=", 1)[1]
    return ""


def _clean(serial: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", serial).strip("-.")[:48]


class Reader:
    """Reads a disk with O_DIRECT: a buffered read beside a mounted file system returns outdated data (seen).

    Not shared between threads.
    """

    def __init__(self, path: str, size: int, most: int = _PIECE) -> None:
        self._size = size
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._buffer = mmap.mmap(-1, most + 2 * _ALIGN)  # a page's alignment is enough for any disk

    def read(self, offset: int, length: int) -> memoryview:
        """The content; valid until the next read. Raises OSError."""
        start = offset - offset % _ALIGN
        # The end of a disk need not be a multiple of a page; it is one of the disk's sectors.
        end = min(-(-(offset + length) // _ALIGN) * _ALIGN, self._size)
        view = memoryview(self._buffer)
        got = 0
        while got < end - start:
            step = os.preadv(self._fd, [view[got : end - start]], start + got)
            if step <= 0:
                raise OSError(5, f"short read at {start + got}")
            got += step
        return view[offset - start : offset - start + length]

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_ZEROES = bytes(DIGEST_BLOCK)
_ZERO_DIGEST = hashlib.blake2b(_ZEROES, digest_size=_DIGEST_SIZE).digest()


def digests(reader: Reader, offset: int, length: int) -> bytes:
    """BLAKE2b, 128 bits, of each block of 64 KiB of a range that begins at one."""
    result = bytearray()
    for start in range(offset, offset + length, _PIECE):
        view = reader.read(start, min(_PIECE, offset + length - start))
        for at in range(0, len(view), DIGEST_BLOCK):
            block = bytes(view[at : at + DIGEST_BLOCK])
            # Comparing with zeroes is 60 times as fast as hashing, and disks hold many zeroes.
            zero = block == _ZEROES
            result += _ZERO_DIGEST if zero else hashlib.blake2b(block, digest_size=_DIGEST_SIZE).digest()
    return bytes(result)
