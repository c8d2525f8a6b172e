"""Which recovery point a person means."""

from __future__ import annotations

from collections.abc import Sequence

from asrcore.errors import InvalidValue, PointNotFound
from asrcore.model.point import RecoveryPoint
from asrcore.units import parse_time

__all__ = ["choose_point"]


def choose_point(points: Sequence[RecoveryPoint], text: str, machine: str) -> RecoveryPoint:
    """`latest`, an id (or the unique start of one), or an ISO time: the newest point not after it.

    `points` oldest first. Raises PointNotFound.
    """
    if not points:
        raise PointNotFound(machine=machine, point=text)
    if text == "latest":
        return points[-1]
    matches = [point for point in points if point.id == text] or [p for p in points if p.id.startswith(text) and text]
    if len(matches) == 1:
        return matches[0]
    try:
        at = parse_time(text)
    except InvalidValue:
        raise PointNotFound(machine=machine, point=text) from None
    before = [point for point in points if point.taken_at <= at]
    if not before:
        raise PointNotFound(machine=machine, point=text)
    return before[-1]
