"""Reads the serial console of guests: audits, acknowledged rows, boots and shutdowns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

_LINE = re.compile(r"LAB-(HARDWARE|AUDIT|READY|ACK|DOWN|ERROR)\b *([^\r\n]*)\r?\n")


@dataclass(frozen=True)
class Ack:
    """A row that was on stable storage when the guest acknowledged it: a planned failover must not lose it."""

    row: int
    time: float
    """Guest's clock, seconds since 1970."""
    boot: str


@dataclass(frozen=True)
class Audit:
    """The state of the guest's disks before it wrote to them."""

    boot: str
    rows: int
    first: int
    last: int
    gaps: int
    """Row numbers absent between `first` and `last`."""
    torn: int
    """Unreadable rows after the last good one."""
    bad: int
    """Unreadable rows before it."""
    forks: int
    """Rows that do not follow from the previous row: two histories are mixed."""
    last_time: float
    """When the last row was written, guest's clock, seconds since 1970; 0 if there is none."""
    blocks_ok: int
    written: int
    """Of `blocks_ok`, those written at least once."""
    blocks_bad: int
    behind: int
    """Blocks older than a row records: that disk is from an earlier instant than the ledger's disk."""
    ahead: int
    """Blocks newer than the last row allows: that disk is from a later instant than the ledger's disk."""
    areas: int
    missing: int
    """Areas that rows refer to but that are on no disk."""
    took: float
    """Seconds."""

    @property
    def intact(self) -> bool:
        """Whether this is one consistent state of the machine: nothing torn, and all disks from the same instant."""
        damage = (self.gaps, self.torn, self.bad, self.forks, self.blocks_bad, self.behind, self.ahead, self.missing)
        return not any(damage)


@dataclass(frozen=True)
class Hardware:
    """The hardware that the guest detected."""

    boot: str
    firmware: str
    """`bios` or `uefi`."""
    nvram_boots: int | None
    """Boots counted in the firmware's variables before this one; None on a BIOS."""
    cpu: str
    macs: tuple[str, ...]
    disks: Mapping[str, int]
    """Size in bytes of each disk and partition, by the guest's name."""


@dataclass(frozen=True)
class Down:
    """A clean shutdown."""

    boot: str
    last: int
    """The last row written; it was on stable storage."""


@dataclass(frozen=True)
class Console:
    """Everything printed so far, in order; a restarted guest continues in the same file."""

    text: str
    hardware: tuple[Hardware, ...]
    audits: tuple[Audit, ...]
    ready: tuple[str, ...]
    """Boots that started the workload."""
    acks: tuple[Ack, ...]
    down: tuple[Down, ...]
    errors: tuple[str, ...]

    @property
    def last_ack(self) -> Ack | None:
        """The newest acknowledged row."""
        return self.acks[-1] if self.acks else None


def _words(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def _hardware(text: str) -> Hardware:
    words = _words(text)
    disks = (disk.split(":") for disk in words["disks"].split(",") if disk != "-")
    return Hardware(
        boot=words["boot"],
        firmware=words["firmware"],
        nvram_boots=None if words["nvram"] == "-" else int(words["nvram"]),
        cpu=words["cpu"],
        macs=tuple(mac for mac in words["macs"].split(",") if mac != "-"),
        disks={name: int(size) for name, size in disks},
    )


def parse_audit(text: str) -> Audit:
    """Read the `name=value` words of an audit line."""
    words = _words(text)
    kinds = {"str": str, "int": int, "float": float}
    return Audit(**{item.name: kinds[str(item.type)](words[item.name]) for item in fields(Audit)})


def parse_console(text: str) -> Console:
    """Read a console's text; an unfinished last line is left out."""
    hardware, audits, ready, acks, down, errors = [], [], [], [], [], []
    for match in _LINE.finditer(text):
        kind, rest = match.groups()
        if kind == "HARDWARE":
            hardware.append(_hardware(rest))
        elif kind == "AUDIT":
            audits.append(parse_audit(rest))
        elif kind == "READY":
            ready.append(rest)
        elif kind == "ACK":
            row, time, boot = rest.split()
            acks.append(Ack(int(row), float(time), boot))
        elif kind == "DOWN":
            words = _words(rest)
            down.append(Down(words["boot"], int(words["last"])))
        else:
            errors.append(rest)
    return Console(text, tuple(hardware), tuple(audits), tuple(ready), tuple(acks), tuple(down), tuple(errors))
