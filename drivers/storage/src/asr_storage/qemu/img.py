"""qemu-img: what images are and how they are created, merged and checked.

Formats are always stated and paths made absolute (so no name is taken for a protocol). Every call has a time limit
in seconds and raises QemuError with qemu-img's words, QemuTimeout, or HostIncomplete if it is not installed.
"""

import errno
import os
from pathlib import Path

import attrs
import msgspec

from asr_storage.qemu.process import run

__all__ = [
    "Bitmap",
    "CheckResult",
    "ImageInfo",
    "check",
    "commit",
    "convert",
    "create",
    "info",
    "rebase_unsafe",
    "remove_bitmap",
    "resize",
]

QUICK = 60.0  # seconds, for what touches metadata only


@attrs.frozen
class Bitmap:
    """A persistent dirty bitmap. `in_use`: not saved after a crash, so inconsistent. `auto`: recording."""

    name: str
    granularity: int  # bytes
    in_use: bool
    auto: bool


@attrs.frozen
class ImageInfo:
    """Sizes in bytes. `backing_file` as recorded, `full_backing_file` as qemu-img resolves it."""

    format: str
    virtual_size: int
    actual_size: int  # allocated on the host
    cluster_size: int | None
    backing_file: str | None
    full_backing_file: str | None
    backing_format: str | None  # None with a backing file: QEMU would probe it; do not open such an image
    data_file: str | None
    encrypted: bool
    corrupt: bool  # marked so by QEMU
    dirty: bool  # not closed properly, refcounts to be repaired
    snapshots: tuple[str, ...]  # internal ones
    bitmaps: tuple[Bitmap, ...]
    compat: str = ""  # of qcow2: "0.10" cannot hold bitmaps, "1.1" can


@attrs.frozen
class CheckResult:
    """`corruptions` mean lost data; `leaks` only lost space. Counts of clusters."""

    corruptions: int
    leaks: int

    @property
    def sound(self) -> bool:
        return not self.corruptions


# What qemu-img prints as JSON; fields that are not named here are skipped.


class _Snapshot(msgspec.Struct):
    name: str


class _Bitmap(msgspec.Struct):
    name: str
    granularity: int
    flags: tuple[str, ...]


class _Special(msgspec.Struct, rename="kebab"):
    data_file: str | None = None
    corrupt: bool = False
    compat: str = ""
    bitmaps: tuple[_Bitmap, ...] = ()


class _FormatSpecific(msgspec.Struct):
    data: _Special = msgspec.field(default_factory=_Special)


class _Info(msgspec.Struct, rename="kebab"):
    format: str
    virtual_size: int
    actual_size: int = 0
    cluster_size: int | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    encrypted: bool = False
    dirty_flag: bool = False
    snapshots: tuple[_Snapshot, ...] = ()
    format_specific: _FormatSpecific = msgspec.field(default_factory=_FormatSpecific)


class _Check(msgspec.Struct):
    corruptions: int = 0
    leaks: int = 0


def info(path: Path, fmt: str, *, in_use: bool = False, timeout: float = QUICK) -> ImageInfo:
    """What the header of one image says (its backing files are not opened). IN_USE: a running guest may write it."""
    share = ["-U"] if in_use else []
    command = ["qemu-img", "info", "--output=json", "-f", fmt, *share, _name(path)]
    _, text = run(command, what=f"read the header of {path}", timeout=timeout)
    said = msgspec.json.decode(text, type=_Info)
    special = said.format_specific.data
    return ImageInfo(
        format=said.format,
        virtual_size=said.virtual_size,
        actual_size=said.actual_size,
        cluster_size=said.cluster_size,
        backing_file=said.backing_filename,
        full_backing_file=said.full_backing_filename or said.backing_filename,
        backing_format=said.backing_filename_format,
        data_file=special.data_file,
        encrypted=said.encrypted,
        corrupt=special.corrupt,
        dirty=said.dirty_flag,
        snapshots=tuple(item.name for item in said.snapshots),
        bitmaps=tuple(
            Bitmap(item.name, item.granularity, "in-use" in item.flags, "auto" in item.flags)
            for item in special.bitmaps
        ),
        compat=special.compat,
    )


def create(
    path: Path,
    size: int | None,
    fmt: str,
    *,
    backing: Path | None = None,
    backing_fmt: str | None = None,
    timeout: float = QUICK,
) -> None:
    """A new empty image of SIZE bytes (None: the backing file's), durable on return. PATH must not exist:
    qemu-img would overwrite it."""
    if (backing is None) != (backing_fmt is None):
        raise ValueError("a backing file and its format go together")
    if size is None and backing is None:
        raise ValueError("neither a size nor a backing file")
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    base = [] if backing is None or backing_fmt is None else ["-b", _name(backing), "-F", backing_fmt]
    run(
        ["qemu-img", "create", "-q", "-f", fmt, *base, _name(path), *([] if size is None else [str(size)])],
        what=f"create {path}",
        timeout=timeout,
    )
    _make_durable(path)


def convert(
    source: Path, source_fmt: str, target: Path, target_fmt: str, *, in_use: bool = False, timeout: float
) -> None:
    """Copy all layers of SOURCE to the new image TARGET, holes kept, durable on return."""
    share = ["-U"] if in_use else []
    # writeback: the default for convert is to never flush
    options = ["-t", "writeback", "-W", "-m", "16", "-f", source_fmt, "-O", target_fmt, *share]
    run(
        ["qemu-img", "convert", *options, _name(source), _name(target)],
        what=f"copy {source} to {target}",
        timeout=timeout,
    )
    _make_durable(target)


def commit(overlay: Path, fmt: str, *, timeout: float) -> None:
    """Write what OVERLAY holds into its backing file. OVERLAY is left as it is, so this can be repeated after a
    crash; the caller deletes it."""
    run(
        ["qemu-img", "commit", "-q", "-f", fmt, "-d", _name(overlay)],
        what=f"merge {overlay} into its backing file",
        timeout=timeout,
    )


def rebase_unsafe(
    path: Path, fmt: str, backing: Path | None, backing_fmt: str | None, *, timeout: float = QUICK
) -> None:
    """Record another backing file (None: none) without copying anything: content must be the same through it."""
    if (backing is None) != (backing_fmt is None):
        raise ValueError("a backing file and its format go together")
    base = ["-b", ""] if backing is None or backing_fmt is None else ["-b", _name(backing), "-F", backing_fmt]
    run(
        ["qemu-img", "rebase", "-q", "-u", "-f", fmt, *base, _name(path)],
        what=f"record the backing file of {path}",
        timeout=timeout,
    )
    _make_durable(path)


def check(path: Path, fmt: str, *, in_use: bool = False, timeout: float) -> CheckResult:
    """Check an image's own structure (not of raw ones: QemuError). Repairs nothing."""
    share = ["-U"] if in_use else []
    # 2: corruptions, 3: leaks only. 1: could not check, 63: this format cannot be checked.
    _, text = run(
        ["qemu-img", "check", "--output=json", "-f", fmt, *share, _name(path)],
        what=f"check {path}",
        timeout=timeout,
        accept=(0, 2, 3),
    )
    said = msgspec.json.decode(text, type=_Check)
    return CheckResult(corruptions=said.corruptions, leaks=said.leaks)


def resize(path: Path, fmt: str, size: int, *, shrink: bool = False, timeout: float = QUICK) -> None:
    """Make the image SIZE bytes, new ones reading as zeroes. Smaller only with SHRINK: content beyond it is lost."""
    run(
        ["qemu-img", "resize", "-q", "-f", fmt, *(["--shrink"] if shrink else []), _name(path), str(size)],
        what=f"resize {path} to {size} bytes",
        timeout=timeout,
    )
    _make_durable(path)


def remove_bitmap(path: Path, name: str, *, timeout: float = QUICK) -> None:
    """Delete a persistent dirty bitmap of a qcow2 image that nobody has open, also one that is inconsistent."""
    run(
        ["qemu-img", "bitmap", "--remove", "-f", "qcow2", _name(path), name],
        what=f"delete bitmap {name} of {path}",
        timeout=timeout,
    )


def _name(path: Path) -> str:
    return str(path.absolute())


def _make_durable(path: Path) -> None:
    """The file and its name in the directory."""
    for place in (path, path.absolute().parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
