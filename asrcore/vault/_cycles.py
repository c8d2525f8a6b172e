"""Cycles under way, recovery points, and the reversal.

Invariants 1 and 2 (docs/explanation/architecture.md) depend on this file: a source's mark changes in four places only,
`record_point` (with the point, in one transaction), `forget_mark`, `start_reverse`, and `adopt`, which deletes it.
Nothing else in the vault writes the columns `mark` and `head_point`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import attrs
from sqlalchemy import BindParameter, Connection, bindparam, delete, func, insert, select, update

from asrcore.crashpoint import reach
from asrcore.errors import PointNotFound, StaleBase, StaleEpoch, WrongCycle, WrongState
from asrcore.model.epoch import next_generation
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import CycleMode, NetworkMap, PendingCycle, Protection
from asrcore.model.state import STATES_WITH_POINTS, Event, State, allowed
from asrcore.units import DAY
from asrcore.vault import _rows, _schema
from asrcore.vault._clock import Clock, clock_in_doubt
from asrcore.vault._values import Changes, CycleStats

__all__ = ["STATISTICS_AGE", "STATISTICS_ROWS", "Cycles"]

STATISTICS_ROWS = 10_000
"""Cycles per machine whose statistics are kept at most: 14 hours at an interval of 5 s."""
STATISTICS_AGE = 30 * DAY

_NOT_FAILED_OVER = (State.ENABLING, State.INITIAL_COPY, State.FINALIZING, *STATES_WITH_POINTS, State.REVERSING)
"""States in which the machine runs at its source, and a comparison may follow."""

_IN_ONE_STATEMENT = 500  # ids; SQLite takes at most 999 parameters in older builds

# Statements of every cycle, made once.
_MACHINE: BindParameter[str] = bindparam("machine")
_POINT: BindParameter[str] = bindparam("point")
_NUMBER: BindParameter[int] = bindparam("number")
_points, _cycles, _pending = _schema.points.c, _schema.cycles.c, _schema.pending_cycles.c
_its_point = (_points.protection_id == _MACHINE, _points.id == _POINT)
_ALL_POINTS = (
    select(_schema.points).where(_points.protection_id == _MACHINE, ~_points.dropping).order_by(_points.number)
)
_KEPT_AT = (
    select(_points.taken_at)
    .where(_points.protection_id == _MACHINE, _points.kept, ~_points.dropping)
    .order_by(_points.number.desc())
    .limit(1)
)
_DROPPING = select(_points.id).where(_points.protection_id == _MACHINE, _points.dropping).order_by(_points.number)
_POINT_NUMBER = select(_points.number).where(*_its_point)
_FORGET_FORMER_HEAD = delete(_schema.points).where(*_its_point, ~_points.kept, ~_points.pinned)
_FORGET_PENDING = delete(_schema.pending_cycles).where(_pending.protection_id == _MACHINE)
_LAST_CYCLE = select(func.max(_cycles.number)).where(_cycles.protection_id == _MACHINE)
_FORGET_CYCLES = delete(_schema.cycles).where(_cycles.protection_id == _MACHINE, _cycles.number <= _NUMBER)
_OLDEST_CYCLES = (
    select(_cycles.number, _cycles.sealed_at)
    .where(_cycles.protection_id == _MACHINE)
    .order_by(_cycles.number)
    .limit(10)
)


class Cycles(Clock):
    """The part of the vault that knows cycles and recovery points.

    Methods that take `epoch`, that of the cycle's writer, raise StaleEpoch when the machine has another one by now.
    """

    # -- a cycle under way -------------------------------------------------------------------------------------------

    def begin_cycle(self, protection_id: str, pending: PendingCycle, *, epoch: int | None = None) -> Protection:
        """Record a cycle before its first byte is copied; the same id again replaces what was recorded.

        Raises WrongCycle while another one is under way, StaleBase for a delta that is not based on the head.
        """
        with self._write("begin-cycle") as connection:
            protection = self._owned(connection, protection_id, epoch)
            if protection.pending is not None and protection.pending.id != pending.id:
                detail = f"{protection.pending.id} is pending"
                raise WrongCycle(machine=protection.name, cycle=pending.id, detail=detail)
            return self._put_pending(connection, protection, pending)

    def replan_cycle(self, protection_id: str, pending: PendingCycle, *, epoch: int | None = None) -> Protection:
        """Replace the record of the cycle under way, when it continues with a new view.

        Raises WrongCycle when it is not this one, StaleBase like `begin_cycle`.
        """
        with self._write("replan-cycle") as connection:
            protection = self._owned(connection, protection_id, epoch)
            self._check_pending(protection, pending.id)
            return self._put_pending(connection, protection, pending)

    def abandon_cycle(self, protection_id: str, cycle_id: str, *, epoch: int | None = None) -> Protection:
        """Delete the record of the cycle under way, after its content was discarded at the target. If there is none,
        nothing changes. Raises WrongCycle when it is another one."""
        with self._write("abandon-cycle") as connection:
            protection = self._owned(connection, protection_id, epoch)
            if protection.pending is None:
                return protection
            self._check_pending(protection, cycle_id)
            return self._drop_pending(connection, protection)

    def record_point(
        self,
        protection_id: str,
        cycle_id: str,
        point: RecoveryPoint,
        *,
        event: Event | None = None,
        stats: CycleStats,
        epoch: int | None = None,
        counted_at: float | None = None,
    ) -> Protection:
        """Record a sealed point: in one transaction the point, the head, the source's mark (that of the cycle's
        view), the end of the cycle, its statistics, and what the event does to the state. The former head is deleted,
        unless it is kept or pinned. A point that is already recorded changes nothing. `counted_at`: the instant that
        it shows, on the machine's own count of time; None: `taken_at`.

        Raises WrongCycle when the cycle is not the one under way or the point not its point, WrongState.
        """
        with self._write("record-point") as connection:
            protection = self._owned(connection, protection_id, epoch)
            if self._has_point(connection, protection.id, point.id):
                return protection
            pending = self._check_pending(protection, cycle_id)
            if pending.point_id != point.id:
                detail = f"its point is {pending.point_id}, not {point.id}"
                raise WrongCycle(machine=protection.name, cycle=cycle_id, detail=detail)
            state = allowed(protection.name, protection.state, event).target if event else protection.state
            self._replace_head(connection, protection, point, counted_at)
            reach("vault.record-point.inserted")
            self._add_statistics(connection, protection.id, stats)
            changed = self._store(
                connection,
                self._drop_pending(connection, protection),
                state=state,
                head_point=point.id,
                mark=pending.view_mark,
                last_cycle_at=stats.started_at,
                resync_reason="" if state is State.PROTECTED else protection.resync_reason,
                attempt=0,
                retry_at=None,
                error=None,
            )
        return self._reported(protection, changed)

    # -- points ------------------------------------------------------------------------------------------------------

    def points(self, protection_id: str) -> list[RecoveryPoint]:
        """Oldest first, the last one is the head; points that are being deleted are not among them.

        The order is that of recording: it is the order of the content even if a clock was set back.
        """
        with self._read() as connection:
            rows = connection.execute(_ALL_POINTS, {"machine": protection_id}).mappings().all()
        return [self._value(_rows.point_of, row, f"point {row['id']}") for row in rows]

    def last_kept_at(self, protection_id: str) -> float | None:
        """The instant that the newest kept point shows; None without one. The newest is the one recorded last."""
        with self._read() as connection:
            return connection.execute(_KEPT_AT, {"machine": protection_id}).scalar()

    def heads(self) -> dict[str, RecoveryPoint]:
        """The newest point of each machine that has one, by the machine's id: one statement, whatever the number of
        points."""
        table, protections = _schema.points, _schema.protections
        newest = (table.c.protection_id == protections.c.id) & (table.c.id == protections.c.head_point)
        with self._read() as connection:
            rows = connection.execute(select(table).select_from(protections.join(table, newest))).mappings().all()
        return {row["protection_id"]: self._value(_rows.point_of, row, f"point {row['id']}") for row in rows}

    def point_counts(self) -> dict[str, int]:
        """How many points each machine has, by the machine's id; those that are being deleted do not count."""
        table = _schema.points
        statement = select(table.c.protection_id, func.count()).where(~table.c.dropping).group_by(table.c.protection_id)
        with self._read() as connection:
            return dict(connection.execute(statement).tuples().all())

    def mark_dropping(self, protection_id: str, point_ids: Iterable[str]) -> list[str]:
        """Record that points are to be deleted, before the target deletes them; returns those that were marked now.

        Not marked: the head, pinned points, the point of a failover or of a running test, and unknown ids.
        """
        table = _schema.points
        marked: list[str] = []
        with self._write("mark-dropping") as connection:
            protection = self._protection(connection, protection_id)
            stay = {protection.head_point, protection.failover_point}
            stay.add(protection.test.point_id if protection.test else None)
            for some in _portions(point_id for point_id in point_ids if point_id not in stay):
                chosen = (
                    table.c.protection_id == protection_id,
                    table.c.id.in_(some),
                    ~table.c.pinned,
                    ~table.c.dropping,
                )
                marked += connection.execute(select(table.c.id).where(*chosen).order_by(table.c.number)).scalars()
                connection.execute(update(table).where(*chosen).values(dropping=True))
        return marked

    def dropping(self, protection_id: str) -> list[str]:
        """Ids of points that are being deleted, oldest first."""
        with self._read() as connection:
            return list(connection.execute(_DROPPING, {"machine": protection_id}).scalars())

    def forget_points(self, protection_id: str, point_ids: Iterable[str]) -> None:
        """Delete the records of points that were deleted at the target; unknown ones are ignored. The head stays,
        except in a commit, which deletes the whole replica."""
        table = _schema.points
        point_ids = list(point_ids)
        with self._write("forget-points") as connection:
            protection = self._protection(connection, protection_id)
            head = protection.head_point
            if head in point_ids and protection.state is State.COMMITTING:
                self._store(connection, protection, head_point=None, mark=None)
                head = None
            for some in _portions(point_id for point_id in point_ids if point_id != head):
                connection.execute(delete(table).where(table.c.protection_id == protection_id, table.c.id.in_(some)))

    def pin_point(self, protection_id: str, point_id: str, pinned: bool) -> None:
        """Exempt a point from retention, or end that. Raises PointNotFound, also for one that is being deleted."""
        table = _schema.points
        with self._write("pin-point") as connection:
            protection = self._protection(connection, protection_id)
            chosen = (table.c.protection_id == protection_id, table.c.id == point_id, ~table.c.dropping)
            if connection.execute(update(table).where(*chosen).values(pinned=pinned)).rowcount == 0:
                raise PointNotFound(machine=protection.name, point=point_id)

    def note_proved_to(self, protection_id: str, point_id: str, proved_to: int) -> None:
        """Record how far the reading of a point got."""
        table = _schema.points
        chosen = (table.c.protection_id == protection_id, table.c.id == point_id)
        with self._write("note-proved-to") as connection:
            connection.execute(update(table).where(*chosen).values(proved_to=proved_to))

    def note_examined(self, protection_id: str, point_id: str, *, damaged: str, proved_at: float | None) -> str | None:
        """Record what was found wrong with a point ("": nothing), and when all of it was read, if it was now. Returns
        what was recorded before; None if there is no such point."""
        table = _schema.points
        chosen = (table.c.protection_id == protection_id, table.c.id == point_id)
        with self._write("note-examined") as connection:
            former: str | None = connection.execute(select(func.coalesce(table.c.damaged, "")).where(*chosen)).scalar()
            if former is not None:
                values: dict[str, object] = {"damaged": damaged}
                if proved_at is not None:
                    values["proved_at"] = proved_at
                if damaged or proved_at is not None:  # what is being read is to be read from its beginning
                    values["proved_to"] = 0
                connection.execute(update(table).where(*chosen).values(values))
            return former

    def damaged_counts(self) -> dict[str, int]:
        """How many points of each machine are damaged, by the machine's id; machines without any are left out."""
        table = _schema.points
        chosen = (~table.c.dropping, table.c.damaged != "")
        statement = select(table.c.protection_id, func.count()).where(*chosen).group_by(table.c.protection_id)
        with self._read() as connection:
            return dict(connection.execute(statement).tuples().all())

    # -- statistics --------------------------------------------------------------------------------------------------

    def cycles(self, protection_id: str, *, since: float | None = None, limit: int | None = None) -> list[CycleStats]:
        """Statistics of recorded cycles, oldest first: those sealed at `since` or later, the newest `limit` of them.

        Kept are 10,000 cycles per machine, for 30 days.
        """
        table = _schema.cycles
        statement = select(table).where(table.c.protection_id == protection_id).order_by(table.c.number.desc())
        if since is not None:
            statement = statement.where(table.c.sealed_at >= since)
        with self._read() as connection:
            rows = connection.execute(statement.limit(limit)).mappings().all()
        return [self._value(_rows.cycle_of, row, f"cycle {row['id']}") for row in reversed(rows)]

    def last_cycles(self) -> dict[str, CycleStats]:
        """Statistics of each machine's newest cycle, by the machine's id."""
        table, inner, machines = _schema.cycles, _schema.cycles.alias(), _schema.protections
        newest = select(func.max(inner.c.number)).where(inner.c.protection_id == machines.c.id).scalar_subquery()
        its = (table.c.protection_id == machines.c.id) & (table.c.number == newest)
        with self._read() as connection:
            rows = connection.execute(select(table).select_from(machines.join(table, its))).mappings().all()
        return {row["protection_id"]: self._value(_rows.cycle_of, row, f"cycle {row['id']}") for row in rows}

    def cycle_totals(self) -> dict[str, int]:
        """How many cycles were ever recorded in this direction, by the machine's id; older ones are counted too."""
        table = _schema.cycles
        statement = select(table.c.protection_id, func.max(table.c.number)).group_by(table.c.protection_id)
        with self._read() as connection:
            return dict(connection.execute(statement).tuples().all())

    # -- the other direction -----------------------------------------------------------------------------------------

    def start_reverse(
        self,
        protection_id: str,
        *,
        replica_id: str,
        source_machine: str,
        seed_machine: str | None,
        networks: NetworkMap,
        test_network: str = "",
    ) -> Protection:
        """Reverse a committed machine (event REPROTECT), in one transaction: the sites swap, `source_machine` (at
        what was the target) replicates to the new replica, a higher epoch begins. There is no mark and no point yet,
        and the records of those of the old direction are deleted. `seed_machine` is the old source, stopped, whose
        disks the replica starts from; `networks` and `test_network` are those of the new direction.

        A machine that is REVERSING already is returned unchanged: an interrupted re-protect resumes with it.
        Raises WrongState, also while the old source is not quarantined (`fence_due`): it may still run.
        Raises AlreadyProtected when `source_machine` is protected under another name.
        """
        with self._write("start-reverse") as connection:
            protection = self._protection(connection, protection_id)
            row = allowed(protection.name, protection.state, Event.REPROTECT)
            if protection.state is State.REVERSING:
                return protection
            if protection.fence_due:
                raise WrongState(
                    machine=protection.name,
                    event=Event.REPROTECT.value,
                    state=protection.state.value,
                    reason=f"The old machine at site {protection.source_site!r} is not quarantined yet and may run.",
                    possible="re-protect, once that site is reachable again",
                )
            turned = attrs.evolve(protection, source_site=protection.target_site, source_machine=source_machine)
            self._check_free(connection, turned)
            points = _schema.points
            connection.execute(delete(points).where(points.c.protection_id == protection_id))
            changed = self._store(
                connection,
                self._drop_pending(connection, protection),
                state=row.target,
                source_site=turned.source_site,
                source_machine=turned.source_machine,
                target_site=protection.source_site,
                replica_id=replica_id,
                seed_machine=seed_machine,
                networks=networks,
                test_network=test_network,
                replica_kind="",
                epoch=next_generation(protection.epoch),
                mark=None,
                head_point=None,
                target_machine=None,
                failover_point=None,
                planned=False,
                test=None,
                last_cycle_at=None,
                resync_reason="",
                attempt=0,
                retry_at=None,
                error=None,
            )
        return self._reported(protection, changed)

    # -- what a target knows better ----------------------------------------------------------------------------------

    def known_points(self, protection_id: str) -> set[str]:
        """Ids of all recorded points, those that are being deleted included."""
        with self._read() as connection:
            return set(connection.execute(select(_points.id).where(_points.protection_id == protection_id)).scalars())

    def adopt(
        self,
        compared: Protection,
        points: Sequence[RecoveryPoint],
        changes: Changes,
        *,
        counted_by: float,
        state: State | None = None,
    ) -> Protection:
        """Replace what is recorded of a machine's points by what its target holds, oldest first, in one transaction
        with other changes. `compared`: the record that was compared with the target.

        Points that the target does not hold are deleted here. A head that is not the recorded one takes the mark with
        it and ends a cycle under way: it is not known what has changed at the source since. Then the machine waits for
        a comparison, unless it is being failed over. `counted_by`: no point is later than this on the machine's own
        count of time.
        """
        with self._write("adopt") as connection:
            protection = self._owned(connection, compared.id, compared.epoch)
            self._replace_points(connection, protection, points, counted_by)
            reach("vault.adopt.points")
            head = points[-1].id if points else None
            state = state or protection.state
            if head != protection.head_point:
                self._drop_pending(connection, protection)
                protection = self._store(connection, protection, head_point=head, mark=None, pending=None)
                state = State.RESYNC_PENDING if state in _NOT_FAILED_OVER else state
            settled: Changes = {"error": None, "attempt": 0, "retry_at": None, "restored": False, **changes}
            changed = self._change(connection, protection, settled, state=state)
        return self._reported(compared, changed)

    def _replace_points(
        self, connection: Connection, protection: Protection, points: Sequence[RecoveryPoint], counted_by: float
    ) -> None:
        """In the order of the target: what comes after an unknown point gets a new number."""
        table, its = _schema.points, _points.protection_id == protection.id
        rows = {row["id"]: row for row in connection.execute(select(table).where(its)).mappings()}
        last: tuple[float, float] | None = None  # of the former point: the instant that it shows, on both scales
        order_kept = True
        for point in points:
            row = rows.pop(point.id, None)
            if row is None:
                counted = point.taken_at if last is None else last[1] + max(0.0, point.taken_at - last[0])
                connection.execute(insert(table), _rows.point_row(protection.id, point, min(counted, counted_by)))
                last, order_kept = (point.taken_at, min(counted, counted_by)), False
                continue
            same = {"dropping": False, "kept": point.kept, "pinned": point.pinned}
            if order_kept:
                connection.execute(update(table).where(its, _points.id == point.id).values(same))
            else:
                connection.execute(delete(table).where(its, _points.id == point.id))
                again = {name: value for name, value in row.items() if name != "number"}
                connection.execute(insert(table), {**again, **same})
            last = row["taken_at"], row["taken_at"] if row["counted_at"] is None else row["counted_at"]
        for gone in rows:
            connection.execute(delete(table).where(its, _points.id == gone))

    # -- parts of the transactions -----------------------------------------------------------------------------------

    def _owned(self, connection: Connection, protection_id: str, epoch: int | None) -> Protection:
        protection = self._protection(connection, protection_id)
        if epoch is not None and epoch != protection.epoch:
            raise StaleEpoch(replica=protection.name, epoch=epoch, owner=protection.epoch)
        return protection

    def _check_pending(self, protection: Protection, cycle_id: str) -> PendingCycle:
        pending = protection.pending
        if pending is None or pending.id != cycle_id:
            detail = "none is pending" if pending is None else f"{pending.id} is pending"
            raise WrongCycle(machine=protection.name, cycle=cycle_id, detail=detail)
        return pending

    def _put_pending(self, connection: Connection, protection: Protection, pending: PendingCycle) -> Protection:
        if pending.mode is CycleMode.DELTA and pending.base_point != protection.head_point:
            raise StaleBase(replica=protection.name, head=protection.head_point, base=pending.base_point)
        protection = self._drop_pending(connection, protection)
        connection.execute(insert(_schema.pending_cycles), _rows.pending_row(protection.id, pending))
        return self._store(connection, protection, pending=pending)

    def _drop_pending(self, connection: Connection, protection: Protection) -> Protection:
        connection.execute(_FORGET_PENDING, {"machine": protection.id})
        return self._store(connection, protection, pending=None)

    def _has_point(self, connection: Connection, protection_id: str, point_id: str) -> bool:
        return connection.execute(_POINT_NUMBER, {"machine": protection_id, "point": point_id}).scalar() is not None

    def _replace_head(
        self, connection: Connection, protection: Protection, point: RecoveryPoint, counted_at: float | None
    ) -> None:
        # The new row first: a deleted last row would free its number for reuse.
        connection.execute(insert(_schema.points), _rows.point_row(protection.id, point, counted_at))
        connection.execute(_FORGET_FORMER_HEAD, {"machine": protection.id, "point": protection.head_point})

    def _add_statistics(self, connection: Connection, protection_id: str, stats: CycleStats) -> None:
        ours = {"machine": protection_id}
        last: int | None = connection.execute(_LAST_CYCLE, ours).scalar()
        number = (last or 0) + 1
        connection.execute(insert(_schema.cycles), _rows.cycle_row(protection_id, number, stats))
        # By age: only from the old end, so that no more than a few rows are looked at, and deleted, each time.
        oldest = connection.execute(_OLDEST_CYCLES, ours)
        aged = [row.number for row in oldest if row.sealed_at < stats.sealed_at - STATISTICS_AGE]
        if aged and clock_in_doubt(connection):
            aged = []
        connection.execute(_FORGET_CYCLES, ours | {"number": max([number - STATISTICS_ROWS, *aged])})


def _portions(ids: Iterable[str]) -> Iterator[list[str]]:
    ordered = list(ids)
    for start in range(0, len(ordered), _IN_ONE_STATEMENT):
        yield ordered[start : start + _IN_ONE_STATEMENT]
