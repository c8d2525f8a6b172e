"""Where replicas are and what is recorded of each: layout, `replica.json`, the lock, and what both kinds of images do.

replica_dir/.asr-replicas                  marks a replica directory, with an identity
replica_dir/replicas/ID/replica.json       the record: epoch, kind, points, images
replica_dir/replicas/ID/images/            heads, and with `chain` all layers
replica_dir/replicas/ID/points/POINT/      description.json, and with `reflink` the clones of a kept point
replica_dir/replicas/ID/digests/POINT      digests of what that point's cycle wrote (`digests.py`)
replica_dir/replicas/ID/journal/           the open cycle
replica_dir/replicas/ID/tests/TEST/        overlays and NVRAM of a test failover
replica_dir/machines/NAME-ID/              disks of a promoted machine: they stay where they are at commit
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import ClassVar

import attrs

from asr_storage.files.durable import fsync_directory, remove_left_over, remove_tree, write_durably
from asr_storage.files.sparse import clones_files
from asr_storage.replica.blocks import Blocks, Change
from asr_storage.replica.digests import PointDigests
from asrcore import codec
from asrcore.driver import Closing, DiskReader, Promoted, StoredPoint
from asrcore.errors import (
    InvalidSetting,
    InvalidValue,
    MachineBusy,
    ReplicaDamaged,
    ReplicaDirNotMounted,
    ReplicaNotFound,
)
from asrcore.model.extent import Extent
from asrcore.model.machine import Description
from asrcore.model.watch import Watch
from asrcore.units import KiB

__all__ = [
    "FORMAT",
    "MAX_LAYERS",
    "Home",
    "Images",
    "Layer",
    "Layout",
    "Point",
    "Record",
    "ReplicaKind",
    "Shared",
    "checked_id",
    "probe_kind",
]

FORMAT = 3
"""Format 2 has layers with several children, and tests that hold a clone; format 3 kept points that consist of the
heads. Records of older formats are read as they are."""
MAX_LAYERS = 150
"""The maximum length of a chain: libvirt refuses 200 layers, and overlays on the chain add some."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_IMAGE = re.compile(rf"(images|points/{_ID.pattern})/[^/\0]+")
# How long a second process waits for the first to finish before it reports that it is busy.
_BUSY_SECONDS = 3.0
_BUSY_STEP = 0.05
_MARK_FILE = ".asr-replicas"
_MARK_TEXT = "asrcore keeps replicas of machines here\n"
_RESERVE = 512 * KiB  # at least; a record of 1000 points of two disks has 430 KiB


class ReplicaKind(Enum):
    """How recovery points share what they have in common."""

    REFLINK = "reflink"
    """Clones of a raw head: the file system shares the blocks (XFS, btrfs)."""
    CHAIN = "chain"
    """A chain of qcow2 overlays, for all other file systems."""


def probe_kind(replica_dir: Path) -> ReplicaKind:
    """The kind that a new replica in this directory gets, determined by a test. Raises OSError."""
    return ReplicaKind.REFLINK if clones_files(replica_dir) else ReplicaKind.CHAIN


def checked_id(what: str, text: str) -> str:
    """The id, fit to be a directory's name. Raises InvalidValue."""
    if _ID.fullmatch(text) is None:
        raise InvalidValue(what=what, value=text, wanted="1 to 128 letters, digits, dots, dashes and underscores")
    return text


# -- the record --------------------------------------------------------------------------------------------------


@attrs.frozen
class Point:
    """A sealed point and its images: disk id -> path relative to the replica's directory."""

    stored: StoredPoint
    images: Mapping[str, str]


@attrs.frozen
class Layer:
    """An image file of a chain: its disk, its backing file (None: a raw base), and its size in bytes.

    `level`: 0 for what one cycle or some wrote; a layer of level n+1 holds all that a run of level n does.
    """

    disk: str
    parent: str | None
    size: int
    level: int = 0


@attrs.frozen
class Record:
    """All that is durably known of a replica. Paths are relative to its directory.

    `disks`: sizes at the newest point (before the first: as created). `heads`: the image of each disk's newest
    content. `holds`: images that a test or a promoted machine uses, by holder. `next`: number of the next
    image file, so that no name is used twice. `seed`, `seeded`: the machine to seed from, and disks done. `digests`:
    names of the files of digests, oldest first, each that of a point or of one that was deleted; none is left out
    between two of them.
    """

    format: int
    replica_id: str
    name: str
    epoch: int
    kind: ReplicaKind
    disks: Mapping[str, int]
    heads: Mapping[str, str]
    points: tuple[Point, ...] = ()
    layers: Mapping[str, Layer] = attrs.field(factory=dict)
    holds: Mapping[str, Mapping[str, str]] = attrs.field(factory=dict)
    next: int = 1
    seed: str | None = None
    seeded: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()

    @property
    def head(self) -> Point | None:
        """The newest point."""
        return self.points[-1] if self.points else None

    def point(self, point_id: str) -> Point | None:
        """The point of that id, or None."""
        return next((point for point in self.points if point.stored.id == point_id), None)

    @property
    def held(self) -> frozenset[str]:
        """All images that a holder uses."""
        return frozenset(image for images in self.holds.values() for image in images.values())


def _wrong_in(record: Record, replica_id: str) -> str:
    """What cannot be true of a record: it was damaged, or changed by something else. Files outside of the replica are
    neither read nor written, whatever it says."""
    if record.replica_id != replica_id:
        return f"it is of replica {record.replica_id!r}"
    images = {*record.heads.values(), *record.layers, *record.held}
    images.update(image for point in record.points for image in point.images.values())
    images.update(layer.parent for layer in record.layers.values() if layer.parent is not None)
    if strange := next((image for image in sorted(images) if _IMAGE.fullmatch(image) is None), None):
        return f"{strange!r} is no image of a replica"
    if strange := next((name for name in record.digests if _ID.fullmatch(name) is None), None):
        return f"{strange!r} is no file of digests"
    if record.kind is ReplicaKind.CHAIN:
        if missing := next((head for head in record.heads.values() if head not in record.layers), None):
            return f"{missing!r} is no layer"
        if _has_circle({name: layer.parent for name, layer in record.layers.items()}):
            return "a layer is its own backing file"
    return ""


def _has_circle(parents: Mapping[str, str | None]) -> bool:
    ended: set[str] = set()
    for name in parents:
        path: list[str] = []
        at: str | None = name
        while at is not None and at not in ended:
            if len(path) > len(parents):
                return True
            path.append(at)
            at = parents.get(at)
        ended.update(path)
    return False


class Home:
    """The directory of one replica."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replica_id = path.name

    @property
    def images(self) -> Path:
        """Heads and layers."""
        return self.path / "images"

    @property
    def promotion(self) -> Path:
        """The driver's record of a machine that was made of this replica; while it exists, no cycle is opened."""
        return self.path / "promotion.json"

    def promoted(self) -> Promoted | None:
        """What that record says. Raises ReplicaDamaged."""
        try:
            return codec.load(Promoted, self.promotion.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as problem:
            raise ReplicaDamaged(replica=self.replica_id, detail=f"{self.promotion.name}: {problem}") from problem

    def point(self, point_id: str) -> Path:
        """The directory of a point."""
        return self.path / "points" / checked_id("point id", point_id)

    def digests(self, point_id: str) -> Path:
        """The file of digests of a point."""
        return self.path / "digests" / checked_id("point id", point_id)

    def test(self, test_id: str) -> Path:
        """The directory of a test."""
        return self.path / "tests" / checked_id("test id", test_id)

    def load(self) -> Record:
        """The record. Raises FileNotFoundError, ReplicaDamaged."""
        text = (self.path / "replica.json").read_bytes()
        try:
            record = codec.load(Record, text)
        except ValueError as problem:
            raise ReplicaDamaged(replica=self.replica_id, detail=f"replica.json: {problem}") from problem
        if record.format > FORMAT:
            detail = f"replica.json has format {record.format}; this driver supports up to {FORMAT}: upgrade it"
            raise ReplicaDamaged(replica=self.replica_id, detail=detail)
        if wrong := _wrong_in(record, self.replica_id):
            raise ReplicaDamaged(replica=self.replica_id, detail=f"replica.json: {wrong}")
        return record

    def save(self, record: Record) -> None:
        """Replace the record, durably. A full file system uses its reserve: dropping points must stay possible."""
        path, text = self.path / "replica.json", codec.dump(record)
        try:
            write_durably(path, text)
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._reserve.exists():
                raise
            self._reserve.unlink()
            write_durably(path, text)

    def fill_reserve(self) -> None:
        """Reserve a little space, if there is any: twice what the record takes, as it grows with the points."""
        fd = -1
        try:
            wanted = max(_RESERVE, 2 * (self.path / "replica.json").stat().st_size)
            if self._reserve.exists() and self._reserve.stat().st_size >= wanted:
                return
            fd = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(fd, 0, wanted + _RESERVE // 2)
        except OSError:  # full, or read-only: the next write reports it
            with contextlib.suppress(OSError):
                self._reserve.unlink()
        finally:
            if fd >= 0:
                os.close(fd)

    @property
    def _reserve(self) -> Path:
        return self.path / "reserve"

    def describe(self, point_id: str, description: Description) -> None:
        """Store the description of a point, durably."""
        directory = self.point(point_id)
        if not directory.is_dir():
            directory.mkdir(0o711)
            fsync_directory(directory.parent)
        write_durably(directory / "description.json", codec.dump(description))

    def description(self, point_id: str) -> Description:
        """Raises FileNotFoundError, ReplicaDamaged."""
        text = (self.point(point_id) / "description.json").read_bytes()
        try:
            return codec.load(Description, text)
        except ValueError as problem:
            detail = f"description of point {point_id}: {problem}"
            raise ReplicaDamaged(replica=self.replica_id, detail=detail) from problem

    def sweep(self, record: Record) -> None:
        """Delete images and points' directories that the record does not name: left by a crash, or dropped."""
        needed = {*record.heads.values(), *record.layers, *record.held}
        for point in record.points:
            needed.update(point.images.values())
        ids = {point.stored.id for point in record.points}
        ids |= {Path(image).parent.name for image in record.held}  # a clone that a test uses outlives its point
        for directory in list((self.path / "points").iterdir()):
            if directory.name not in ids:
                remove_tree(directory)
        for path in list(self.images.iterdir()):
            if f"images/{path.name}" not in needed:
                path.unlink()
        if (self.path / "digests").is_dir():
            for path in list((self.path / "digests").iterdir()):
                if path.name not in record.digests:
                    path.unlink()


class Layout:
    """A site's replica directory.

    `driver`: whose setting `replica_dir` is, for the error that it is wrong. `mark`: the identity that was recorded of
    the directory. A directory without it is not used: usually its file system is not mounted, and what is written
    there would fill the root file system and be hidden after the mount.
    """

    def __init__(self, replica_dir: Path, driver: str, site: str = "", mark: str = "") -> None:
        self.path = replica_dir
        self._driver, self._site, self._mark = driver, site, mark

    @property
    def replicas(self) -> Path:
        """Where replicas are."""
        return self.path / "replicas"

    @property
    def machines(self) -> Path:
        """Where promoted machines have their disks."""
        return self.path / "machines"

    def machine(self, name: str, replica_id: str) -> Path:
        """The directory for the disks of a promoted machine."""
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40] or "machine"
        return self.machines / f"{plain}-{checked_id('replica id', replica_id)}"

    def check(self) -> None:
        """Raises ReplicaDirNotMounted, and InvalidSetting when the directory does not exist and was never used: the
        operator mounts it, the driver never creates it."""
        if self._mark:
            if self._read_mark() != self._mark:
                raise ReplicaDirNotMounted(path=str(self.path), site=self._site, mark=self._mark)
        elif not self.path.is_dir():
            problem = f"there is no directory {str(self.path)!r} (is its file system mounted?)"
            raise InvalidSetting(driver=self._driver, setting="replica_dir", problem=problem)

    def adopt(self) -> str:
        """The directory's mark, made by `prepare`. Raises InvalidSetting, OSError."""
        self.prepare()
        return self._read_mark()

    def _read_mark(self) -> str:
        try:
            text = (self.path / _MARK_FILE).read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        found = re.search(r"^mark: ([0-9a-f]{16})$", text, re.MULTILINE)
        return found[1] if found else ""

    def prepare(self) -> None:
        """Make our directories in it. Raises InvalidSetting, OSError."""
        self.check()
        for directory in (self.replicas, self.machines):
            remove_left_over(directory)
        for directory in (self.replicas, self.machines):
            directory.mkdir(0o711, exist_ok=True)
        if not self._read_mark():
            write_durably(self.path / _MARK_FILE, f"{_MARK_TEXT}mark: {os.urandom(8).hex()}\n".encode(), 0o644)

    def home(self, replica_id: str) -> Home:
        """The home of a replica, there or not. Raises ReplicaDirNotMounted."""
        if self._mark:
            self.check()
        return Home(self.replicas / checked_id("replica id", replica_id))

    def existing(self, site: str, replica_id: str) -> Home:
        """The home of a replica that exists. Raises ReplicaNotFound."""
        home = self.home(replica_id)
        if not (home.path / "replica.json").is_file():
            if home.path.is_dir():
                raise ReplicaDamaged(replica=replica_id, detail="replica.json is missing")
            raise ReplicaNotFound(site=site, replica=replica_id)
        return home


# -- who works on it ---------------------------------------------------------------------------------------------


class Shared:
    """What all objects of this process share that work on one replica: its lock and its readers.

    `lock` orders the threads; a lock on the file `replica.json.lock` keeps other processes out during the work.
    """

    _all: ClassVar[weakref.WeakValueDictionary[str, Shared]] = weakref.WeakValueDictionary()
    _all_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, home: Home) -> None:
        """Not for use: see `of`."""
        self.home = home
        self.lock = threading.RLock()
        self.gate = Gate()
        self.writer: Callable[[], object | None] = lambda: None
        """A weak reference to the cycle writer that is open."""
        self.servers: Closing | None = None
        """What readers keep running; closed before images are written, and after the last user."""
        self.recorded: tuple[object, Mapping[str, PointDigests]] | None = None
        """Of which head, and the digests that are recorded of it; their files are open while the replica is held."""
        self.learning = threading.Lock()
        """Of who adds to `learned`."""
        self.learned: tuple[object, dict[str, Blocks]] = (None, {})
        """Of which head, and digests of its blocks that had none, as a resync read them; kept for the next point."""
        self.cloning = threading.Lock()
        """Of who clones the heads."""
        self._holding = threading.Lock()
        self._holders = 0
        self._fd = -1

    @classmethod
    def of(cls, home: Home) -> Shared:
        """The one of that directory."""
        key = os.path.realpath(home.path)
        with cls._all_lock:
            found = cls._all.get(key)
            if found is None:
                found = cls._all[key] = cls(home)
            return found

    def hold(self) -> None:
        """Keep other processes out until `release`. Raises MachineBusy, OSError."""
        with self._holding:
            if self._holders == 0:
                self._fd = self._lock_file()
            self._holders += 1

    def release(self) -> None:
        """The counterpart of `hold`."""
        with self._holding:
            self._holders -= 1
            if self._holders == 0:
                self.close_servers()
                self.recorded = None
                os.close(self._fd)
                self._fd = -1

    @contextlib.contextmanager
    def writing_images(self) -> Iterator[None]:
        """Images may be written: no read is under way and no reading server has them open."""
        with self.gate.writing():
            self.close_servers()
            yield

    def close_servers(self) -> None:
        """End what readers keep running."""
        if self.servers is not None:
            self.servers.close()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Exclusive work on the replica, of one thread of one process. Raises MachineBusy, OSError."""
        with self.lock:
            self.hold()
            try:
                yield
            finally:
                self.release()

    def _lock_file(self) -> int:
        # The directory itself is locked: it can be opened on a read-only file system as well.
        fd = os.open(self.home.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise MachineBusy(machine=self.home.replica_id, work="the work of another process") from None
            except BaseException:
                os.close(fd)
                raise
            time.sleep(_BUSY_STEP)  # a file lock with a time limit can only be polled


class Gate:
    """Readers share, a writer is alone. `generation` counts the writers: a reader that finds another one than at its
    last read reopens its image."""

    def __init__(self) -> None:
        self.changing = threading.Condition()
        self._readers = 0
        self._writing = False
        self.generation = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        """Returns the generation."""
        with self.changing:
            while self._writing:
                self.changing.wait()
            self._readers += 1
        try:
            yield self.generation
        finally:
            with self.changing:
                self._readers -= 1
                self.changing.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Waits for reads that are under way. Only one thread writes: the replica's lock sees to it."""
        with self.changing:
            self._writing = True
            while self._readers:
                self.changing.wait()
        try:
            self.generation += 1
            yield
        finally:
            with self.changing:
                self._writing = False
                self.changing.notify_all()


# -- images ------------------------------------------------------------------------------------------------------


class Images(ABC):
    """The images of one replica, of one kind. Called by one thread at a time, under the replica's lock.

    All methods may be repeated after a crash. Those that return a record have not saved it.
    Errors: OSError as it comes, or one of asrcore.errors.
    """

    def __init__(self, home: Home, shared: Shared) -> None:
        self.home = home
        self.shared = shared

    @abstractmethod
    def create(self, record: Record, disk_id: str, size: int) -> Record:
        """Create an empty head for a disk that has none."""

    @abstractmethod
    def open_heads(self, record: Record, disks: Mapping[str, int]) -> Record:
        """Heads of at least these sizes that may be written: nothing else needs their content."""

    @abstractmethod
    def apply(self, image: str, changes: Sequence[Change], data: Path) -> None:
        """Bring data and zeroes into an image, durably; `data` holds the data at the image's own offsets."""

    @abstractmethod
    def cost(self, record: Record, changes: Sequence[Change]) -> int:
        """Bytes of space that `apply` takes."""

    def headroom(self, record: Record) -> int:
        """Bytes that cycles leave free, so that points can still be dropped to free space."""
        return 0

    def to_preserve(self, record: Record) -> bool:
        """Whether the newest point is a kept one, made of heads, and cannot stay so when they are written."""
        return False

    def preserve(self, record: Record) -> Record:
        """Give such a point separate images."""
        return record

    def preserve_ahead(self, record: Record) -> None:  # noqa: B027 - most have nothing to preserve
        """The slow part of `preserve`: on any thread, beside anything that writes no heads."""

    @abstractmethod
    def tidy(self, record: Record, watch: Watch | None = None) -> Record:
        """Bring the images into a form in which points stay cheap and boot quickly, where that is due and there is
        space; the same record where it is not."""

    @abstractmethod
    def free(self, record: Record, save: Callable[[Record], None], watch: Watch | None = None) -> Record:
        """Delete what neither a point nor a head nor a holder needs, as far as that is possible now."""

    @abstractmethod
    def allocated(self, image: str, extent: Extent) -> list[Extent]:
        """All of the extent without gaps, `zero` where nothing is stored."""

    @abstractmethod
    def reader(self, find: Callable[[], str], replica_id: str) -> DiskReader:
        """Reads an image; `find` names it, and is asked again after images changed."""

    @abstractmethod
    def layer_count(self, record: Record) -> int:
        """Number of files in the longest chain."""
