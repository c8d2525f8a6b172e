"""Files of a remote host through libvirt's storage API."""

from __future__ import annotations

import contextlib
import errno
import posixpath
import uuid

import libvirt
from lxml import etree

from asr_driver_libvirt.xml.domain import parse_xml

__all__ = ["download", "pool_of", "stamp", "volume"]


def pool_of(conn: libvirt.virConnect, directory: str, stack: contextlib.ExitStack) -> libvirt.virStoragePool:
    """The user's pool of a directory, else one that exists as long as `stack`. Raises libvirtError."""
    with contextlib.suppress(libvirt.libvirtError):
        pool = conn.storagePoolLookupByTargetPath(directory)
        pool.refresh(0)
        return pool
    root = etree.Element("pool", type="dir")
    etree.SubElement(root, "name").text = f"asr-{uuid.uuid4().hex}"
    etree.SubElement(etree.SubElement(root, "target"), "path").text = directory
    pool = conn.storagePoolCreateXML(etree.tostring(root, encoding="unicode"), 0)
    # It is transient: destroying it forgets it and touches no file.
    stack.callback(_forget, pool)
    return pool


def volume(conn: libvirt.virConnect, path: str, stack: contextlib.ExitStack) -> libvirt.virStorageVol:
    """The file as a volume. Raises libvirtError."""
    with contextlib.suppress(libvirt.libvirtError):
        return conn.storageVolLookupByPath(path)
    directory, name = posixpath.split(path)
    return pool_of(conn, directory, stack).storageVolLookupByName(name)


def stamp(file: libvirt.virStorageVol) -> str:
    """Equal stamps mean that the file was not written: its time of change (nanoseconds) and size."""
    xml = parse_xml(file.XMLDesc(0))
    return f"{xml.findtext('target/timestamps/mtime')}.{xml.findtext('physical') or xml.findtext('capacity')}"


def download(conn: libvirt.virConnect, file: libvirt.virStorageVol, most: int) -> bytes:
    """All of a file. Raises OSError (EFBIG) when it has more than `most` bytes, libvirtError."""
    data = bytearray()

    def take(_stream: libvirt.virStream, piece: bytes, _: object) -> int:
        data.extend(piece)
        if len(data) > most:  # of a negative number recvAll would make a RuntimeError
            raise OSError(errno.EFBIG, f"more than {most} bytes")
        return len(piece)

    stream = conn.newStream(0)
    file.download(stream, 0, 0, 0)
    stream.recvAll(take, None)
    stream.finish()
    return bytes(data)


def _forget(pool: libvirt.virStoragePool) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        pool.destroy()
