"""The footer of a fixed VHD: 512 bytes after the disk that make a page blob acceptable to Azure as a disk.

The layout is the published VHD specification 1.0. The geometry is FFFF/10/FF for every size: QEMU then takes the size
from the footer's size field; with a computed geometry it reads a disk of another size.
"""

from __future__ import annotations

import struct
import uuid

from asrcore.units import MiB

__all__ = ["FOOTER", "LEAST_DISK", "blob_size", "footer", "managed_size", "parse", "rounded"]

FOOTER = 512
"""Bytes."""
LEAST_DISK = 20 * MiB
"""Bytes of the smallest disk that Azure accepts by upload."""
_LAYOUT = struct.Struct(">8sIIQI4sI4sQQHBBII16s")
_FIXED = 2
_NO_NEXT = 0xFFFFFFFFFFFFFFFF
_CREATOR = b"win "
_HOST = b"Wi2k"


def rounded(size: int) -> int:
    """The size that Azure requires for a disk of `size` bytes: the next mebibyte."""
    return -(-size // MiB) * MiB


def blob_size(size: int) -> int:
    """Bytes of the page blob of a disk of `size` bytes, footer included."""
    return rounded(size) + FOOTER


def managed_size(size: int) -> int:
    """Bytes of the managed disk for a disk of `size` bytes."""
    return max(LEAST_DISK, rounded(size))


def footer(size: int, identity: uuid.UUID) -> bytes:
    """The footer of a disk of `size` bytes, already rounded."""
    fields = [b"conectix", 2, 0x00010000, _NO_NEXT, 0, _CREATOR, 0x000A0000, _HOST, size, size, 0xFFFF, 0x10, 0xFF]
    fields += [_FIXED, 0, identity.bytes]
    plain = _LAYOUT.pack(*fields).ljust(FOOTER, b"\0")
    fields[14] = ~sum(plain) & 0xFFFFFFFF
    return _LAYOUT.pack(*fields).ljust(FOOTER, b"\0")


def parse(data: bytes) -> int:
    """The size in bytes in a fixed disk's footer. Raises ValueError for anything else."""
    if len(data) != FOOTER or data[:8] != b"conectix":
        raise ValueError("no VHD footer")
    fields = list(_LAYOUT.unpack_from(data))
    checksum, fields[14] = fields[14], 0
    if checksum != ~sum(_LAYOUT.pack(*fields) + data[_LAYOUT.size :]) & 0xFFFFFFFF:
        raise ValueError("the VHD footer has a wrong checksum")
    if fields[13] != _FIXED:
        raise ValueError("the VHD is not of fixed size")
    return int(fields[9])
