"""Replicas of kind `chain`: a raw base and qcow2 overlays, for file systems that do not clone files.

A kept point freezes the top layer; the next cycle that is applied puts an empty overlay on it. Dropping a point leaves
a layer that is no longer needed: its child is merged down into it, which may be repeated at any time, because the child
still covers everything that it writes. A layer that a test or a promoted machine uses, and all below it, is never
written.

So that a thousand points do not make a chain of a thousand layers, a run of `SPAN` layers is gathered into one of the
next level, which takes the place of the run's last layer: later layers use it as their backing file, the points in the
run keep their own layers. A point then uses at most `SPAN` layers of each level; `layers.py` derives it from a record.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from asr_storage.files.durable import fsync_file
from asr_storage.files.sparse import SparseFile, rounded
from asr_storage.nbd.client import NbdClient, NbdError
from asr_storage.nbd.status import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    BlockStatus,
    dirty_bitmap_context,
    merge_status,
)
from asr_storage.qemu import img
from asr_storage.qemu.nbd_server import QemuNbd
from asr_storage.qemu.process import QemuError, run
from asr_storage.replica import layers, raw
from asr_storage.replica.journal import Change, Kind, file_stem
from asr_storage.replica.store import FORMAT, Images, Layer, Record, Shared
from asrcore.crashpoint import reach
from asrcore.driver import Closing, DiskReader
from asrcore.errors import ReplicaDamaged
from asrcore.model.extent import Extent, batches, normalise
from asrcore.model.watch import Watch
from asrcore.units import KiB, MiB

__all__ = ["ChainImages", "qemu_errors"]

SPAN = 10
"""Layers of a level before they are gathered: 1000 points stand on at most 30. Few layers make booting fast (with three
disks 71 layers each took 2.2 s, 141 took 13.6 s), few levels save space (what a level gathers is stored once more)."""
_CLUSTER = 64 * KiB
_COPY = 4 * MiB
_REQUESTS = 64
_READS_AS_ZERO = 2  # base:allocation
_NBD_SECONDS = 60.0
# qemu-img has to write what the child holds; 5 MiB/s is a disk close to failure.
_SLOWEST = 5 * MiB
_LEAST_SECONDS = 120.0
_MOST_HEADROOM = 8  # as a fraction of the file system: one huge overlay must not stop replication

_WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
    "Operation not permitted": errno.EPERM,
    "No such file or directory": errno.ENOENT,
}


@contextlib.contextmanager
def qemu_errors(path: Path) -> Iterator[None]:
    """Errors of QEMU's tools and NBD as OSError, with the causing error number where it is known."""
    try:
        yield
    except NbdError as problem:
        raise OSError(problem.errno or errno.EIO, str(problem), str(path)) from problem
    except QemuError as problem:
        number = next((number for words, number in _WORDS.items() if words in problem.output), errno.EIO)
        raise OSError(number, str(problem), str(path)) from problem


def _format(image: str) -> str:
    return "raw" if image.endswith(".raw") else "qcow2"


class ChainImages(Images):
    """See `Images`."""

    def create(self, record: Record, disk_id: str, size: int) -> Record:
        name = f"images/{file_stem(disk_id)}.{record.next:06d}.raw"
        raw.create(self.home.path / name, size)
        return _with_head(record, disk_id, name, Layer(disk_id, None, rounded(size)))

    def open_heads(self, record: Record, disks: Mapping[str, int]) -> Record:
        frozen = layers.frozen(record)
        for disk_id, size in disks.items():
            head = record.heads.get(disk_id)
            if head is None:
                record = self.create(record, disk_id, size)
            elif head in frozen:
                record = self._put_on_top(record, disk_id, head, max(size, 0))
            elif record.layers[head].size < rounded(size):
                record = self._grow(record, head, size)
        return record

    def _put_on_top(self, record: Record, disk_id: str, parent: str, size: int) -> Record:
        name = self._overlay(record, disk_id, parent, size)
        reach("target.chain.overlay")
        return _with_head(record, disk_id, name, Layer(disk_id, parent, max(rounded(size), 512)))

    def _overlay(self, record: Record, disk_id: str, parent: str, size: int) -> str:
        """A new empty overlay, durable; no record names it yet."""
        name = f"images/{file_stem(disk_id)}.{record.next:06d}.qcow2"
        path = self.home.path / name
        path.unlink(missing_ok=True)  # left by a crash: no record names it
        (self.home.path / parent).stat()
        # The backing file's name is relative: the replica may be read where its file system is mounted elsewhere.
        # -u: all layers need not be opened to learn a size that is given.
        command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", Path(parent).name, "-F", _format(parent)]
        with qemu_errors(path):
            run([*command, str(path), str(max(rounded(size), 512))], what=f"create {path}", timeout=_LEAST_SECONDS)
        path.chmod(0o600)
        fsync_file(path)
        fsync_file(path.parent)
        return name

    def _grow(self, record: Record, image: str, size: int) -> Record:
        path = self.home.path / image
        if _format(image) == "raw":
            raw.grow(path, size)
        else:
            with qemu_errors(path):
                img.resize(path, "qcow2", rounded(size), timeout=_LEAST_SECONDS)
        grown = attrs.evolve(record.layers[image], size=rounded(size))
        return attrs.evolve(record, layers={**record.layers, image: grown})

    # -- applying

    def apply(self, image: str, changes: Sequence[Change], data: Path) -> None:
        path = self.home.path / image
        if _format(image) == "raw":
            raw.apply(path, changes, data)
            return
        wanted = [change for change in changes if change.kind in (Kind.DATA, Kind.ZERO)]
        if not wanted:
            return
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))  # the system's own error where it may not be written
        with (
            qemu_errors(path),
            QemuNbd(path, "qcow2", writable=True) as server,
            server.connect(timeout=_NBD_SECONDS) as client,
        ):
            _send(client, wanted, data)
            client.flush()
        fsync_file(path)

    def cost(self, record: Record, changes: Sequence[Change]) -> int:
        # Whole clusters, and a generous estimate for the tables (8 bytes per cluster).
        data = (change for change in changes if change.kind is Kind.DATA)
        clusters = sum(-(-change.end // _CLUSTER) - change.offset // _CLUSTER for change in data)
        return clusters * (_CLUSTER + 64) + 4 * _CLUSTER * len(record.heads)

    def headroom(self, record: Record) -> int:
        # Merging the largest overlay writes as much as it holds before it is removed.
        sizes = [
            (self.home.path / name).stat().st_blocks * 512 for name, layer in record.layers.items() if layer.parent
        ]
        status = os.statvfs(self.home.path)
        return min(max(sizes, default=0), status.f_blocks * status.f_frsize // _MOST_HEADROOM)

    # -- gathering

    def tidy(self, record: Record, watch: Watch | None = None) -> Record:
        frozen = layers.frozen(record)
        for disk_id, head in record.heads.items():
            due = layers.to_gather(record, head, SPAN) if head in frozen else None
            if due is not None and self._has_space_for(due):
                record = self._gather(record, disk_id, head, due, watch)
                reach("target.chain.gathered")
        return record

    def _has_space_for(self, due: layers.Run) -> bool:
        """Without gathering the chain only grows longer, so half of the free space is left free for cycles."""
        wanted = sum((self.home.path / name).stat().st_blocks * 512 for name in due.layers)
        status = os.statvfs(self.home.path)
        return 2 * wanted < status.f_bavail * status.f_frsize

    def _gather(self, record: Record, disk_id: str, head: str, due: layers.Run, watch: Watch | None) -> Record:
        size = record.layers[head].size
        name = self._overlay(record, disk_id, due.below, size)
        source, path = self.home.path / head, self.home.path / name
        try:
            with (
                qemu_errors(path),
                QemuNbd(source, "qcow2", depth=True) as export,
                QemuNbd(path, "qcow2", writable=True) as gathered,
                export.connect(contexts=[BASE_ALLOCATION, ALLOCATION_DEPTH], timeout=_NBD_SECONDS) as reader,
                gathered.connect(timeout=_NBD_SECONDS) as writer,
            ):
                _copy_above(reader, writer, len(due.layers), watch)
                writer.flush()
            fsync_file(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        layer = Layer(disk_id, due.below, size, due.level)
        return attrs.evolve(layers.renamed(_with_head(record, disk_id, name, layer), head, name), format=FORMAT)

    # -- freeing

    def free(self, record: Record, save: Callable[[Record], None], watch: Watch | None = None) -> Record:
        while True:
            below = layers.next_merge(record)
            if below is None:
                break
            if watch is not None:
                watch.check()
            record = self._merge(record, below)
            save(record)
            reach("target.drop.merge-recorded")
        pruned = layers.without_leaves(record)
        if pruned.layers != record.layers:
            record = pruned
            save(record)
        self.home.sweep(record)
        return record

    def _merge(self, record: Record, below: str) -> Record:
        """Merge the one child of a layer down into it; the layer then takes the child's place."""
        children = layers.children(record)
        (child,) = children[below]
        path, target = self.home.path / child, self.home.path / below
        with self.shared.writing_images(), qemu_errors(path):
            os.close(os.open(target, os.O_RDWR | os.O_CLOEXEC))
            img.commit(path, "qcow2", timeout=_LEAST_SECONDS + path.stat().st_blocks * 512 / _SLOWEST)
            fsync_file(target)
            reach("target.drop.merged")
            for grandchild in children.get(child, []):
                self._rebase(grandchild, below)
                reach("target.drop.rebased")
        return layers.in_place_of(record, child, below)

    def _rebase(self, image: str, parent: str) -> None:
        path = self.home.path / image
        command = ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", Path(parent).name, "-F", _format(parent)]
        run([*command, str(path)], what=f"put {path} on {parent}", timeout=_LEAST_SECONDS)
        fsync_file(path)

    # -- reading

    def allocated(self, image: str, extent: Extent) -> list[Extent]:
        path = self.home.path / image
        if _format(image) == "raw":
            return raw.allocated(path, extent)
        if extent.length == 0:
            return []
        self.shared.hold()
        try:
            with self.shared.gate.reading(), qemu_errors(path):
                server = _servers(self.shared).get(path)
                with server.connect(contexts=[BASE_ALLOCATION], timeout=_NBD_SECONDS) as client:
                    status = list(client.block_status(extent.offset, extent.length))
        finally:
            self.shared.release()
        return normalise(Extent(item.offset, item.length, bool(item.flags & _READS_AS_ZERO)) for item in status)

    def reader(self, find: Callable[[], str], replica_id: str) -> DiskReader:
        return _ChainReader(self.home.path, find, self.shared, replica_id)

    def layer_count(self, record: Record) -> int:
        return max((len(layers.path(record, head)) for head in record.heads.values()), default=0)


def _send(client: NbdClient, changes: Sequence[Change], data: Path) -> None:
    for change in changes:
        if change.kind is Kind.ZERO:
            client.zero(change.offset, change.length)
    extents = [Extent(change.offset, change.length) for change in changes if change.kind is Kind.DATA]
    if not extents:
        return
    buffer = memoryview(bytearray(_COPY))
    source = SparseFile(data, write=False)
    try:
        if os.fstat(source.fd).st_size < extents[-1].end:
            raise OSError(errno.EIO, f"the journal ends before {extents[-1].end}", str(data))
        # Many in flight: QEMU took 1.4 s for 3,277 new clusters one after the other, 0.7-1.0 s this way (measured).
        for batch in batches(extents, _COPY, _REQUESTS):
            parts, at = [], 0
            for extent in batch:
                part = buffer[at : at + extent.length]
                source.read_into(extent.offset, part)
                parts.append((extent.offset, part))
                at += extent.length
            client.write_each(parts)
    finally:
        source.close()


def _copy_above(reader: NbdClient, writer: NbdClient, depth: int, watch: Watch | None) -> None:
    """Write what the given number of topmost layers hold, including zeroes."""
    above = dirty_bitmap_context("above")
    status = (
        BlockStatus(above, item.offset, item.length, int(0 < item.flags <= depth))
        if item.context == ALLOCATION_DEPTH
        else item
        for item in reader.block_status(0, reader.size)
    )
    found = [extent for extent in merge_status(status, 0, reader.size, bitmap="above") if extent.dirty]
    buffer = memoryview(bytearray(_COPY))
    for extent in found:
        if watch is not None:
            watch.check()
        if extent.zero:
            writer.zero(extent.offset, extent.length)
            continue
        for at in range(extent.offset, extent.end, _COPY):
            piece = buffer[: min(_COPY, extent.end - at)]
            reader.read_into(piece, at)
            writer.write(piece, at)


def _with_head(record: Record, disk_id: str, name: str, layer: Layer) -> Record:
    return attrs.evolve(
        record,
        next=record.next + 1,
        heads={**record.heads, disk_id: name},
        layers={**record.layers, name: layer},
    )


# -- reading servers ---------------------------------------------------------------------------------------------


class _Servers(Closing):
    """Read-only servers of a replica's images: started when needed, ended before anything is written, and when the last
    user of the replica is done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servers: dict[Path, QemuNbd] = {}

    def get(self, path: Path) -> QemuNbd:
        with self._lock:
            server = self._servers.get(path)
            if server is None:
                server = QemuNbd(path, "qcow2")
                server.start()
                self._servers[path] = server
            return server

    def close(self) -> None:
        with self._lock:
            servers, self._servers = self._servers, {}
        for server in servers.values():
            with contextlib.suppress(QemuError):  # it only read
                server.close()


def _servers(shared: Shared) -> _Servers:
    with shared.gate.changing:
        if shared.servers is None:
            shared.servers = _Servers()
        servers = shared.servers
    assert isinstance(servers, _Servers)
    return servers


class _ChainReader(DiskReader):
    """Reads an image of a chain; reconnects when the replica's images changed."""

    def __init__(self, home: Path, find: Callable[[], str], shared: Shared, replica_id: str) -> None:
        self._home, self._find, self._shared, self._replica_id = home, find, shared, replica_id
        self._raw: raw.RawReader | None = None
        self._client: NbdClient | None = None
        self._generation = -1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises ReplicaDamaged when the image is missing or cannot be read."""
        with self._shared.gate.reading() as generation:
            if generation != self._generation:
                self.close()
                image = self._find()
                if _format(image) == "raw":
                    self._raw = raw.RawReader(self._home, self._find, self._shared, self._replica_id)
                else:
                    self._connect(self._home / image)
                self._generation = generation
            if self._raw is not None:
                self._raw.read_now(offset, buffer, generation)
                return
            assert self._client is not None
            try:
                self._read(self._client, offset, buffer)
            except NbdError as problem:
                raise ReplicaDamaged(replica=self._replica_id, detail=str(problem)) from problem

    def _read(self, client: NbdClient, offset: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), client.size - offset))
        if inside:
            client.read_into(buffer[:inside], offset)
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)

    def _connect(self, path: Path) -> None:
        if not path.exists():
            raise ReplicaDamaged(replica=self._replica_id, detail=f"{path} is missing")
        with qemu_errors(path):
            self._client = _servers(self._shared).get(path).connect(timeout=_NBD_SECONDS)

    def close(self) -> None:
        """May be called twice."""
        client, self._client = self._client, None
        reader, self._raw = self._raw, None
        self._generation = -1
        if client is not None:
            client.close()
        if reader is not None:
            reader.close()
