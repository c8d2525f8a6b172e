"""The journal of one cycle: what arrived, where, and whether it is durable.

Per disk a sparse file holds data at the disk's own offsets. The index is a file of records, appended and
fsynced only after the data it speaks of is durable; a torn tail is cut off by its checksum. Later records win. Records
of kind DIGESTS are followed by the digests of their blocks, and by a checksum of these.
A cycle before the first point has nothing to protect: its data goes straight into the images (`direct`), and the
index records how far it got.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from operator import attrgetter
from pathlib import Path
from urllib.parse import quote

import attrs

from asr_storage.files.durable import fsync_directory, remove_tree, write_durably
from asr_storage.files.sparse import SparseFile
from asr_storage.replica.blocks import Blocks, Change, Kind, State
from asrcore import codec
from asrcore.driver import DIGEST_BLOCK, DIGEST_SIZE, SealSpec, StoredPoint
from asrcore.model.extent import Extent, normalise

__all__ = ["Change", "Commit", "Cycle", "Journal", "Kind", "file_stem", "resolve"]

_RECORD = struct.Struct("<QQHBx")  # offset, length, disk's number, kind
_CHECKED = struct.Struct("<QQHBxI")  # the same and its checksum
_CHECKSUM = 4
_EMPTY = memoryview(b"")
_INDEX, _CYCLE, _COMMIT = "index", "cycle.json", "commit.json"


@attrs.frozen
class Cycle:
    """An open cycle. `numbers`: disk ids in the order of their numbers in the index; it only grows.

    `direct`: data goes into the images themselves, `files` names them (paths relative to the replica).
    """

    id: str
    epoch: int
    base_point: str | None
    disks: Mapping[str, int]
    numbers: tuple[str, ...]
    direct: bool = False
    files: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Commit:
    """What makes a cycle a point: once this is durable, the point exists and the rest is repeated until done."""

    point: StoredPoint
    seal: SealSpec


def file_stem(disk_id: str) -> str:
    """A disk's id as the beginning of a file's name."""
    return quote(disk_id, safe="").replace(".", "%2E")


def resolve(changes: Iterable[Change]) -> list[Change]:
    """What holds in the end, later changes over earlier ones: sorted, without overlap, neighbours joined."""
    items = [change for change in changes if change.length > 0]
    ordered = sorted(items, key=attrgetter("offset"))
    if all(former.offset + former.length <= later.offset for former, later in itertools.pairwise(ordered)):
        return _joined(ordered)  # the usual case: a cycle notes each range once
    edges = sorted({edge for change in items for edge in (change.offset, change.end)})
    starting = sorted(range(len(items)), key=lambda number: items[number].offset)
    result: list[Change] = []
    active: list[tuple[int, int]] = []  # (-number, end): the newest on top
    following = 0
    for start, end in itertools.pairwise(edges):
        while following < len(starting) and items[starting[following]].offset <= start:
            number = starting[following]
            heappush(active, (-number, items[number].end))
            following += 1
        while active and active[0][1] <= start:
            heappop(active)
        if not active:
            continue
        result.append(Change(start, end - start, items[-active[0][0]].kind))
    return _joined(result)


def _joined(ordered: Iterable[Change]) -> list[Change]:
    result: list[Change] = []
    for item in ordered:
        if result and result[-1].end == item.offset and result[-1].kind is item.kind:
            result[-1] = Change(result[-1].offset, item.end - result[-1].offset, item.kind)
        else:
            result.append(item)
    return result


@attrs.frozen
class _Hashed:
    """Digests in the index, at a position of the file: of what `_durable` says of a disk up to an item."""

    after: int
    disk: str
    offset: int
    at: int
    length: int


class Journal:
    """The journal in `replica/journal`; there is one at a time. Writes come from several threads.

    Raises OSError as it comes, ValueError for a damaged file.
    """

    def __init__(self, replica: Path, cycle: Cycle) -> None:
        """Not for use: see `create` and `load`."""
        self.directory = replica / "journal"
        self.cycle = cycle
        self._replica = replica
        self._lock = threading.Lock()  # of all below
        self._flushing = threading.Lock()
        self._files: dict[str, SparseFile] = {}
        self._index: int | None = None
        self._fresh: list[tuple[str, Change, bytes]] = []  # with the digests of the whole blocks in it
        self._durable: list[tuple[str, Change]] = []
        self._hashed: list[_Hashed] = []
        self._index_bytes = 0

    @classmethod
    def create(cls, replica: Path, cycle: Cycle) -> Journal:
        """A new, empty one; afterwards the cycle is pending."""
        building = replica / "journal.new"
        if building.exists():
            shutil.rmtree(building)
        building.mkdir(mode=0o711)
        write_durably(building / _CYCLE, codec.dump(cycle))
        (building / _INDEX).touch(0o600)
        fsync_directory(building)
        building.rename(replica / "journal")
        fsync_directory(replica)
        return cls(replica, cycle)

    @staticmethod
    def pending(replica: Path) -> Cycle | None:
        """The open cycle, or None."""
        try:
            text = (replica / "journal" / _CYCLE).read_bytes()
        except FileNotFoundError:
            return None
        return codec.load(Cycle, text)

    @staticmethod
    def is_committed(replica: Path) -> bool:
        """Whether there is a commit record: a sealed cycle that may not be applied yet."""
        return (replica / "journal" / _COMMIT).exists()

    @classmethod
    def load(cls, replica: Path) -> Journal | None:
        """The one of the open cycle, or None."""
        cycle = cls.pending(replica)
        if cycle is None:
            return None
        journal = cls(replica, cycle)
        journal._read_index()
        return journal

    def _read_index(self) -> None:
        path = self.directory / _INDEX
        with path.open("rb") as file:
            if not path.stat().st_size:
                return
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        salt = self._salt()
        numbers = self.cycle.numbers
        start = 0
        while start + _CHECKED.size <= len(text):
            offset, length, number, kind, checksum = _CHECKED.unpack_from(text, start)
            body = text[start : start + _RECORD.size]
            if zlib.crc32(body, salt) != checksum or number >= len(numbers):
                break
            start += _CHECKED.size
            if kind == Kind.DIGESTS:
                size = -(-length // DIGEST_BLOCK) * DIGEST_SIZE
                digests, behind = text[start : start + size], start + size + _CHECKSUM
                if zlib.crc32(digests, salt).to_bytes(_CHECKSUM, "little") != text[start + size : behind]:
                    break
                self._hashed.append(_Hashed(len(self._durable), numbers[number], offset, start, size))
                start = behind
            else:
                self._durable.append((numbers[number], Change(offset, length, Kind(kind))))
            self._index_bytes = start

    def _salt(self) -> int:
        return zlib.crc32(self.cycle.id.encode())

    def resize(self, disks: Mapping[str, int], epoch: int, files: Mapping[str, str]) -> None:
        """The cycle continues with other disks or sizes, or under a newer epoch."""
        numbers = self.cycle.numbers + tuple(disk for disk in disks if disk not in self.cycle.numbers)
        cycle = attrs.evolve(self.cycle, disks=dict(disks), epoch=epoch, numbers=numbers, files=dict(files))
        if cycle != self.cycle:
            write_durably(self.directory / _CYCLE, codec.dump(cycle))
            self.cycle = cycle

    # -- writing

    def data_path(self, disk_id: str) -> Path:
        """Where the data of a disk is."""
        if self.cycle.direct:
            return self._replica / self.cycle.files[disk_id]
        return self.directory / f"{file_stem(disk_id)}.data"

    def _file(self, disk_id: str) -> SparseFile:
        with self._lock:
            file = self._files.get(disk_id)
            if file is None:
                file = self._files[disk_id] = SparseFile(self.data_path(disk_id), write=True)
            return file

    def write(self, disk_id: str, offset: int, data: memoryview, digests: bytes = b"") -> None:
        """Put data. `digests`: those of the whole blocks in it (see `whole_blocks`)."""
        length = len(data)
        self._file(disk_id).write(offset, data)
        self._note(disk_id, offset, length, Kind.DATA, digests)

    def note(self, disk_id: str, offset: int, length: int, kind: Kind) -> None:
        """Say that a range is zero, the same as in the head, or not done."""
        if kind is Kind.ZERO and self.cycle.direct:
            self._file(disk_id).punch(offset, length)
        self._note(disk_id, offset, length, kind)

    def _note(self, disk_id: str, offset: int, length: int, kind: Kind, digests: bytes = b"") -> None:
        if length:
            with self._lock:
                self._fresh.append((disk_id, Change(offset, length, kind), digests))

    def flush(self) -> None:
        """Make everything noted so far durable, data before index."""
        with self._flushing:
            with self._lock:
                fresh, self._fresh = self._fresh, []
                files = list(self._files.values())
            try:
                records = self._records(fresh)
                for file in files:
                    file.sync()
                hashed = self._append(records, self._digests(fresh))
            except BaseException:
                with self._lock:
                    self._fresh[:0] = fresh
                raise
            with self._lock:
                self._durable += records
                self._hashed += hashed

    def _records(self, fresh: list[tuple[str, Change, bytes]]) -> list[tuple[str, Change]]:
        return [
            (disk_id, change)
            for disk_id in self.cycle.numbers
            for change in resolve(item for name, item, _ in fresh if name == disk_id)
        ]

    def _digests(self, fresh: list[tuple[str, Change, bytes]]) -> list[tuple[str, int, int, bytes]]:
        """Disk, offset, length and digests of runs of whole blocks, as they are in the end."""
        result = []
        for disk_id in self.cycle.numbers:
            blocks = Blocks(size := self.cycle.disks.get(disk_id, 0))
            for name, change, digests in fresh:
                if name == disk_id:
                    blocks.note(change)
                    if digests:
                        blocks.known(-(-change.offset // DIGEST_BLOCK) * DIGEST_BLOCK, memoryview(digests))
            for start, end, state, parts in blocks.joined():
                if state is State.KNOWN:
                    length = min(end * DIGEST_BLOCK, size) - start * DIGEST_BLOCK
                    result.append((disk_id, start * DIGEST_BLOCK, length, b"".join(parts)))
        return result

    def _append(self, records: list[tuple[str, Change]], digests: list[tuple[str, int, int, bytes]]) -> list[_Hashed]:
        if not records:
            return []
        numbers = {disk_id: number for number, disk_id in enumerate(self.cycle.numbers)}
        salt = self._salt()
        text = bytearray()
        for disk_id, change in records:
            body = _RECORD.pack(change.offset, change.length, numbers[disk_id], change.kind)
            text += body + zlib.crc32(body, salt).to_bytes(_CHECKSUM, "little")
        hashed, after = [], len(self._durable) + len(records)
        for disk_id, offset, length, content in digests:
            body = _RECORD.pack(offset, length, numbers[disk_id], Kind.DIGESTS)
            text += body + zlib.crc32(body, salt).to_bytes(_CHECKSUM, "little")
            hashed.append(_Hashed(after, disk_id, offset, self._index_bytes + len(text), len(content)))
            text += content + zlib.crc32(content, salt).to_bytes(_CHECKSUM, "little")
        if self._index is None:
            self._index = os.open(self.directory / _INDEX, os.O_WRONLY | os.O_CLOEXEC)
        # At its known end, not appended: a tail that was torn, or that a full disk cut short, is overwritten.
        view = memoryview(text)
        at = self._index_bytes
        while view:
            written = os.pwrite(self._index, view, at)
            view, at = view[written:], at + written
        os.ftruncate(self._index, at)
        os.fsync(self._index)
        self._index_bytes = at
        return hashed

    # -- reading

    def changes(self, disk_id: str) -> list[Change]:
        """What the durable index says of a disk, as `resolve` gives it."""
        with self._lock:
            items = [change for name, change in self._durable if name == disk_id]
        return resolve(items)

    def blocks(self) -> dict[str, Blocks]:
        """What the durable index says of the blocks of each disk of the cycle, with the digests it has of them."""
        with (self.directory / _INDEX).open("rb") as file:
            text = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if self._index_bytes else _EMPTY
        result = {disk_id: Blocks(size) for disk_id, size in self.cycle.disks.items()}
        done = 0
        for hashed in [*self._hashed, _Hashed(len(self._durable), "", 0, 0, 0)]:
            for disk_id, change in self._durable[done : hashed.after]:
                if disk_id in result:
                    result[disk_id].note(change)
            done = hashed.after
            if hashed.disk in result:
                result[hashed.disk].known(hashed.offset, text[hashed.at : hashed.at + hashed.length])
        return result

    def done(self, disk_id: str) -> list[Extent]:
        """Ranges that are durable here."""
        kept = (change for change in self.changes(disk_id) if change.kind is not Kind.UNDONE)
        return normalise(Extent(change.offset, change.length) for change in kept)

    # -- ending

    def commit(self, commit: Commit) -> None:
        """The durable instant of the point. The cycle must be flushed."""
        write_durably(self.directory / _COMMIT, codec.dump(commit))

    @property
    def committed(self) -> Commit | None:
        """The commit record, if there is one."""
        try:
            text = (self.directory / _COMMIT).read_bytes()
        except FileNotFoundError:
            return None
        return codec.load(Commit, text)

    def remove(self) -> None:
        """Delete it, after its changes were applied."""
        self.close()
        remove_tree(self.directory)

    def close(self) -> None:
        """Close file descriptors; what was not flushed is lost. May be called twice."""
        with self._lock:
            files, self._files = list(self._files.values()), {}
            index, self._index = self._index, None
        for file in files:
            file.close()
        if index is not None:
            os.close(index)
