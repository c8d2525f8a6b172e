"""Which recovery point a failover runs from."""

from __future__ import annotations

from collections.abc import Sequence

from asrcore.errors import InvalidValue, PointNotFound, WrongState
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.units import parse_time

__all__ = ["check_planned", "choose_point"]


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


def check_planned(protection: Protection) -> None:
    """Raises WrongState after an unplanned failover that stopped half-way: its machine at the target is made from a
    point, and a planned failover would start that one without what the source has written since."""
    if protection.state is State.FAILING_OVER and not protection.planned and protection.target_machine is not None:
        raise WrongState(
            machine=protection.name,
            event="have a planned failover",
            state=protection.state.value,
            reason=f"An unplanned failover has made a machine at {protection.target_site!r}; the last changes of "
            f"{protection.source_site!r} would be missing in it.",
            possible=f"`asr failover undo {protection.name}`, and then the planned failover",
        )
