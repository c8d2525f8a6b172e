"""What is known against the clock of the engine's host, and how old recovery points are whatever that clock says.

Each point has, beside the time that it shows, the time on its machine's own count (`counted_at`), which only grows, by
the time that has certainly passed. Retention judges ages by that count. While the clock is in doubt nothing is deleted
by age: neither points nor jobs, events and statistics. The doubt is the newest entry of its kinds in the log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping

import attrs
from sqlalchemy import Connection, Float, func, insert, select, update

from asrcore.model.point import RecoveryPoint
from asrcore.vault import _rows, _schema
from asrcore.vault._registry import Registry
from asrcore.vault._values import ClockAnchor, ClockDoubt, ClockGap, ClockState

__all__ = ["Clock", "clock_in_doubt"]

_events, _points, _machines = _schema.events.c, _schema.points.c, _schema.protections.c
_NEWEST = (
    select(_events.number, _events.at, _events.kind, _events.text, _events.data)
    .where(_events.machine == "", _events.kind.in_((_rows.CLOCK_DOUBTED, _rows.CLOCK_ACCEPTED)))
    .order_by(_events.number.desc())
    .limit(1)
)
_COUNTED = func.coalesce(_points.counted_at, _points.taken_at, type_=Float)
_HEADS = select(_points.protection_id, _points.id, _points.taken_at, _COUNTED.label("counted_at")).join(
    _schema.protections, (_machines.id == _points.protection_id) & (_machines.head_point == _points.id)
)


class Clock(Registry):
    """The part of the vault that knows whether the engine's clock can be trusted, and machines' counts of time."""

    def clock_state(self) -> ClockState:
        """The newest doubt about the clock of the engine's host, or that it was accepted."""
        with self._read() as connection:
            return self._clock_state(connection)

    def doubt_clock(
        self,
        at: float,
        text: str,
        *,
        boot: str,
        elapsed: float,
        anchors: Mapping[str, ClockAnchor],
        gaps: Mapping[str, float],
        went_back: float = 0.0,
    ) -> ClockState:
        """Delete nothing by age from now on, until `accept_clock`. The doubt is this server's, in place of its former.

        `boot` and `elapsed`: which run of the host this is, and its monotonic time. `anchors`: what machines' counts
        are now. `gaps`: seconds by machine that may have passed while no engine ran. `went_back`: seconds by which the
        clock was set back; what an earlier gap seemed to take is corrected by it.
        """
        with self._write("doubt-clock") as connection:
            former = self._clock_state(connection)
            number = connection.execute(select(func.max(_points.number))).scalar() or 0
            open_gaps = former.without(went_back) if former.held else ()
            others = [doubt for doubt in former.doubts if doubt.server != self.server_name]
            state = ClockState(
                held=True,
                at=at,
                text=text,
                doubts=(*others, ClockDoubt(self.server_name, boot, elapsed, text)),
                before=number if went_back else former.before,
                anchors={**former.anchors, **anchors},
                gaps=(*open_gaps, *(ClockGap(machine, number, seconds) for machine, seconds in gaps.items())),
            )
            self._log_clock(connection, state, _rows.CLOCK_DOUBTED)
            return self._clock_state(connection)

    def accept_clock(
        self,
        at: float,
        text: str,
        anchors: Mapping[str, ClockAnchor] | None = None,
        ended: Collection[ClockDoubt] | None = None,
    ) -> bool:
        """Trust the clock again: the time that no engine saw has passed, so older points are that much older.

        A server gives the doubts that have `ended`, and `anchors` of its machines: no other machine's points become
        older. A person (None) accepts all of them. Returns whether nothing is in doubt any more; False, too, if
        nothing was.
        """
        with self._write("accept-clock") as connection:
            former = self._clock_state(connection)
            if not former.held:
                return False
            left = () if ended is None else tuple(doubt for doubt in former.doubts if doubt not in ended)
            known = None if ended is None else self._assigned_of(connection, anchors or {})
            mine = [gap for gap in former.gaps if known is None or gap.machine in known]
            for gap in mine:
                older = (_points.protection_id == gap.machine, _points.number <= gap.number)
                connection.execute(update(_schema.points).where(*older).values(counted_at=_COUNTED - gap.seconds))
            state = attrs.evolve(former, anchors={**former.anchors, **(anchors or {})}, doubts=left)
            if left:
                gaps = tuple(gap for gap in former.gaps if gap not in mine)
                state = attrs.evolve(state, text=left[-1].text, gaps=gaps)
                self._log_clock(connection, state, _rows.CLOCK_DOUBTED)
                return False
            # A gap that is left is of a machine that no server works on: its points are kept longer.
            self._log_clock(connection, attrs.evolve(state, at=at, text=text, gaps=()), _rows.CLOCK_ACCEPTED)
            return True

    def heads_until(self, number: int) -> set[str]:
        """Ids of the machines whose newest point is not newer than the point of that number."""
        if not number:
            return set()
        with self._read() as connection:
            return set(connection.execute(_HEADS.where(_points.number <= number)).scalars())

    def counts(self, protection_id: str | None = None) -> dict[str, ClockAnchor]:
        """By the machine's id: its newest point, the time that shows, and that time on the machine's own count."""
        which = _HEADS if protection_id is None else _HEADS.where(_machines.id == protection_id)
        with self._read() as connection:
            rows = connection.execute(which).all()
        return {row.protection_id: ClockAnchor(row.id, row.taken_at, row.counted_at) for row in rows}

    def aging_points(self, protection_id: str, before: float) -> list[RecoveryPoint]:
        """The points that are earlier on the machine's own count, and the head, oldest first. `taken_at` is on that
        count."""
        with self._read() as connection:
            head = select(_machines.head_point).where(_machines.id == protection_id).scalar_subquery()
            its = (_points.protection_id == protection_id, ~_points.dropping)
            statement = select(_schema.points, _COUNTED.label("counted")).where(*its).order_by(_points.number)
            found = statement.where((_points.counted_at < before) | (_points.id == head))
            rows = connection.execute(found).mappings().all()
        counted = [{**row, "taken_at": row["counted"]} for row in rows]
        return [self._value(_rows.point_of, row, f"point {row['id']}") for row in counted]

    def kept_points(self, protection_id: str) -> int:
        """How many kept points the machine has, without those that are being deleted."""
        its = (_points.protection_id == protection_id, _points.kept, ~_points.dropping)
        with self._read() as connection:
            return connection.execute(select(func.count()).where(*its)).scalar_one()

    def clock_skew(self, clock: Callable[[], float]) -> float | None:
        """Seconds by which this clock is ahead of the database's; None where that has the same clock."""
        if self._place.path is not None:
            return None
        with self._read() as connection:
            before = clock()
            there = self._now(connection)
            return (before + clock()) / 2 - there

    def _assigned_of(self, connection: Connection, machines: Collection[str]) -> set[str]:
        """Those of the machines that are this server's in this transaction."""
        mine = self._mine()
        found = select(_machines.id) if mine is None else select(_machines.id).where(mine)
        return set(connection.execute(found).scalars()) & set(machines)

    def _clock_state(self, connection: Connection) -> ClockState:
        row = connection.execute(_NEWEST).mappings().first()
        return ClockState() if row is None else self._value(_rows.clock_state_of, row, f"log entry {row['number']}")

    def _log_clock(self, connection: Connection, state: ClockState, kind: str) -> None:
        data = {
            "doubts": [[item.server, item.boot, item.elapsed, item.text] for item in state.doubts],
            "before": state.before,
            "anchors": {machine: [item.point, item.at, item.counted] for machine, item in state.anchors.items()},
            "gaps": [[gap.machine, gap.number, gap.seconds] for gap in state.gaps],
        }
        row = {"at": state.at, "machine": "", "kind": kind, "text": state.text, "data": json.dumps(data)}
        connection.execute(insert(_schema.events).values(row))


def clock_in_doubt(connection: Connection) -> bool:
    """Whether nothing may be deleted by age, in a transaction that is about to."""
    row = connection.execute(_NEWEST).first()
    return row is not None and row.kind == _rows.CLOCK_DOUBTED
