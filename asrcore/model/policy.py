"""The replication policy: how often, how consistent, what is kept, when a comparison may run."""

from __future__ import annotations

from itertools import pairwise

import attrs

from asrcore import units
from asrcore.errors import InvalidValue
from asrcore.model.point import Consistency

__all__ = ["ALWAYS", "DEFAULT_LADDER", "MIN_INTERVAL", "MIN_RATE", "Bandwidth", "Policy", "Rung", "Window"]

MIN_INTERVAL = 5.0  # seconds; a libvirt cycle costs 0.15-0.35 s on an idle guest, so 5 s is a safe floor
MIN_RATE = 8000.0  # bytes per second: 64 kbit/s; below that a cycle of one block takes longer than its interval
MAX_KEEP = 365 * units.DAY
MAX_VERIFY = 60 * units.DAY  # the vault keeps jobs, and so the last verification, for 90 days


@attrs.frozen
class Rung:
    """Points older than `after` seconds are thinned to one in each `every` seconds."""

    after: float
    every: float


# Site Recovery's ladder: all points for 2 hours, then hourly, after a day 2-hourly, after a week 4-hourly.
DEFAULT_LADDER = (
    Rung(2 * units.HOUR, units.HOUR),
    Rung(units.DAY, 2 * units.HOUR),
    Rung(7 * units.DAY, 4 * units.HOUR),
)


@attrs.frozen
class Window:
    """A time of day, in seconds after local midnight; `end` may lie on the next day. Equal ends: always."""

    start: float
    end: float

    def contains(self, second_of_day: float) -> bool:
        """Whether the window is open at that second of the local day."""
        if self.start == self.end:
            return True
        if self.start < self.end:
            return self.start <= second_of_day < self.end
        return second_of_day >= self.start or second_of_day < self.end

    @classmethod
    def parse(cls, text: str) -> Window:
        """`18:30-06:00` or `always`. Raises InvalidValue."""
        if text == "always":
            return ALWAYS
        try:
            ends = [_second_of_day(part) for part in text.split("-")]
            return cls(*ends)
        except (ValueError, TypeError) as problem:
            raise InvalidValue(
                what="window", value=text, wanted="a time of day such as 18:30-06:00, or `always`"
            ) from problem

    def __str__(self) -> str:
        return "always" if self == ALWAYS else f"{_clock(self.start)}-{_clock(self.end)}"


ALWAYS = Window(0.0, 0.0)


@attrs.frozen
class Bandwidth:
    """At most `rate` bytes per second while the window is open, by the clock of the engine's host."""

    rate: float
    window: Window = ALWAYS

    @classmethod
    def parse(cls, text: str) -> Bandwidth:
        """`20Mbit@08:00-18:00`, or `20Mbit` for always. Raises InvalidValue."""
        rate, _, window = text.partition("@")
        return cls(units.parse_rate(rate, "bandwidth"), Window.parse(window) if "@" in text else ALWAYS)

    def __str__(self) -> str:
        return f"{units.format_rate(self.rate)} {self.window}"


def _second_of_day(text: str) -> float:
    hours, minutes = (int(part) for part in text.strip().split(":"))
    if not (0 <= hours < 24 and 0 <= minutes < 60):
        raise ValueError(text)
    return hours * units.HOUR + minutes * units.MINUTE


def _clock(second: float) -> str:
    return f"{int(second // 3600):02d}:{int(second % 3600 // 60):02d}"


def _ladder_is_sound(ladder: tuple[Rung, ...]) -> bool:
    ordered = all(a.after < b.after and a.every < b.every for a, b in pairwise(ladder))
    return ordered and all(rung.after >= 0 and rung.every > 0 for rung in ladder)


@attrs.frozen
class Policy:
    """Raises InvalidValue for values that contradict each other. Times in seconds.

    `interval`: between cycles. `point_interval`: between *kept* recovery points (between them only the latest state
    exists). `keep`: points older than this are deleted. `consistency`: requested; each point records what was
    obtained. `resync_window`: when a comparison may start automatically (by default outside office hours, W5 in
    docs/reference/site-recovery-map.md). `resync_threshold`: share of a disk; a change log that holds more makes a
    comparison due. `bandwidth`: what all machines of the policy together may send; the lowest active limit applies,
    and without one there is no limit. `verify_every`: how often a replica is compared with its source and repaired
    automatically, in the resync window; 0: never. `scrub_every`: how often kept recovery points are read at the target
    and compared with the digests that were recorded of them, in the resync window; 0: never.
    """

    name: str
    interval: float = 300.0
    point_interval: float = 300.0
    keep: float = units.DAY
    ladder: tuple[Rung, ...] = DEFAULT_LADDER
    consistency: Consistency = Consistency.CRASH
    freeze_limit: float = 10.0
    resync_window: Window = Window(18.5 * units.HOUR, 6 * units.HOUR)
    resync_threshold: float = 0.5
    bandwidth: tuple[Bandwidth, ...] = ()
    verify_every: float = 7 * units.DAY
    scrub_every: float = 7 * units.DAY

    def __attrs_post_init__(self) -> None:
        _check(
            bool(self.name) and self.name.isprintable() and len(self.name) <= 64,
            "policy name",
            self.name,
            "1 to 64 printable characters",
        )
        for what, value, low, high in (
            ("interval", self.interval, MIN_INTERVAL, units.DAY),
            ("point interval", self.point_interval, self.interval, 7 * units.DAY),
            ("keep", self.keep, self.point_interval, MAX_KEEP),
            ("freeze limit", self.freeze_limit, 1.0, 60.0),
        ):
            wanted = f"between {units.format_duration(low)} and {units.format_duration(high)}"
            _check(low <= value <= high, what, units.format_duration(value), wanted)
        wanted = f"between {units.format_duration(units.HOUR)} and {units.format_duration(MAX_VERIFY)}, or 0 (never)"
        for what, every in (("verification interval", self.verify_every), ("scrub interval", self.scrub_every)):
            _check(not every or units.HOUR <= every <= MAX_VERIFY, what, units.format_duration(every), wanted)
        _check(0 < self.resync_threshold <= 1, "resync threshold", self.resync_threshold, "above 0, at most 1")
        for rule in self.bandwidth:
            wanted = f"at least {units.format_rate(MIN_RATE)}"
            _check(MIN_RATE <= rule.rate < float("inf"), "bandwidth", units.format_rate(rule.rate), wanted)
        wanted = "rungs of rising age and rising spacing"
        _check(_ladder_is_sound(self.ladder), "retention ladder", self.ladder, wanted)
        _check(
            self.consistency is not Consistency.OFFLINE, "consistency", "offline", "crash, filesystem or application"
        )


def _check(holds: bool, what: str, value: object, wanted: str) -> None:
    if not holds:
        raise InvalidValue(what=what, value=value, wanted=wanted)
