"""When a policy's window is open: times of day in a time zone, by default that of this host."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta, tzinfo

from asrcore.model.policy import Window
from asrcore.units import DAY

__all__ = ["is_open", "opens_at"]


def is_open(window: Window, now: float, zone: tzinfo | None = None) -> bool:
    """Whether the window is open at `now` (seconds since the epoch)."""
    local = _local(now, zone)
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    # By local time, also on days that have 23 or 25 hours.
    return window.contains((local.replace(tzinfo=None) - midnight).total_seconds())


def opens_at(window: Window, now: float, zone: tzinfo | None = None) -> float:
    """`now` if the window is open, else when it opens next, in seconds since the epoch."""
    if is_open(window, now, zone):
        return now
    today = _local(now, zone).date()
    start = (datetime.fromtimestamp(window.start % DAY, UTC)).time()  # midnight of some day, plus the seconds
    return next(
        opening
        for days in range(3)  # tomorrow's is always ahead, but for a clock that is put back over midnight
        if (opening := _instant(today + timedelta(days=days), start, zone)) > now
    )


def _local(now: float, zone: tzinfo | None) -> datetime:
    return datetime.fromtimestamp(now, UTC).astimezone(zone)


def _instant(day: date, start: time, zone: tzinfo | None) -> float:
    return datetime.combine(day, start, tzinfo=zone).timestamp()
