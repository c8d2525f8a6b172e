"""Which recovery point a failover runs from."""

from __future__ import annotations

from collections.abc import Sequence

from asrcore.errors import InvalidValue, PointDamaged, PointNotFound, WrongState
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.units import format_time, parse_time

__all__ = ["check_planned", "choose_point", "damaged", "is_named"]


def choose_point(
    points: Sequence[RecoveryPoint], text: str, machine: str, *, allow_damaged: bool = False
) -> RecoveryPoint:
    """`latest`, an id (or the unique start of one), or an ISO time: the newest point not after it.

    `points` oldest first. One that is marked as damaged is never `latest`, nor that of a time, while there is another;
    without `allow_damaged` it is refused. Raises PointNotFound, PointDamaged.
    """
    if text == "latest":
        return _newest(points, points, text, machine, allow_damaged)
    matches = _named(points, text)
    if len(matches) == 1:
        return _newest(matches, points, text, machine, allow_damaged)
    try:
        at = parse_time(text)
    except InvalidValue:
        raise PointNotFound(machine=machine, point=text) from None
    before = [point for point in points if point.taken_at <= at]
    return _newest(before, points, text, machine, allow_damaged)


def is_named(points: Sequence[RecoveryPoint], text: str) -> bool:
    """Whether it is the id of a point (or the unique start of one)."""
    return text != "latest" and len(_named(points, text)) == 1


def _named(points: Sequence[RecoveryPoint], text: str) -> list[RecoveryPoint]:
    return [point for point in points if point.id == text] or [p for p in points if p.id.startswith(text) and text]


def _newest(
    found: Sequence[RecoveryPoint],
    points: Sequence[RecoveryPoint],
    text: str,
    machine: str,
    allow_damaged: bool,
) -> RecoveryPoint:
    if not found:
        raise PointNotFound(machine=machine, point=text)
    whole = [point for point in found if not point.damaged]
    if not whole and not allow_damaged:
        raise damaged(points, found[-1], machine)
    return (whole or found)[-1]


def damaged(points: Sequence[RecoveryPoint], point: RecoveryPoint, machine: str) -> PointDamaged:
    """That this one of the points, oldest first, is damaged."""
    before = points[: [item.id for item in points].index(point.id)]
    other = next((item for item in reversed(before) if not item.damaged), None)
    text = "none" if other is None else f"{other.id} of {format_time(other.taken_at)}"
    return PointDamaged(machine=machine, point=point.id, damage=point.damaged, other=text)


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
