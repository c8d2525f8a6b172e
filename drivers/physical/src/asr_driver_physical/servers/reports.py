"""What an agent or a file of facts reports, judged by type and limit before anything of it is used or stored.

Whoever holds a server's agent can report anything. What does not fit is an error of that one server. The limits are of
what Linux, or a virtual machine, can have; `asr_mobility.facts` and `asr_mobility.service` make these answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import attrs
import msgspec
from msgspec import Meta

from asr_driver_physical.errors import OddReport
from asrcore.model.extent import Extent, normalise
from asrcore.units import DAY

__all__ = [
    "Facts",
    "Held",
    "Opened",
    "Reported",
    "Settled",
    "digests_fit",
    "facts_of",
    "held",
    "machine",
    "opened",
    "read_fits",
    "settled",
    "within",
    "zero_numbers",
]

T = TypeVar("T")

_DEEPEST = 8
_MOST = 4096
"""Entries of a list: no server has as many disks, cards or mounts."""
_LONGEST = 4096  # letters; the longest path
_Text = Annotated[str, Meta(max_length=_LONGEST)]
_Path = _Text
_DiskId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f/]+\Z")]
_Name = Annotated[str, Meta(pattern=r"^(?!\.{1,2}\Z)[^\s/\x00-\x20\x7f]{1,64}\Z")]
"""Of a disk or a card, as far as Linux limits it: it becomes part of a path."""
_Mac = Annotated[str, Meta(pattern=r"^([0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5,19})?\Z")]
_Uuid = Annotated[str, Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
_Size = Annotated[int, Meta(ge=0, le=1 << 62)]
_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Range = tuple[_Size, _Size]
_Mark = tuple[Annotated[str, Meta(max_length=64)], _Count, Annotated[str, Meta(max_length=64)]]
_Marks = Annotated[dict[_DiskId, _Mark], Meta(max_length=_MOST)]


@attrs.frozen
class ReportedDisk:
    """A disk of the machine; `size` in bytes."""

    id: _DiskId
    name: _Name
    size: _Size
    stable: bool = True
    read_only: bool = False
    sector_size: Annotated[int, Meta(ge=512, le=1 << 16, multiple_of=512)] = 512


@attrs.frozen
class ReportedNic:
    """A network card."""

    name: _Name
    mac: _Mac
    driver: _Text = ""


@attrs.frozen
class Attached:
    """A disk that may be attached for a while only."""

    name: _Name
    why: _Text


@attrs.frozen
class Reported:
    """The machine; `memory` in bytes."""

    id: _Uuid
    hostname: _Text
    cpus: Annotated[int, Meta(ge=1, le=1 << 16)]
    memory: Annotated[int, Meta(ge=0, le=1 << 50)]
    firmware: Literal["bios", "uefi"]
    secure_boot: bool
    tpm: bool
    os: _Text
    disks: Annotated[list[ReportedDisk], Meta(max_length=_MOST)]
    nics: Annotated[list[ReportedNic], Meta(max_length=_MOST)]
    kernel: _Text = ""
    attached: Annotated[list[Attached], Meta(max_length=_MOST)] = attrs.field(factory=list)
    vendor: _Text = ""


@attrs.frozen
class Mounted:
    """A mounted file system."""

    path: _Path
    kind: _Text
    device: _Path
    read_only: bool


@attrs.frozen
class FstabLine:
    """A line of /etc/fstab."""

    device: _Path
    path: _Path


@attrs.frozen
class Initramfs:
    """Which disk drivers the server can boot with."""

    image: _Path
    listed: bool
    drivers: Annotated[list[_Text], Meta(max_length=_MOST)]


@attrs.frozen
class CardInUse:
    """A card, and the files of the configuration that name it."""

    name: _Name
    mac: _Mac
    named_in: Annotated[list[_Path], Meta(max_length=_MOST)]
    kept: bool
    driver: _Text = ""


_Names = Annotated[list[_Text], Meta(max_length=_MOST)]


@attrs.frozen
class Facts:
    """What readiness is derived from; `free` and `memory_limit` in bytes."""

    machine: Reported
    identity: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    root: bool
    python: Annotated[str, Meta(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}\Z")]
    systemd: bool
    tracking: _Text
    lockdown: _Text
    mounts: Annotated[list[Mounted], Meta(max_length=_MOST)]
    fstab: Annotated[list[FstabLine], Meta(max_length=_MOST)]
    multipath: _Names
    encrypted: _Names
    boot_loader: _Names
    initramfs: Initramfs
    free: _Size
    network: Annotated[list[CardInUse], Meta(max_length=_MOST)] = attrs.field(factory=list)
    swap: _Names = attrs.field(factory=list)
    arrays: _Names = attrs.field(factory=list)
    memory_limit: _Size = 0


@attrs.frozen
class OpenedDisk:
    """A disk of a view that was opened; `changed`: (offset, length)."""

    id: _DiskId
    name: _Name
    size: _Size
    tracking: Literal["changed", "new", "lost", "none"]
    reason: _Text
    changed: list[_Range]


@attrs.frozen
class Opened:
    """The answer to `open`."""

    marks: _Marks
    disks: Annotated[list[OpenedDisk], Meta(max_length=_MOST)]
    machine: Reported


@attrs.frozen
class Settled:
    """The answer to `settle`; `age` in seconds since the instant that was captured."""

    live: bool
    changed: dict[_DiskId, list[_Range]]
    marks: _Marks
    machine: Reported
    age: Annotated[float, Meta(ge=0, le=DAY)] = 0.0
    consistency: Literal["crash", "filesystem", "application"] = "crash"


@attrs.frozen
class Held:
    """The answer to `held`: where its body belongs."""

    places: Annotated[list[_Range], Meta(max_length=1 << 16)]
    more: bool


def _clean(value: object, depth: int = 0) -> object:
    """Texts without what is no text (names of files may hold any bytes), in their longest length. What they say is for
    people; what becomes part of a path has a pattern."""
    if depth > _DEEPEST:
        return None
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else "\ufffd" for letter in value[:_LONGEST])
    if isinstance(value, dict):
        return {_clean(name): _clean(item, depth + 1) for name, item in value.items()}
    return [_clean(item, depth + 1) for item in value] if isinstance(value, list) else value


def _shaped(server: str, kind: type[T], reported: object) -> T:
    try:
        return msgspec.convert(_clean(reported), kind)
    except (msgspec.ValidationError, UnicodeEncodeError, RecursionError) as problem:
        raise OddReport(server=server, detail=str(problem)) from problem


def within(server: str, disk: str, size: int, ranges: Sequence[tuple[int, int]]) -> list[Extent]:
    """The ranges of a disk of that size, sorted, neighbours joined. Raises OddReport."""
    for offset, length in ranges:
        if offset + length > size:
            raise OddReport(server=server, detail=f"{offset}+{length} is not within disk {disk} of {size} bytes")
    return normalise(Extent(offset, length) for offset, length in ranges)


def _distinct(server: str, disks: Sequence[ReportedDisk] | Sequence[OpenedDisk]) -> None:
    if len({disk.id for disk in disks}) != len(disks):
        raise OddReport(server=server, detail="two disks have one id")


def facts_of(server: str, reported: object) -> dict[str, Any]:
    """The facts, with nothing in them that is not known here. Raises OddReport."""
    facts = _shaped(server, Facts, reported)
    _distinct(server, facts.machine.disks)
    plain: dict[str, Any] = msgspec.to_builtins(facts)
    return plain


def machine(server: str, reported: object) -> dict[str, Any]:
    """The answer to `machine`. Raises OddReport."""
    found = _shaped(server, Reported, reported)
    _distinct(server, found.disks)
    plain: dict[str, Any] = msgspec.to_builtins(found)
    return plain


def opened(server: str, reported: object) -> Mapping[str, Any]:
    """The answer to `open`. Raises OddReport."""
    answer = _shaped(server, Opened, reported)
    _distinct(server, answer.disks)
    _distinct(server, answer.machine.disks)
    for disk in answer.disks:
        within(server, disk.id, disk.size, disk.changed)
    if not set(answer.marks) <= {disk.id for disk in answer.disks}:
        raise OddReport(server=server, detail="it has a mark of a disk that it does not have")
    plain: Mapping[str, Any] = msgspec.to_builtins(answer)
    return plain


def settled(server: str, reported: object, sizes: Mapping[str, int]) -> Settled:
    """The answer to `settle` of a view with these disks. Raises OddReport."""
    answer = _shaped(server, Settled, reported)
    _distinct(server, answer.machine.disks)
    for name in (*answer.changed, *answer.marks):
        if name not in sizes:
            raise OddReport(server=server, detail=f"disk {name} is not one of the view")
    for name, ranges in answer.changed.items():
        within(server, name, sizes[name], ranges)
    return answer


def held(server: str, reported: object, body: memoryview, disk: str, size: int, left: int) -> Held:
    """The answer to `held`, of at most `left` bytes that are still to come. Raises OddReport."""
    answer = _shaped(server, Held, reported)
    within(server, disk, size, answer.places)
    length = sum(length for _, length in answer.places)
    if length != len(body) or length > left or (answer.more and not length):
        raise OddReport(server=server, detail=f"{len(body)} bytes for {length}, of {left} that were left")
    return answer


def read_fits(server: str, reported: Mapping[str, Any], body: memoryview, length: int) -> bool:
    """Whether what was read is all zero; else the body has that length. Raises OddReport."""
    zero = reported.get("zero", False)
    if not isinstance(zero, bool) or (not zero and len(body) != length):
        raise OddReport(server=server, detail=f"{len(body)} bytes for {length} that were read")
    return zero


def zero_numbers(server: str, reported: Mapping[str, Any], body: memoryview, lengths: Sequence[int]) -> set[int]:
    """Of several reads, the numbers of those that are all zero; the body has the rest. Raises OddReport."""
    zero = set(_shaped(server, list[int], reported.get("zero")))
    if sum(length for number, length in enumerate(lengths) if number not in zero) != len(body):
        raise OddReport(server=server, detail=f"{len(body)} bytes for {sum(lengths)} that were read")
    return zero


def digests_fit(server: str, body: memoryview, blocks: int, size: int) -> None:
    """Raises OddReport unless these are the digests of so many blocks, each of that size."""
    if len(body) != blocks * size:
        raise OddReport(server=server, detail=f"{len(body)} bytes of digests for {blocks} blocks")
