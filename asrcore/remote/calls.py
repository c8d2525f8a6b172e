"""The driver contract as remote calls: their names, their arguments and results as JSON.

A call is named `ROLE.METHOD`; its arguments are named as the contract's parameters and are written by the contract's
annotations: attrs values as objects of their fields, enums by value, bytes as base64. Lists of extents are binary.
"""

from __future__ import annotations

import functools
import inspect
import struct
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import msgspec

from asrcore import driver
from asrcore.errors import InvalidValue
from asrcore.model.extent import Extent
from asrcore.model.finding import Finding
from asrcore.model.machine import Description, Disk
from asrcore.model.point import Consistency, Mark
from asrcore.model.watch import Watch

__all__ = [
    "CLOCK",
    "PAGE",
    "PLAIN",
    "DiskState",
    "Instant",
    "MachineState",
    "Settled",
    "ViewState",
    "arguments",
    "extents_of",
    "pack_extents",
    "plain",
    "result_type",
    "value",
]

PLAIN: Mapping[str, Callable[..., Any]] = {
    f"{role.__name__.lower()}.{name}": getattr(role, name)
    for role, names in (
        (driver.Site, "status"),
        (driver.Inventory, "machines machine description power_on power_off fence unfence fenced"),
        (driver.Source, "findings keep_marks"),
        (driver.Target, "findings failover_findings capacity replicas delete_replica"),
        (driver.Replica, "info raise_epoch drop_points pin description examine mark_damaged"),
        (driver.Failover, "start_test stop_test tests promote undo commit"),
    )
    for name in names.split()
}
"""Calls that are one call of the contract and leave nothing open."""

CLOCK = "clock"
"""In the details of a site's status: the time of the host that serves it, in seconds since the epoch."""

_EXTENT = struct.Struct(">QQB")
PAGE = 100_000
"""Extents in one reply."""


@attrs.frozen
class DiskState:
    """A disk of a frozen view."""

    disk: Disk
    tracking: driver.Tracking
    reason: str
    whole: bool
    digest: driver.Digest


@attrs.frozen
class MachineState:
    """A machine of a frozen view."""

    description: Description
    consistency: Consistency
    mark: Mark | None
    disks: dict[str, DiskState]
    notices: tuple[Finding, ...] = ()
    halted: str = ""


@attrs.frozen
class ViewState:
    """A frozen view; `handle` names it in later calls."""

    handle: str
    taken_at: float
    machines: dict[str, MachineState]


@attrs.frozen
class Instant:
    """The state of a machine of a view from its settling on."""

    consistency: Consistency
    mark: Mark | None


@attrs.frozen
class Settled:
    """What `settle` gave: `again` by machine and disk."""

    again: dict[str, dict[str, list[Extent]]]
    taken_at: float
    machines: dict[str, Instant]


def plain(item: object) -> Any:
    """A value of the contract as JSON has it."""
    return msgspec.to_builtins(item)


def value(item: object, kind: Any, what: str = "value") -> Any:
    """The value that `plain` gave. Raises InvalidValue."""
    try:
        return msgspec.convert(item, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as problem:  # the second one: a lone surrogate
        raise InvalidValue(what=what, value="what the other side sent", wanted=str(problem)) from problem


@functools.cache
def _hints(method: Callable[..., Any]) -> Mapping[str, Any]:
    return {
        # msgspec takes anything for an Iterable
        name: list[typing.get_args(kind)] if typing.get_origin(kind) is Iterable else kind  # type: ignore[misc]
        for name, kind in typing.get_type_hints(method).items()
    }


def result_type(call: str) -> Any:
    """What a plain call returns."""
    return _hints(PLAIN[call])["return"]


def arguments(call: str, given: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
    """The parameters of a plain call. Raises InvalidValue, also for one that is missing."""
    parameters = inspect.signature(PLAIN[call]).parameters
    hints = {name: kind for name, kind in _hints(PLAIN[call]).items() if name != "return"}
    made: dict[str, Any] = {}
    for name, kind in hints.items():
        if name == "watch":
            made[name] = watch
        elif name in given:
            made[name] = value(given[name], kind, f"{call}: {name}")
        elif parameters[name].default is inspect.Parameter.empty:
            raise InvalidValue(what=f"{call}: {name}", value="nothing", wanted="a value")
    return made


def pack_extents(extents: Iterable[Extent]) -> bytes:
    """17 bytes each: offset, length, zero."""
    return b"".join(_EXTENT.pack(item.offset, item.length, item.zero) for item in extents)


def extents_of(body: bytes | bytearray | memoryview) -> list[Extent]:
    """What `pack_extents` packed. Raises InvalidValue."""
    if len(body) % _EXTENT.size:
        raise InvalidValue(what="extents", value=f"{len(body)} bytes", wanted=f"a multiple of {_EXTENT.size}")
    return [Extent(offset, length, bool(zero)) for offset, length, zero in _EXTENT.iter_unpack(body)]
