"""Converts values of the model to rows of the vault and back; reading is strict.

A row that is not a valid value raises ValueError here; `_store` turns that into VaultDamaged.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, Protocol

import attrs

from asrcore.model.extent import Extent
from asrcore.model.finding import Finding, Severity
from asrcore.model.point import Consistency, Mark, RecoveryPoint
from asrcore.model.policy import Bandwidth, Policy, Rung, Window
from asrcore.model.protection import CycleMode, NetworkMap, PendingCycle, Protection, Site, TestRun
from asrcore.model.state import State
from asrcore.vault._values import (
    Certificate,
    ClockAnchor,
    ClockDoubt,
    ClockGap,
    ClockState,
    CycleStats,
    Job,
    JobState,
    LogEntry,
)

__all__ = [
    "CLOCK_ACCEPTED",
    "CLOCK_DOUBTED",
    "Row",
    "certificate_of",
    "certificate_row",
    "clock_state_of",
    "cycle_of",
    "cycle_row",
    "entry_data",
    "entry_of",
    "job_of",
    "job_row",
    "pack_plan",
    "pending_of",
    "pending_row",
    "plain_settings",
    "point_of",
    "point_row",
    "policy_of",
    "policy_row",
    "protection_of",
    "protection_row",
    "site_of",
    "site_row",
    "unpack_plan",
]


class Row(Protocol):
    """What the database gave, by the column's name: SQLAlchemy's rows, or a dictionary."""

    def __getitem__(self, name: str, /) -> Any: ...


def _fields(
    value: attrs.AttrsInstance, encode: Mapping[str, Callable[[Any], object]], names: Iterable[str] = ()
) -> dict[str, Any]:
    chosen = names or attrs.fields_dict(type(value))
    return {name: encode.get(name, _same)(getattr(value, name)) for name in chosen}


def _same(value: Any) -> object:
    return value


def _value(value: Enum) -> object:
    return value.value


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _dump_map(value: Mapping[str, object]) -> str:
    return _dump(dict(value))


def _dump_map_or_none(value: Mapping[str, object] | None) -> str | None:
    return None if value is None else _dump(dict(value))


def _map(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text[:40]!r} is not a JSON object")
    return value


def _map_or_none(text: str | None) -> dict[str, Any] | None:
    return None if text is None else _map(text)


# -- sites and policies ------------------------------------------------------------------------------------------------


def site_row(site: Site, secret: Collection[str], seal: Callable[[str, str], str]) -> dict[str, Any]:
    """For table sites. A secret setting is an object: `{"sealed": TEXT}`."""

    def dump(settings: Mapping[str, str]) -> str:
        return _dump(
            {
                name: {"sealed": seal(value, f"{site.name}/{name}")} if name in secret else value
                for name, value in settings.items()
            }
        )

    return _fields(site, {"settings": dump})


def site_of(row: Row, unseal: Callable[[str, str], str], without: Collection[str] = ()) -> Site:
    """From table sites."""
    settings = {
        name: unseal(value["sealed"], f"{row['name']}/{name}") if isinstance(value, dict) else value
        for name, value in _map(row["settings"]).items()
        if name not in without
    }
    return Site(row["name"], row["driver"], settings)


def plain_settings(row: Row) -> set[str]:
    """Names of the settings of a site that are recorded unencrypted."""
    return {name for name, value in _map(row["settings"]).items() if not isinstance(value, dict)}


def policy_row(policy: Policy) -> dict[str, Any]:
    """For table policies."""
    encode: dict[str, Callable[[Any], object]] = {
        "consistency": _value,
        "ladder": _dump_ladder,
        "resync_window": attrs.astuple,
        "bandwidth": lambda rules: [[rule.rate, *attrs.astuple(rule.window)] for rule in rules],
    }
    body = _fields(policy, encode)
    return {"name": body.pop("name"), "body": _dump(body)}


def policy_of(row: Row) -> Policy:
    """From table policies."""
    body = _map(row["body"])
    body["ladder"] = tuple(Rung(*rung) for rung in body["ladder"])
    body["consistency"] = Consistency(body["consistency"])
    body["resync_window"] = Window(*body["resync_window"])
    body["bandwidth"] = tuple(Bandwidth(rate, Window(*ends)) for rate, *ends in body["bandwidth"])
    return Policy(name=row["name"], **body)


def _dump_ladder(ladder: tuple[Rung, ...]) -> list[object]:
    return [attrs.astuple(rung) for rung in ladder]


# -- protections -------------------------------------------------------------------------------------------------------


def _token(mark: Mark | None) -> str | None:
    return None if mark is None else mark.token


def _mark(token: str | None) -> Mark | None:
    return None if token is None else Mark(token)


_PROTECTION: dict[str, Callable[[Any], object]] = {
    "networks": lambda networks: _dump_map(networks.networks),
    "state": _value,
    "mark": _token,
    "test": lambda test: None if test is None else _dump(attrs.asdict(test)),
    "error": _dump_map_or_none,
    "notices": lambda notices: _dump([_finding_row(item) for item in notices]) if notices else None,
    "restored": bool,
}
_PROTECTION_FIELDS = tuple(field.name for field in attrs.fields(Protection) if field.name != "pending")


def protection_row(protection: Protection) -> dict[str, Any]:
    """For table protections: all but the pending cycle, which has a separate table."""
    return _fields(protection, _PROTECTION, _PROTECTION_FIELDS)


def protection_of(row: Row, pending: PendingCycle | None) -> Protection:
    """From table protections."""
    test = _map_or_none(row["test"])
    return Protection(
        **{name: row[name] for name in _PROTECTION_FIELDS if name not in _PROTECTION},
        networks=NetworkMap(_map(row["networks"])),
        state=State(row["state"]),
        mark=_mark(row["mark"]),
        pending=pending,
        test=None if test is None else TestRun(**test),
        error=_map_or_none(row["error"]),
        notices=() if row["notices"] is None else tuple(_finding(item) for item in json.loads(row["notices"])),
        restored=bool(row["restored"]),
    )


def _finding_row(finding: Finding) -> dict[str, str]:
    return {**attrs.asdict(finding), "severity": finding.severity.value}


def _finding(content: Mapping[str, str]) -> Finding:
    try:
        return Finding(**{**content, "severity": Severity(content["severity"])})  # type: ignore[arg-type]
    except (TypeError, KeyError) as problem:
        raise ValueError(f"a notice of the machine: {problem}") from problem


# -- cycles and points -------------------------------------------------------------------------------------------------


def pending_row(protection_id: str, pending: PendingCycle) -> dict[str, Any]:
    """For table pending_cycles."""
    row = _fields(pending, {"mode": _value, "view_mark": _token, "plan": pack_plan})
    return {"protection_id": protection_id, **row}


def pending_of(row: Row, problem: Callable[[str], Exception]) -> PendingCycle:
    """From table pending_cycles. The plan is unpacked when first looked at; `problem` makes the error if it is
    damaged then."""
    return PendingCycle(
        id=row["id"],
        point_id=row["point_id"],
        mode=CycleMode(row["mode"]),
        base_point=row["base_point"],
        taken_at=row["taken_at"],
        view_mark=_mark(row["view_mark"]),
        plan=_PackedPlan(row["plan"], problem),
    )


class _PackedPlan(Mapping[str, tuple[Extent, ...]]):
    """A plan as stored. Status and state changes read protections often and never look at the plan, which costs
    65 ms to unpack at 100,000 extents."""

    def __init__(self, packed: bytes, problem: Callable[[str], Exception]) -> None:
        self._packed = packed
        self._problem = problem
        self._plan: dict[str, tuple[Extent, ...]] | None = None

    def _unpacked(self) -> dict[str, tuple[Extent, ...]]:
        if self._plan is None:  # two threads may both unpack; the result is the same
            try:
                self._plan = unpack_plan(self._packed)
            except ValueError as error:
                raise self._problem(str(error)) from error
        return self._plan

    def __getitem__(self, disk_id: str) -> tuple[Extent, ...]:
        return self._unpacked()[disk_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._unpacked())

    def __len__(self) -> int:
        return len(self._unpacked())

    def __repr__(self) -> str:
        return f"<plan, {len(self._packed)} bytes packed>"


_DISK = struct.Struct("<HQ")  # bytes of the disk's id, number of its extents


def pack_plan(plan: Mapping[str, tuple[Extent, ...]]) -> bytes:
    """A plan as bytes: per disk its id, the gaps before the extents, their lengths (negative: zero), compressed.

    For 100,000 extents: 13 ms and 239 kB, where compressed JSON takes 77 ms and 740 kB. Gaps may be negative, so
    unsorted extents come back as they were.
    """
    parts = []
    for disk_id, extents in plan.items():
        name = disk_id.encode("utf-8", "surrogateescape")
        gaps, lengths, at = [], [], 0
        for item in extents:
            gaps.append(item.offset - at)
            lengths.append(~item.length if item.zero else item.length)
            at = item.end
        parts += [_DISK.pack(len(name), len(extents)), name, struct.pack(f"<{2 * len(extents)}q", *gaps, *lengths)]
    return zlib.compress(b"".join(parts), level=1)


def unpack_plan(packed: bytes) -> dict[str, tuple[Extent, ...]]:
    """The plan that was packed; raises ValueError when the bytes are damaged."""
    try:
        data = zlib.decompress(packed)
        plan: dict[str, tuple[Extent, ...]] = {}
        position = 0
        while position < len(data):
            name_size, count = _DISK.unpack_from(data, position)
            position += _DISK.size
            name = data[position : position + name_size].decode("utf-8", "surrogateescape")
            position += name_size
            numbers = struct.unpack_from(f"<{2 * count}q", data, position)
            position += 16 * count
            plan[name] = _extents(numbers[:count], numbers[count:])
    except (zlib.error, struct.error, TypeError, OverflowError, MemoryError) as problem:
        raise ValueError(f"the plan of a cycle cannot be read: {problem}") from problem
    return plan


def _extents(gaps: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Extent, ...]:
    extents = []
    at = 0
    for gap, length in zip(gaps, lengths, strict=True):
        zero = length < 0
        item = Extent(at + gap, ~length if zero else length, zero)
        extents.append(item)
        at = item.end
    return tuple(extents)


def point_row(protection_id: str, point: RecoveryPoint, counted_at: float | None = None) -> dict[str, Any]:
    """For table points; without `counted_at` the machine's count is what the clock says."""
    counted = point.taken_at if counted_at is None else counted_at
    own = {"protection_id": protection_id, "dropping": False, "counted_at": counted}
    return {**own, **_fields(point, {"consistency": _value})}


def point_of(row: Row) -> RecoveryPoint:
    """From table points."""
    names = ("id", "taken_at", "sealed_at", "kept", "pinned", "bytes_sent", "held", "proved_at")
    return RecoveryPoint(
        **{name: row[name] for name in names},
        consistency=Consistency(row["consistency"]),
        damaged=row["damaged"] or "",  # of points that an older version recorded, nothing is known
        proved_to=row["proved_to"] or 0,
    )


def cycle_row(protection_id: str, number: int, stats: CycleStats) -> dict[str, Any]:
    """For table cycles."""
    return {"protection_id": protection_id, "number": number, **_fields(stats, {"mode": _value})}


def cycle_of(row: Row) -> CycleStats:
    """From table cycles."""
    names = (field.name for field in attrs.fields(CycleStats) if field.name != "mode")
    return CycleStats(**{name: row[name] for name in names}, mode=CycleMode(row["mode"]))


# -- jobs and the log --------------------------------------------------------------------------------------------------

_JOB: dict[str, Callable[[Any], object]] = {"state": _value, "error": _dump_map_or_none}


def job_row(job: Job) -> dict[str, Any]:
    """For table jobs, without the flag of a cancel request."""
    return _fields(job, _JOB)


def job_of(row: Row) -> Job:
    """From table jobs."""
    names = (field.name for field in attrs.fields(Job) if field.name not in _JOB)
    return Job(**{name: row[name] for name in names}, state=JobState(row["state"]), error=_map_or_none(row["error"]))


def entry_of(row: Row) -> LogEntry:
    """From table events."""
    names = ("number", "at", "machine", "kind", "text")
    return LogEntry(**{name: row[name] for name in names}, data=_map(row["data"]))


def entry_data(data: Mapping[str, object]) -> str:
    """For column events.data."""
    return _dump_map(data)


CLOCK_DOUBTED, CLOCK_ACCEPTED = "clock", "clock-accepted"
"""Kinds of entries of the log."""


def clock_state_of(row: Row) -> ClockState:
    """From table events, of one of these kinds."""
    data = json.loads(row["data"])
    return ClockState(
        held=row["kind"] == CLOCK_DOUBTED,
        number=row["number"],
        at=row["at"],
        text=row["text"],
        doubts=tuple(ClockDoubt(*values) for values in data["doubts"]),
        before=data["before"],
        anchors={machine: ClockAnchor(*values) for machine, values in data["anchors"].items()},
        gaps=tuple(ClockGap(*values) for values in data["gaps"]),
    )


# -- certificates ------------------------------------------------------------------------------------------------------


def certificate_row(certificate: Certificate) -> dict[str, Any]:
    """For table certificates."""
    return _fields(certificate, {"addresses": lambda addresses: _dump(list(addresses))})


def certificate_of(row: Row) -> Certificate:
    """From table certificates."""
    names = (field.name for field in attrs.fields(Certificate) if field.name != "addresses")
    addresses = tuple(str(item) for item in json.loads(row["addresses"]))
    return Certificate(**{name: row[name] for name in names}, addresses=addresses)
