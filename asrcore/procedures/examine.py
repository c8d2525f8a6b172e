"""A recovery point is examined at the target before a machine is made of it."""

from __future__ import annotations

import logging

import attrs

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import AsrError, PointDamaged, PointNotFound
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import Protection
from asrcore.model.watch import Watch
from asrcore.procedures.points import choose_point, damaged, is_named
from asrcore.procedures.procedure import Work
from asrcore.replication.context import Context
from asrcore.units import MiB

__all__ = ["PART", "check_point", "note_examined", "whole_point"]

_log = logging.getLogger(__name__)

PART = 256 * MiB
"""Bytes that are examined in one call: over a link each call has a time limit."""


_MOST_PASSED_OVER = 8
"""Points in which damage is found, one after the other, until a job fails: each look may take the target a while."""


def whole_point(work: Work) -> RecoveryPoint:
    """Choose the point of a job, and let the target look for damage in it. Where the latest one is wanted, or that of a
    time, one in which damage is found is passed over: it is marked, and the next older one is taken.

    Raises PointDamaged and PointNotFound.
    """
    vault, wanted, name = work.context.vault, work.arguments, work.protection.name
    passed: list[str] = []
    while True:
        points = vault.points(work.protection_id)
        point = choose_point(points, wanted.point, name, allow_damaged=wanted.allow_damaged)
        try:
            check_point(work, point.id)
        except PointDamaged:
            if is_named(points, wanted.point) or point.id in passed or len(passed) == _MOST_PASSED_OVER:
                raise
            passed.append(point.id)
            continue
        if passed:
            work.facts["passed_over"] = passed
            work.note("failover", f"point {point.id} is taken; newer ones are damaged: {', '.join(passed)}")
        return point


def check_point(work: Work, point_id: str) -> None:
    """Let the target look for damage in a point, with the argument `prove` in all of it. What is found is recorded.

    Raises PointDamaged, unless that is allowed, and PointNotFound.
    """
    protection, watch = work.protection, work.watch
    replica = work.context.site(protection.target_site).target.replica(protection.replica_id)
    try:
        found = replica.examine(point_id, watch=watch)
        if work.arguments.prove and not found.damage:
            found = _prove(replica, point_id, watch)
            work.facts.update(proved_bytes=found.proved, examined_bytes=found.read)
    except PointNotFound:
        raise PointNotFound(machine=protection.name, point=point_id) from None
    note_examined(work.context, protection, point_id, found, whole=work.arguments.prove)
    if not found.damage:
        return
    text = "; ".join(found.damage)
    if work.arguments.allow_damaged:
        work.facts["damaged"] = text
        return
    points = work.context.vault.points(protection.id)
    point = next((item for item in points if item.id == point_id), None)
    if point is None:
        raise PointNotFound(machine=protection.name, point=point_id)
    raise damaged(points, attrs.evolve(point, damaged=text), protection.name)


def _prove(replica: driver.Replica, point_id: str, watch: Watch) -> driver.Examination:
    point = next((item for item in replica.info().points if item.id == point_id), None)
    watch.start("proving", 0 if point is None else sum(point.disks.values()))
    damage: list[str] = []
    read = proved = 0
    start: int | None = 0
    while start is not None:
        found = replica.examine(point_id, start=start, limit=PART, watch=watch)
        damage += found.damage
        read, proved, start = read + found.read, proved + found.proved, found.end
    return driver.Examination(tuple(damage), read, proved)


def note_examined(
    context: Context, protection: Protection, point_id: str, found: driver.Examination, *, whole: bool
) -> None:
    """Record with the point, in the vault and at the replica, what an examination found. Only one of the `whole` point
    shows that a point is not damaged, or not any more."""
    text = "; ".join(found.damage)
    if not text and not whole:
        return
    now = context.clock()
    former = context.vault.note_examined(protection.id, point_id, damaged=text, proved_at=now if whole else None)
    reach("examine.noted")
    if former is None or (former == text and not text):
        return
    try:
        context.site(protection.target_site).target.replica(protection.replica_id).mark_damaged(
            point_id, text, protection.epoch
        )
    except AsrError as problem:  # the vault's record is what counts
        _log.warning("%s: the damage of point %s is not marked at the target: %s", protection.name, point_id, problem)
    if former != text:
        said = f"recovery point {point_id} is damaged: {text}" if text else f"recovery point {point_id} is whole again"
        _log.warning("%s: %s", protection.name, said)
        context.vault.add_event(at=now, machine=protection.name, kind="damage", text=said)
