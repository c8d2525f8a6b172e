"""Planned and unplanned failover.

The state table says what is true between the steps. The result of each step is durable, so a killed job resumes at
the step it was in. The epoch is raised first: from then on no writer with an older epoch can write to the replica.

Nothing is taken from the source before the target can give. Before the failover begins, the target reads the replica
and the point and says that it can make and start the machine. The source is quarantined only once that machine is
defined. A failure before that takes the failover back; in a planned failover also a failure to start.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import AsrError, DriverFailed, NoPlannedFailover, PointNotFound, TargetNotReady, TrackingLost
from asrcore.model.epoch import next_generation, shown
from asrcore.model.event import FailoverKind
from asrcore.model.finding import Severity
from asrcore.model.health import rpo
from asrcore.model.machine import PowerState
from asrcore.model.protection import Protection
from asrcore.model.state import Event, State, allowed
from asrcore.model.watch import Watch
from asrcore.procedures.examine import check_point, whole_point
from asrcore.procedures.give_back import (
    NO_FAILURE_OF_A_SITE,
    clean_target,
    finish_undo,
    release_source,
    runs_at_target,
    source_was_stopped,
    try_undo,
)
from asrcore.procedures.points import check_planned
from asrcore.procedures.procedure import Procedure, Step, Work
from asrcore.procedures.steps import commanded, fence_source, note_repairs, refused
from asrcore.replication.agreement import ask_target
from asrcore.replication.cycle import run_cycle

__all__ = ["PLANNED", "UNPLANNED"]

_log = logging.getLogger(__name__)

# An unplanned failover must not wait long for a site that is probably lost; quarantine is then due (`fence_due`).
FENCE_PATIENCE = 5.0

_TAKING_BACK = "taking_back"
"""The fact of a job that the failover is being taken back, and why."""


def _planned_begin(work: Work) -> None:
    protection = work.protection
    source = work.context.site(protection.source_site)
    # Refused before anything is changed (F3 in docs/reference/site-recovery-map.md).
    if driver.Capability.POWER not in source.status().capabilities:
        raise NoPlannedFailover(machine=protection.name, driver=source.driver)
    allowed(protection.name, protection.state, Event.FAIL_OVER)
    check_planned(protection)
    finish_undo(work.context, protection.id)
    protection = ask_target(work.context, protection.id, at_once=True).protection
    if protection.head_point is not None:
        check_point(work, protection.head_point)
    _check_target(work, protection.head_point)
    if protection.state is not State.FAILING_OVER:  # else an earlier attempt has stopped it
        running = source.inventory.machine(protection.source_machine).power is not PowerState.OFF
        work.facts["source_was_running"] = running
        work.save()
    _begin_failover(work, FailoverKind.PLANNED, failover_point=protection.head_point, planned=True)


def _unplanned_begin(work: Work) -> None:
    protection = work.protection
    allowed(protection.name, protection.state, Event.FAIL_OVER)
    if protection.undo_due:
        left, unreleased = try_undo(work.context, protection)
        if left is not None:
            raise left  # what the machine wrote after the former failover would be in this one
        if unreleased is not None:  # the source is lost; it must not be forgotten if this failover is taken back
            work.facts["source_to_start"] = not work.protection.fence_due
            work.save()
    if protection.state is State.FAILING_OVER and source_was_stopped(work.context, protection, work.job_id):
        work.facts["source_to_start"] = True  # if this failover is taken back or undone
        work.save()
    protection = ask_target(work.context, protection.id, at_once=True).protection
    point = whole_point(work)
    _check_target(work, point.id)
    _begin_failover(work, FailoverKind.UNPLANNED, failover_point=point.id, planned=False)
    lost = rpo(point, work.context.clock())
    work.facts["seconds_lost"] = None if lost is None else round(lost, 3)


def _check_target(work: Work, point_id: str | None) -> None:
    """Let the target read the replica and say that it can make and start the machine."""
    protection = work.protection
    spec = _spec(protection, point_id, next_generation(protection.epoch))
    try:
        found = work.context.site(protection.target_site).target.failover_findings(spec)
    except PointNotFound:
        raise PointNotFound(machine=protection.name, point=spec.point_id) from None
    errors = [item for item in found if item.severity is Severity.ERROR]
    if not errors:
        return
    lines = "; ".join(f"[{item.code}] {item.what} ({item.action})" for item in errors)
    if not work.arguments.force:
        raise TargetNotReady(machine=protection.name, site=protection.target_site, findings=lines)
    work.facts["forced"] = [item.code for item in errors]
    work.note("failover", f"forced in spite of: {lines}")


def _spec(protection: Protection, point_id: str | None, epoch: int) -> driver.PromoteSpec:
    if point_id is None:
        raise AssertionError("a failover has a point")
    return driver.PromoteSpec(
        replica_id=protection.replica_id, point_id=point_id, epoch=epoch, networks=protection.networks
    )


def _begin_failover(work: Work, kind: FailoverKind, *, failover_point: str | None, planned: bool) -> None:
    vault, protection = work.context.vault, work.protection
    allowed(protection.name, protection.state, Event.FAIL_OVER)
    work.context.plugins.before_failover(protection, kind)
    begins = protection.state is not State.FAILING_OVER  # else it is repeated, and may have a machine at the target
    protection = vault.transition(
        protection.id,
        Event.FAIL_OVER,
        epoch=next_generation(protection.epoch),
        failover_point=failover_point,
        planned=planned,
        target_machine=None if begins else protection.target_machine,
        fence_due=not begins and protection.fence_due,
    )
    reach("failover.begun")
    work.facts["started_at"] = work.context.clock()
    work.note("failover", f"{kind.value} failover to {protection.target_site} started, epoch {shown(protection.epoch)}")


def _or_back(run: Callable[[Work], None], *, cleans: bool = False) -> Callable[[Work], None]:
    """A step whose failure or cancellation takes the failover back. `cleans`: it may have made something at the
    target."""

    @functools.wraps(run)
    def step(work: Work) -> None:
        protection = work.protection
        if (failed := work.facts.get(_TAKING_BACK)) is not None:
            # It was killed while it took the failover back. The source may run and write again, so what failed before
            # must not be tried again: it could succeed now.
            problem = DriverFailed(operation="the failover", site=protection.target_site, detail=str(failed))
            if protection.state is State.FAILING_OVER:
                _take_back(work, problem, cleans=cleans)
            raise problem
        allowed(protection.name, protection.state, Event.FAILED_OVER)
        try:
            if _can_be_taken_back(protection):
                work.watch.check()
            run(work)
        except NO_FAILURE_OF_A_SITE:
            raise
        except Exception as problem:
            _take_back(work, problem, cleans=cleans)
            raise

    return step


def _can_be_taken_back(protection: Protection) -> bool:
    """Not once an unplanned failover has a machine at the target: its source may be quarantined at any time."""
    return protection.planned or protection.target_machine is None


def _take_back(work: Work, problem: Exception, *, cleans: bool) -> None:
    """The target cannot give: the machine stays at its source, as it was before the failover.

    Not if the machine may run at the target, nor if an unplanned failover has taken the source already: then a person
    decides, and health says how.
    """
    context, protection = work.context, work.protection
    if not _can_be_taken_back(protection):
        return
    work.facts[_TAKING_BACK] = str(problem)
    work.save()  # the decision, before anything is cleaned up or released
    left = clean_target(context, protection) if cleans or protection.target_machine is not None else None
    if left is not None and runs_at_target(context, protection) is not False:
        work.note("failover", f"failed and not taken back, the machine may run at {protection.target_site}: {problem}")
        return
    start = protection.planned and bool(work.facts.get("source_was_running", True))
    if protection.planned:
        # Before the source is released: the service must not quarantine it any more, and if this is killed and the
        # target is lost then, the machine that is deleted there must not count as one that may run.
        remains = protection.target_machine if left is not None else None
        context.vault.update(protection.id, target_machine=remains, fence_due=False)
    unreleased = release_source(context, protection, start=start) if protection.planned else None
    owed = {place: str(why) for place, why in (("target", left), ("source", unreleased)) if why is not None}
    if "source_to_start" in work.facts:
        start = bool(work.facts["source_to_start"])
        owed["source"] = "it is not released since the failover before this one"
    context.vault.transition(
        protection.id,
        Event.ABORT_FAILOVER,
        failover_point=protection.failover_point if owed else None,
        target_machine=(protection.target_machine or protection.source_machine) if owed else None,
        fence_due=bool(owed) and not (start and "source" in owed),
    )
    reach("failover.aborted")
    work.facts.update(owed)
    work.note("failover", "aborted; the machine stays at its source" + "".join(f"; {why}" for why in owed.values()))


def _take_replica(work: Work) -> None:
    protection = work.protection
    target = work.context.site(protection.target_site)
    target.target.replica(protection.replica_id).raise_epoch(protection.epoch)
    reach("failover.epoch-raised")


def _stop_source(work: Work) -> None:
    ask_target(work.context, work.protection_id)
    inventory = commanded(work, work.protection.source_site)
    inventory.power_off(
        work.protection.source_machine, graceful=not work.arguments.force_off, timeout=work.arguments.timeout
    )
    reach("failover.source-stopped")


def _last_delta(work: Work) -> None:
    protection = work.protection
    if protection.target_machine is not None:
        return
    try:
        result = run_cycle(work.context, protection.id, work.watch, keep=True)
    except TrackingLost:
        # Nothing may be lost, so what is not known to be equal is compared, however long it takes.
        result = run_cycle(work.context, protection.id, work.watch, keep=True, compare=True)
    work.context.vault.update(protection.id, failover_point=result.point.id)
    work.facts.update(point=result.point.id, last_delta_bytes=result.counts.sent)
    reach("failover.last-delta")


def _fence_planned(work: Work) -> None:
    """The source is stopped, and all it had is at the target: a fence that fails now is owed."""
    try:
        fence_source(work)
    except NO_FAILURE_OF_A_SITE:
        raise
    except Exception as problem:  # noqa: BLE001 - also a driver's defect must not take the failover back now
        _log_defect(work, problem)
        work.context.vault.update(work.protection_id, fence_due=True, error=refused(work.protection, problem))
        _owe_fence(work, str(problem))


def _fence_unplanned(work: Work) -> None:
    """Fence a source that can still be reached; do not wait for one that cannot."""
    done = threading.Event()
    problems: list[Exception] = []

    def attempt() -> None:
        try:
            fence_source(work)
        except Exception as problem:  # noqa: BLE001 - also a driver's defect leaves the fence owed
            _log_defect(work, problem)
            problems.append(problem)
        finally:
            done.set()

    threading.Thread(target=attempt, name="fence", daemon=True).start()
    if not done.wait(FENCE_PATIENCE):
        _owe_fence(work, f"no answer within {FENCE_PATIENCE:g} seconds")
    elif problems:
        if isinstance(problems[0], NO_FAILURE_OF_A_SITE):
            raise problems[0]
        work.context.vault.update(work.protection_id, error=refused(work.protection, problems[0]))
        _owe_fence(work, str(problems[0]))


def _log_defect(work: Work, problem: Exception) -> None:
    if not isinstance(problem, AsrError):
        _log.error("%s: the quarantine failed unexpectedly", work.protection.name, exc_info=problem)


def _owe_fence(work: Work, detail: str) -> None:
    work.facts["fence"] = f"owed: {detail}"
    work.note("quarantine", f"pending until the site answers: {detail}")


def _promote(work: Work) -> None:
    protection = work.protection
    spec = _spec(protection, protection.failover_point, protection.epoch)
    watch = work.watch if _can_be_taken_back(protection) else Watch()  # which cannot be cancelled
    instance = work.context.site(protection.target_site).failover.promote(spec, watch)
    reach("failover.promoted")
    # From now on there is a machine at the target: the source of an unplanned failover must not run any more.
    fence_due = protection.fence_due or not protection.planned
    work.context.vault.update(protection.id, target_machine=instance.machine_id, fence_due=fence_due)
    work.facts.update(machine=instance.name, machine_id=instance.machine_id, point=spec.point_id)
    note_repairs(work, instance)


def _start(work: Work) -> None:
    protection = work.protection
    if protection.target_machine is None:
        raise AssertionError("a machine was promoted")
    commanded(work, protection.target_site).power_on(protection.target_machine)
    reach("failover.started")


def _finish(work: Work) -> None:
    protection = work.protection
    if protection.state is State.FAILING_OVER:
        protection = work.context.vault.transition(protection.id, Event.FAILED_OVER)
    reach("failover.finished")
    started = work.facts.get("started_at")
    if isinstance(started, float) and started <= work.context.clock():  # else the clock went back meanwhile
        work.facts["rto_seconds"] = round(work.context.clock() - started, 3)
    kind = FailoverKind.PLANNED if protection.planned else FailoverKind.UNPLANNED
    work.context.plugins.after_failover(protection, kind)
    work.note("failover", f"runs at {protection.target_site} from point {protection.failover_point}; commit pending")


PLANNED = Procedure(
    "failover-planned",
    (
        Step("begin", _planned_begin),
        Step("take-replica", _or_back(_take_replica), checks_itself=True),
        Step("stop-source", _or_back(_stop_source), checks_itself=True),
        Step("last-delta", _or_back(_last_delta), checks_itself=True),
        Step("promote", _or_back(_promote, cleans=True), checks_itself=True),
        Step("fence-source", _or_back(_fence_planned, cleans=True), checks_itself=True),
        Step("start", _or_back(_start, cleans=True), checks_itself=True),
        Step("finish", _finish, checks_itself=True),
    ),
)
UNPLANNED = Procedure(
    "failover-unplanned",
    (
        Step("begin", _unplanned_begin),
        Step("take-replica", _or_back(_take_replica), checks_itself=True),
        Step("promote", _or_back(_promote, cleans=True), checks_itself=True),
        # From here on it cannot be taken back: a cancelled job ends it.
        Step("fence-source", _fence_unplanned, checks_itself=True),
        Step("start", _start, checks_itself=True),
        Step("finish", _finish, checks_itself=True),
    ),
    preempts=True,
)
