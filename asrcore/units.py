"""Sizes in bytes and durations in seconds: constants, parsing, and text for people."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

from asrcore.errors import InvalidValue

__all__ = [
    "DAY",
    "HOUR",
    "MINUTE",
    "GiB",
    "KiB",
    "MiB",
    "TiB",
    "format_duration",
    "format_rate",
    "format_size",
    "format_time",
    "parse_duration",
    "parse_rate",
    "parse_size",
    "parse_time",
]

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

MINUTE = 60.0
HOUR = 3600.0
DAY = 86400.0

_SIZES = {"": 1, "b": 1, "k": KiB, "kib": KiB, "m": MiB, "mib": MiB, "g": GiB, "gib": GiB, "t": TiB, "tib": TiB}
_DURATIONS = {"": 1.0, "s": 1.0, "sec": 1.0, "m": MINUTE, "min": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}
_RATES = {"kbit": 125.0, "mbit": 125e3, "gbit": 125e6}  # bytes per second; networks count in thousands
_NUMBER_AND_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
# Digits enough for any disk or any retention; more is a typing error and must not become an infinity.
_MAX_NUMBER = 1e15


def parse_size(text: str, what: str = "size") -> int:
    """Bytes for `64MiB`, `10g` or `4096`. Raises InvalidValue."""
    return int(_parse(text, _SIZES, what, "a size such as 512MiB or 10GiB"))


def parse_duration(text: str, what: str = "duration") -> float:
    """Seconds for `5s`, `15min`, `24h`, `7d` or `30`. Raises InvalidValue."""
    return _parse(text, _DURATIONS, what, "a duration such as 5s, 15min, 24h or 7d")


def parse_rate(text: str, what: str = "rate") -> float:
    """Bytes per second for `20Mbit`, `1.5Gbit` or `512kbit` (each second). Raises InvalidValue."""
    return _parse(text, _RATES, what, "bits per second, such as 20Mbit or 1Gbit")


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str, wanted: str) -> float:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None or match[2].lower() not in units or float(match[1]) > _MAX_NUMBER:
        raise InvalidValue(what=what, value=text, wanted=wanted)
    return float(match[1]) * units[match[2].lower()]


def format_size(size: float) -> str:
    """`1.5 GiB` for 1610612736 bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_rate(rate: float) -> str:
    """`20 Mbit/s` for 2500000 bytes per second."""
    for unit in ("kbit/s", "Mbit/s"):
        if rate < _RATES[unit.removesuffix("/s").lower()] * 1000:
            return f"{rate / _RATES[unit.removesuffix('/s').lower()]:.4g} {unit}"
    return f"{rate / _RATES['gbit']:.4g} Gbit/s"


def format_duration(seconds: float) -> str:
    """`4.2s`, `3m 05s`, `2h 10m` or `3d 4h`."""
    if not math.isfinite(seconds):
        return f"{seconds}s"
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 60:
        return f"{minutes}m {whole % 60:02d}s"
    if hours < 48:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{days}d {hours % 24}h"


def format_time(at: float) -> str:
    """ISO 8601 in UTC, to the millisecond, for seconds since the epoch."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: str, what: str = "time") -> float:
    """Seconds since the epoch for an ISO 8601 time; without an offset it is the local time of this host.

    Raises InvalidValue.
    """
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as problem:
        raise InvalidValue(what=what, value=text, wanted="an ISO 8601 time such as 2026-11-23T08:30:00Z") from problem
