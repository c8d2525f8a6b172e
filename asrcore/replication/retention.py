"""Which recovery points to keep and which to delete: a ladder, as a pure function of points, policy and time.

The rule: time is divided into buckets aligned to the epoch. A point belongs to the ladder's rung for its age, and of
the points in one bucket of its rung only the *oldest* is kept. Points younger than the first rung are all kept, points
older than `keep` are all deleted. A rung's bucket is a whole number of the former rung's buckets (a spacing is rounded
down to that, never to less than half), so the oldest point of a coarse bucket is also the oldest of its fine bucket.
It follows:

- A kept point is deleted only when it moves to the next rung or past `keep`, never because of new points.
- Applying retention at two times keeps at least what applying it at the later time alone keeps, however often it runs
  and whenever the engine was down.
- Two kept neighbours are at most the rung's spacing apart, plus the greatest distance of the points as made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from asrcore.model.point import RecoveryPoint
from asrcore.model.policy import Policy, Rung

__all__ = ["SHARE", "at_once", "cutoff", "point_due", "to_drop"]

SHARE = 4
"""At most one in so many kept points is deleted at once: whatever was wrong, it is seen before all are gone."""


def point_due(policy: Policy, last_kept_at: float | None, taken_at: float) -> bool:
    """Whether the cycle that shows the instant `taken_at` is to become a kept point.

    Half a cycle early counts as due: cycles keep their interval only roughly, and waiting for the next one would make
    the distance of the points one interval too long. After a clock was set back a point is due as well.
    """
    if last_kept_at is None:
        return True
    return not 0 <= taken_at - last_kept_at < policy.point_interval - policy.interval / 2


def cutoff(policy: Policy, now: float) -> float:
    """Points that show this instant or a later one are kept, and do not affect which older points are kept, except for
    the newest of all: `to_drop` needs only the newest and those that are older."""
    return now - min([policy.keep, *(rung.after for rung in policy.ladder)])


def at_once(kept: int) -> int:
    """How many of so many kept points may be deleted after one cycle; a cycle makes one at most."""
    return math.ceil(kept / SHARE)


def to_drop(points: Iterable[RecoveryPoint], policy: Policy, now: float) -> list[RecoveryPoint]:
    """The points to delete at the time `now`, oldest first.

    The newest of all is kept whatever its age. Pinned points, and those that are only the latest state, are neither
    deleted nor counted.
    """
    ordered = sorted(points, key=_order)
    candidates = [point for point in ordered if point.kept and not point.pinned]
    oldest: dict[tuple[int, int], RecoveryPoint] = {}
    result = []
    for point in candidates:
        # Oldest first, so the first point of a bucket is the one that stays in it.
        own = [oldest.setdefault(bucket, point) is point for bucket in _buckets(policy.ladder, point.taken_at)]
        age = now - point.taken_at
        rung = sum(age > rung.after for rung in policy.ladder)
        thinned = rung > 0 and not own[rung - 1]
        if (age > policy.keep or thinned) and point is not ordered[-1]:
            result.append(point)
    return result


def _order(point: RecoveryPoint) -> tuple[float, float, str]:
    return (point.taken_at, point.sealed_at, point.id)


def _buckets(ladder: Sequence[Rung], taken_at: float) -> list[tuple[int, int]]:
    """For each rung the bucket of that time, counted in the former rung's so that none cuts through another."""
    result: list[tuple[int, int]] = []
    spacing, index = 0.0, 0
    for number, rung in enumerate(ladder):
        if number == 0:
            spacing, index = rung.every, math.floor(taken_at / rung.every)
        else:
            ratio = max(1, math.floor(rung.every / spacing))
            spacing, index = spacing * ratio, index // ratio
        result.append((number, index))
    return result
