"""One replication cycle: frozen view -> extents -> transfer -> replica -> sealed recovery point -> vault.

The order of the steps is what keeps the invariants; each may be the last one before a crash:

1. The view is opened; its new mark exists at the source, and nothing relies on it yet.
2. The vault records the cycle as pending, with the view's mark and the plan, before a byte is copied.
3. Content goes to the replica's journal and is flushed; the target knows what is done.
4. The view is confirmed, the cycle is sealed at the target: now the point exists.
5. The vault records the point and advances the mark in one transaction.
6. The view is closed, then the writer, which may have left work for then (`CycleWriter.seal`).
7. Older marks are released, retention runs.

After a crash before 4 the cycle is resumed; between 4 and 5 the sealed point is found at the target and recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

import attrs

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import AsrError, Cancelled, StaleBase, TargetFull, TrackingLost
from asrcore.logline import report
from asrcore.model.extent import Extent, union
from asrcore.model.health import CLOCK_TOLERANCE
from asrcore.model.point import RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import CycleMode, PendingCycle, Protection
from asrcore.model.state import Event, State
from asrcore.model.watch import Watch
from asrcore.replication import plan, retention
from asrcore.replication.agreement import Asked, ask_target
from asrcore.replication.context import Context
from asrcore.replication.ids import new_id
from asrcore.replication.record import record_sealed
from asrcore.replication.transfer import Counts, Transfer

__all__ = ["AfterSeal", "CycleResult", "apply_retention", "release_left", "run_cycle"]

_log = logging.getLogger(__name__)


@attrs.frozen
class CycleResult:
    """What a cycle did. `resumed`: it resumed an interrupted one. `halted`: why the source's platform stopped the
    machine, see `MachineView`."""

    point: RecoveryPoint
    mode: CycleMode
    counts: Counts
    resumed: bool
    halted: str = ""


_ENDED_BY_A_POINT = (State.INITIAL_COPY, State.RESYNCING, State.REVERSING)
"""States whose work is done with the next point, whenever it was taken."""

AfterSeal = Callable[[driver.MachineView, driver.Replica, PendingCycle], None]


def run_cycle(
    context: Context,
    protection_id: str,
    watch: Watch,
    *,
    keep: bool = False,
    compare: bool = False,
    resend: Mapping[str, Sequence[Extent]] | None = None,
    after_seal: AfterSeal | None = None,
) -> CycleResult:
    """Run one cycle of a machine whose lock is held (see `MachineLocks`).

    The mode follows from the state: INITIAL_COPY copies all, RESYNCING and REVERSING compare (as does any state with
    `compare`), else a delta. `keep` makes the point a kept one even if the policy's point interval has not passed.
    `again`: extents by disk to be sent beside what changed. `after_seal` is called with the view still frozen, and with
    the cycle as it was sealed.

    Raises TrackingLost when no delta is possible (a PROTECTED machine is then RESYNC_PENDING), and what drivers raise.
    """
    # First of all: a vault that was put back must not even release marks at the source.
    asked = ask_target(context, protection_id)
    protection = asked.protection
    if protection.state is State.RESYNC_PENDING:  # what the target knew better was adopted: it is compared in its turn
        raise TrackingLost(machine=protection.name, detail=protection.resync_reason)
    source = context.site(protection.source_site).source
    if protection.attempt:
        _sweep(source, protection)
    began = context.clock()
    try:
        result = _run(
            context, asked, source, watch, keep=keep, compare=compare, resend=resend or {}, after_seal=after_seal
        )
    except TargetFull:
        apply_retention(
            context, protection, watch
        )  # otherwise points past their age would hold the space that is missing
        raise
    _log_cycle(protection.name, result, context.clock() - began)
    # Not in a planned failover: the workload stands still meanwhile.
    tidy = result.point.kept and protection.state is not State.FAILING_OVER
    protection = context.vault.protection(protection_id)
    _sweep(source, protection)
    apply_retention(context, protection, watch, tidy=tidy)
    return result


def _log_cycle(machine: str, result: CycleResult, seconds: float) -> None:
    report(
        _log,
        logging.DEBUG,
        "cycle ended",
        machine=machine,
        mode=result.mode.value,
        point=result.point.id,
        consistency=result.point.consistency.value,
        read_bytes=result.counts.read,
        sent_bytes=result.counts.sent,
        seconds=seconds,
    )


def _run(
    context: Context,
    asked: Asked,
    source: driver.Source,
    watch: Watch,
    *,
    keep: bool,
    compare: bool,
    resend: Mapping[str, Sequence[Extent]],
    after_seal: AfterSeal | None,
) -> CycleResult:
    former = asked.before
    if asked.recorded is not None and former.pending is not None and former.state in _ENDED_BY_A_POINT:
        return CycleResult(asked.recorded, former.pending.mode, Counts(), resumed=True)
    # Else a point that was sealed before a crash shows that moment; what is asked for now is a view of now.
    return _Cycle(
        context, asked.protection, source, watch, keep, compare, resend, after_seal, asked.replica, asked.info
    ).run()


def apply_retention(context: Context, protection: Protection, watch: Watch, *, tidy: bool = False) -> None:
    """Delete the points that the policy no longer keeps, unless the clock is in doubt (`aging`), and never more than a
    share of all kept points at once. After a failure the next cycle tries again.

    With `tidy` the target is called even if there is none to delete: see `Replica.drop_points`.
    """
    vault, protection_id = context.vault, protection.id
    policy = vault.policy(protection.policy)
    now = context.aging.count(protection_id, policy.interval)
    due: list[RecoveryPoint] = []
    if now is not None and context.aging.watch():
        # Of thousands of points only those that may be deleted are read.
        due = retention.to_drop(vault.aging_points(protection_id, retention.cutoff(policy, now)), policy, now)
    if len(due) > 1:
        due = due[: retention.at_once(vault.kept_points(protection_id))]
    if due:
        vault.mark_dropping(protection_id, [point.id for point in due])
        reach("retention.marked")
    dropping = vault.dropping(protection_id)
    if not dropping and not tidy:
        return
    try:
        replica = context.site(protection.target_site).target.replica(protection.replica_id)
        replica.drop_points(dropping, protection.epoch, watch)
    except Cancelled:
        raise
    except AsrError as problem:
        _log.warning("%s: applying retention failed, the next cycle tries again: %s", protection.name, problem)
        return
    if not dropping:
        return
    reach("retention.dropped")
    vault.forget_points(protection_id, dropping)
    reach("retention.forgotten")


def _sweep(source: driver.Source, protection: Protection) -> None:
    """`release_left`, and never an error: what is left is released by a later call."""
    try:
        release_left(source, protection)
    except AsrError as problem:
        _log.warning("%s: releasing older marks failed, the next cycle tries again: %s", protection.name, problem)
    reach("cycle.marks-released")


def release_left(source: driver.Source, protection: Protection) -> None:
    """Release all marks but the recorded ones, and what a killed engine left at the source: views that it read from,
    and what they hold there. Without a recorded mark nothing is released before the next one is recorded: an empty
    list says that protection ends."""
    pending = protection.pending.view_mark if protection.pending else None
    if keep := [mark for mark in (protection.mark, pending) if mark is not None]:
        source.keep_marks(protection.source_machine, keep)


def _named(resend: Mapping[str, Sequence[Extent]]) -> dict[str, plan.DiskWork]:
    """What a source asks to be read again, as work; empty if nothing."""
    return {disk_id: plan.DiskWork(copy=tuple(union(extents))) for disk_id, extents in resend.items() if extents}


def _mode(protection: Protection) -> CycleMode:
    if protection.state in (State.RESYNCING, State.REVERSING):
        return CycleMode.COMPARE
    if protection.head_point is None:
        return CycleMode.COMPARE if protection.seed_machine else CycleMode.FULL
    return CycleMode.DELTA


def _is_same_view(pending: PendingCycle, view: driver.FrozenView, machine: driver.MachineView) -> bool:
    """Whether the view of the interrupted cycle is still frozen: a new one has another mark (`ViewRequest`). Without
    marks the driver's time tells, where that is this host's."""
    if pending.view_mark is not None:
        return machine.mark == pending.view_mark
    return abs(view.taken_at - pending.taken_at) < 1e-3


@attrs.define
class _Cycle:
    context: Context
    protection: Protection
    source: driver.Source
    watch: Watch
    keep: bool
    compare: bool
    resend: Mapping[str, Sequence[Extent]]
    after_seal: AfterSeal | None
    replica: driver.Replica
    info: driver.ReplicaInfo
    policy: Policy = attrs.field(init=False)
    started: float = attrs.field(init=False)
    taken_at: float = attrs.field(init=False)
    """The instant of the view by this engine's clock, as is `started`: no other host's clock is compared with it."""
    _ahead: float = attrs.field(init=False)
    """How far the clock was ahead of the monotonic one when these were read."""
    writers: ExitStack = attrs.field(factory=ExitStack, init=False)
    """Closed after the view: a target applies then what was sealed, and the source need not wait for that."""
    counts: Counts = attrs.field(factory=Counts, init=False)

    def __attrs_post_init__(self) -> None:
        self.started = self.taken_at = self.context.clock()
        self._ahead = self.started - self.context.elapsed()
        self.policy = self.context.vault.policy(self.protection.policy)

    # -- data path ---------------------------------------------------------------------------------------------------

    def run(self) -> CycleResult:
        mode = CycleMode.COMPARE if self.compare else _mode(self.protection)
        pending = self.protection.pending
        if pending is not None and (pending.mode is not mode or self.info.pending not in (None, pending.id)):
            self._give_up(pending)
            pending = None
        if pending is None and self.info.pending is not None:
            self._discard(self.info.pending)  # of a vault that was newer than this one: its view is not known here
        base = self._base(mode)
        since = pending.view_mark if pending else self.protection.mark
        cycle_id = pending.id if pending else new_id("c")
        request = driver.ViewRequest(self.protection.source_machine, cycle_id, since)
        asked = self._now()
        view = self.source.open_view(
            [request], consistency=self.policy.consistency, freeze_limit=self.policy.freeze_limit
        )
        with self.writers, view:
            reach("cycle.view-opened")
            # Of an interrupted cycle it may be the former view, settled since: as early as that was opened.
            self._stamp(asked if pending is None else min(asked, pending.taken_at), view.taken_at)
            machine = view.machines[self.protection.source_machine]
            if tuple(machine.notices) != self.protection.notices:
                self.context.vault.update(self.protection.id, notices=tuple(machine.notices))
            facts = self._facts(machine)
            try:
                if pending is None:
                    result, sealed = self._fresh(cycle_id, mode, base, view, machine, facts)
                else:
                    result, sealed = self._resume(pending, base, view, machine, facts)
            except plan.ResyncDue as due:
                self.writers.close()
                if self.protection.pending is not None:
                    self._give_up(self.protection.pending)
                if self.protection.state is State.PROTECTED:
                    self.context.vault.transition(self.protection.id, Event.LOSE_TRACKING, resync_reason=due.reason)
                raise TrackingLost(machine=self.protection.name, detail=due.reason) from due
            if self.after_seal is not None:
                self.after_seal(machine, self.replica, sealed)
        reach("cycle.view-closed")
        return result

    def _base(self, mode: CycleMode) -> str | None:
        """The point the cycle builds on. A comparison builds on whatever is there; a delta must agree with it."""
        if mode is CycleMode.DELTA and self.info.head != self.protection.head_point:
            raise StaleBase(
                replica=self.protection.name, head=self.info.head, base=self.protection.head_point or "nothing"
            )
        return self.info.head

    def _facts(self, machine: driver.MachineView) -> dict[str, plan.DiskFacts]:
        return {
            disk_id: plan.DiskFacts(disk_id, view.disk.size, view.tracking, view.reason, self.info.disks.get(disk_id))
            for disk_id, view in machine.disks.items()
        }

    def _fresh(
        self,
        cycle_id: str,
        mode: CycleMode,
        base: str | None,
        view: driver.FrozenView,
        machine: driver.MachineView,
        facts: Mapping[str, plan.DiskFacts],
    ) -> tuple[CycleResult, PendingCycle]:
        work = {disk_id: self._plan(fact, mode, machine.disks[disk_id]) for disk_id, fact in facts.items()}
        pending = PendingCycle(
            id=cycle_id,
            point_id=new_id("p"),
            mode=mode,
            base_point=base,
            taken_at=self.taken_at,
            view_mark=machine.mark,
            plan={disk_id: item.plan for disk_id, item in work.items()},
        )
        self.context.vault.begin_cycle(self.protection.id, pending, epoch=self.protection.epoch)
        reach("cycle.begun")
        writer = self._open(pending, machine)
        self._transfer(work, machine, writer)
        return self._seal(pending, view, machine, writer, resumed=False)

    def _plan(self, fact: plan.DiskFacts, mode: CycleMode, view: driver.DiskView) -> plan.DiskWork:
        method = plan.method_of(fact, mode)
        extents: Sequence[Extent] = ()
        if method is plan.Method.CHANGES:
            extents = view.changed()
        elif method is plan.Method.ALL:
            extents = view.allocated()
        work = plan.work_of(fact, method, extents, self.policy.resync_threshold)
        return plan.work_with(work, fact.size, self.resend.get(fact.id, ()))

    def _resume(
        self,
        pending: PendingCycle,
        base: str | None,
        view: driver.FrozenView,
        machine: driver.MachineView,
        facts: Mapping[str, plan.DiskFacts],
    ) -> tuple[CycleResult, PendingCycle]:
        reopened = _is_same_view(pending, view, machine)
        if reopened:
            self.taken_at = pending.taken_at
        first: dict[str, plan.DiskWork] = {}
        rest: dict[str, plan.DiskWork] = {}
        writer = self._open(pending, machine)
        for disk_id, fact in facts.items():
            planned = pending.plan.get(disk_id)
            if planned is None:
                first[disk_id] = plan.DiskWork()
                rest[disk_id] = self._plan(fact, pending.mode, machine.disks[disk_id])
                continue
            first[disk_id], left = plan.work_resumed(
                fact,
                pending.mode,
                planned=planned,
                done=writer.done(disk_id),
                changed=() if reopened else self._changed(fact, pending.mode, machine.disks[disk_id]),
            )
            rest[disk_id] = plan.work_with(left, fact.size, self.resend.get(disk_id, ()))
        if not reopened:
            # Until these are durable the cycle counts as reading from the interrupted view: its mark is kept.
            self._transfer(first, machine, writer)
            writer.flush()
            reach("cycle.caught-up")
            pending = attrs.evolve(
                pending,
                taken_at=self.taken_at,
                view_mark=machine.mark,
                base_point=base,
                plan={
                    disk_id: tuple(union([*first[disk_id].plan, *pending.plan.get(disk_id, rest[disk_id].plan)]))
                    for disk_id in facts
                },
            )
            self.context.vault.replan_cycle(self.protection.id, pending, epoch=self.protection.epoch)
            reach("cycle.replanned")
        self._transfer(rest, machine, writer)
        return self._seal(pending, view, machine, writer, resumed=True)

    def _changed(self, fact: plan.DiskFacts, mode: CycleMode, view: driver.DiskView) -> Sequence[Extent] | None:
        """What changed since the interrupted view; None where it is not known and comparing is in order."""
        if fact.tracking is driver.Tracking.CHANGED:
            return view.changed()
        if fact.at_target is None:
            return view.allocated()  # all of it again, zeroes too: the interrupted copy may have put data there
        if fact.tracking is driver.Tracking.LOST and mode is CycleMode.DELTA:
            raise plan.ResyncDue(f"disk {fact.id}: {fact.reason or 'its change log is lost'}")
        return None

    def _open(self, pending: PendingCycle, machine: driver.MachineView) -> driver.CycleWriter:
        spec = driver.CycleSpec(
            cycle_id=pending.id,
            epoch=self.protection.epoch,
            base_point=pending.base_point,
            disks={disk_id: view.disk.size for disk_id, view in machine.disks.items()},
        )
        writer = self.writers.enter_context(self.replica.open_cycle(spec))
        reach("cycle.opened")
        return writer

    def _transfer(
        self, work: Mapping[str, plan.DiskWork], machine: driver.MachineView, writer: driver.CycleWriter
    ) -> None:
        self.watch.start("copying", plan.total_bytes(work))
        recorded = self.replica.from_records() if any(item.compare for item in work.values()) else self.replica
        for disk_id, item in work.items():
            if not item.bytes:
                continue
            throttle = self.context.throttle(self.policy)
            transfer = Transfer(machine.disks[disk_id], writer, self.counts, self.watch, throttle)
            try:
                transfer.copy(item.copy)
                if item.compare:
                    # What the replica has recorded of its content is not read: that `verify` and the scrub do.
                    transfer.compare(item.compare, recorded, self.info.disks.get(disk_id, 0))
            except BaseException:
                # What has arrived is not sent again: a cut link or a cancelled copy costs nothing but time.
                with suppress(AsrError):
                    writer.flush()
                raise
            reach("cycle.disk-copied")

    def _seal(
        self,
        pending: PendingCycle,
        view: driver.FrozenView,
        machine: driver.MachineView,
        writer: driver.CycleWriter,
        *,
        resumed: bool,
    ) -> tuple[CycleResult, PendingCycle]:
        self.watch.check()
        writer.flush()
        pending = self._settle(pending, view, machine, writer)
        view.confirm()
        reach("cycle.confirmed")
        stored = writer.seal(
            driver.SealSpec(
                point_id=pending.point_id,
                taken_at=self.taken_at,
                consistency=machine.consistency,
                keep=self.keep or self._point_is_due(self.taken_at),
                description=machine.description,
            )
        )
        reach("cycle.sealed")
        point = record_sealed(
            self.context,
            self.protection,
            pending,
            stored,
            self.counts,
            interval=self.policy.interval,
            started=self.started,
            ahead=self._ahead,
        )
        reach("cycle.recorded")
        return CycleResult(point, pending.mode, self.counts, resumed, machine.halted), pending

    def _settle(
        self,
        pending: PendingCycle,
        view: driver.FrozenView,
        machine: driver.MachineView,
        writer: driver.CycleWriter,
    ) -> PendingCycle:
        """Read again what the source could not hold still, and record the instant that it then shows."""
        while True:
            asked, shown = self._now(), (view.taken_at, machine.mark)
            resend = _named(view.settle().get(self.protection.source_machine, {}))
            if (view.taken_at, machine.mark) != shown:
                self._stamp(asked, view.taken_at)
            if not resend:
                break
            self._transfer(resend, machine, writer)
            writer.flush()
            reach("cycle.settling")
        self._now()
        if machine.mark != pending.view_mark or self.taken_at != pending.taken_at:
            pending = attrs.evolve(pending, view_mark=machine.mark, taken_at=self.taken_at)
            self.context.vault.replan_cycle(self.protection.id, pending, epoch=self.protection.epoch)
        return pending

    def _stamp(self, asked: float, shown: float) -> None:
        """The view shows an instant since `asked`. A driver that has this host's clock says which (`shown`); what lies
        outside of the call comes from another clock, and then the instant counts as early as it can have been."""
        self.taken_at = shown if asked <= shown <= self.context.clock() else asked

    def _now(self) -> float:
        """By the engine's clock. Where it was set during the cycle, earlier instants are moved with it."""
        now = self.context.clock()
        ahead = now - self.context.elapsed()
        if abs(moved := ahead - self._ahead) > CLOCK_TOLERANCE:
            self.taken_at, self.started, self._ahead = self.taken_at + moved, self.started + moved, ahead
        return now

    def _point_is_due(self, taken_at: float) -> bool:
        return retention.point_due(self.policy, self.context.vault.last_kept_at(self.protection.id), taken_at)

    def _give_up(self, pending: PendingCycle) -> None:
        """Discard an interrupted cycle that cannot be resumed."""
        self.info = self.replica.info()
        if self.info.pending == pending.id:
            self._discard(pending.id)
        self.context.vault.abandon_cycle(self.protection.id, pending.id, epoch=self.protection.epoch)
        self.protection = self.context.vault.protection(self.protection.id)
        self.info = self.replica.info()

    def _discard(self, cycle_id: str) -> None:
        """Delete what a cycle has brought to the target."""
        spec = driver.CycleSpec(cycle_id, self.protection.epoch, self.info.head, self.info.disks)
        with self.replica.open_cycle(spec) as writer:
            writer.discard()
        self.info = self.replica.info()
