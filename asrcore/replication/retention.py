"""Which recovery points to keep and which to drop: a ladder, as a pure function of points, policy and time.

The rule. Time is cut into buckets aligned to the epoch; a point of a certain age belongs to the rung of the ladder for
that age, and of the points in one bucket of its rung only the *oldest* stays. Younger than the first rung all stay;
older than `keep` none. A rung's buckets are whole numbers of the former rung's (a spacing is rounded down to that,
never to less than half), so the oldest point of a coarse bucket is the oldest of its fine bucket, too. It follows:

- A kept point goes only when it moves to the next rung or past `keep`; new points never push it out.
- What thinning at two times leaves is at least what thinning at the later time alone leaves, however often it runs
  and whenever the engine was down.
- Between two kept neighbours lies at most the rung's spacing, plus the greatest distance of the points as made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from asrcore.model.point import RecoveryPoint
from asrcore.model.policy import Policy, Rung

__all__ = ["cutoff", "point_due", "to_drop"]


def point_due(policy: Policy, last_kept_at: float | None, taken_at: float) -> bool:
    """Whether the cycle that shows the instant `taken_at` is to become a kept point.

    Half a cycle early counts as due: cycles come at their interval only nearly, and waiting for the next one would
    make the distance of the points one interval too long. A clock that was set back makes a point, too.
    """
    if last_kept_at is None:
        return True
    return not 0 <= taken_at - last_kept_at < policy.point_interval - policy.interval / 2


def cutoff(policy: Policy, now: float) -> float:
    """Points that show this instant or a later one stay, and which of the others stay does not depend on them, but for
    the newest of all: `to_drop` needs only that one and what is older."""
    return now - min([policy.keep, *(rung.after for rung in policy.ladder)])


def to_drop(points: Iterable[RecoveryPoint], policy: Policy, now: float) -> list[RecoveryPoint]:
    """The points to drop at the time `now`, oldest first.

    The newest of all stays whatever its age. Pinned points, and those that are only the latest state, are neither
    dropped nor counted.
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
