"""Fault injection: a site, or a driver with all its sites, whose n-th call of a named operation fails.

    faults = Faults()
    faults.add("writer.write", TargetFull(where="away", detail=""), at=3)
    site = faulty_site(site, faults)

Operations are named ROLE.METHOD; roles are `site`, `inventory`, `source`, `view`, `disk`, `reader`, `target`,
`replica`, `writer`, `failover`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, cast

import attrs

from asrcore import driver

__all__ = ["Faults", "FaultyDriver", "When", "faulty_site"]

_ROLES: dict[type, str] = {
    driver.Site: "site",
    driver.Inventory: "inventory",
    driver.Source: "source",
    driver.FrozenView: "view",
    driver.MachineView: "machine",
    driver.DiskView: "disk",
    driver.DiskReader: "reader",
    driver.Target: "target",
    driver.Replica: "replica",
    driver.CycleWriter: "writer",
    driver.Failover: "failover",
}


class When(Enum):
    """When in the call the fault occurs."""

    BEFORE = "before"
    """Nothing is done."""
    HALF = "half"
    """The first half of the data is written or read; for `writer.write` and `reader.read_into`."""
    AFTER = "after"
    """Everything is done, but the caller does not learn it: the reply was lost."""


@attrs.frozen
class _Fault:
    operation: str
    error: BaseException
    first: int
    last: int
    when: When


class Faults:
    """What is to fail. `calls` counts the calls of each operation, failed ones included. Thread-safe."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()

    def add(
        self, operation: str, error: BaseException, *, at: int = 1, times: int = 1, when: When = When.BEFORE
    ) -> None:
        """Let `times` calls fail, the first of them the `at`-th from now on."""
        if when is When.HALF and operation not in _HALVES:
            raise ValueError(f"{operation} cannot be done by half, only {', '.join(_HALVES)} can")
        with self._lock:
            first = self.calls[operation] + at
            self._faults.append(_Fault(operation, error, first, first + times - 1, when))

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults.clear()

    def call(self, operation: str, method: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Make the call, or fail it."""
        with self._lock:
            self.calls[operation] += 1
            number = self.calls[operation]
            due = [item for item in self._faults if item.operation == operation and item.first <= number <= item.last]
        if not due:
            return method(*args, **keywords)
        if due[0].when is When.AFTER:
            method(*args, **keywords)
        elif due[0].when is When.HALF:
            _HALVES[operation](method, *args, **keywords)
        raise due[0].error


def _half_write(method: Callable[..., Any], disk_id: str, offset: int, data: memoryview) -> None:
    method(disk_id, offset, data[: len(data) // 2])


def _half_read(method: Callable[..., Any], offset: int, buffer: memoryview) -> None:
    method(offset, buffer[: len(buffer) // 2])


_HALVES: dict[str, Callable[..., None]] = {"writer.write": _half_write, "reader.read_into": _half_read}


class _Faulty:
    """A proxy for an object of the contract, and for all objects that it returns."""

    def __init__(self, inner: Any, role: str, faults: Faults) -> None:
        self._inner = inner
        self._role = role
        self._faults = faults

    @property  # type: ignore[misc] # a class is assignable in general, not here
    def __class__(self) -> type:
        return type(self._inner)  # so that isinstance says what it says of the inner one

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return _wrapped(value, self._faults)

        def call(*args: Any, **keywords: Any) -> Any:
            result = self._faults.call(f"{self._role}.{name}", value, *args, **keywords)
            return _wrapped(result, self._faults)

        return call

    def __enter__(self) -> _Faulty:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise


def _wrapped(value: Any, faults: Faults) -> Any:
    for kind, role in _ROLES.items():
        if isinstance(value, kind):
            return _Faulty(value, role, faults)
    if isinstance(value, Mapping):
        return {key: _wrapped(item, faults) for key, item in value.items()}
    return value


def faulty_site(site: driver.Site, faults: Faults) -> driver.Site:
    """The site, with faults."""
    return cast(driver.Site, _Faulty(site, "site", faults))


class FaultyDriver(driver.Driver):
    """A driver whose sites have faults; connecting is operation `driver.connect`."""

    info: driver.DriverInfo  # type: ignore[misc] # of the object, not the class

    def __init__(self, inner: driver.Driver, faults: Faults) -> None:
        self.info = inner.info
        self._inner = inner
        self._faults = faults

    def connect(self, name: str, settings: Mapping[str, str]) -> driver.Site:
        """See `Driver.connect`."""
        site = self._faults.call("driver.connect", self._inner.connect, name, settings)
        return faulty_site(site, self._faults)
