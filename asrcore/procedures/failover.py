"""Planned and unplanned failover.

The state table says what is true between the steps. The result of each step is durable, so a killed job resumes at
the step it was in. The epoch is raised first: from then on no writer with an older epoch can write to the replica.
"""

from __future__ import annotations

import logging
import threading

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import AsrError, NoPlannedFailover, TrackingLost
from asrcore.model.event import FailoverKind
from asrcore.model.protection import Protection
from asrcore.model.state import Event, State, allowed
from asrcore.procedures.points import choose_point
from asrcore.procedures.procedure import Procedure, Step, Work
from asrcore.procedures.steps import commanded, fence_source, note_repairs
from asrcore.replication.cycle import run_cycle
from asrcore.replication.record import adopt_sealed

__all__ = ["PLANNED", "UNPLANNED"]

_log = logging.getLogger(__name__)

# An unplanned failover must not wait long for a site that is probably lost; quarantine is then due (`fence_due`).
FENCE_PATIENCE = 5.0


def _planned_begin(work: Work) -> None:
    protection = work.protection
    source = work.context.site(protection.source_site)
    # Refused before anything is changed (F3 in docs/reference/site-recovery-map.md).
    if driver.Capability.POWER not in source.status().capabilities:
        raise NoPlannedFailover(machine=protection.name, driver=source.driver)
    _begin_failover(work, FailoverKind.PLANNED, failover_point=protection.head_point, planned=True)


def _unplanned_begin(work: Work) -> None:
    protection = work.protection
    allowed(protection.name, protection.state, Event.FAIL_OVER)
    adopt_sealed(work.context, protection)
    point = choose_point(work.context.vault.points(protection.id), work.arguments.point, protection.name)
    _begin_failover(work, FailoverKind.UNPLANNED, failover_point=point.id, planned=False)
    work.facts["seconds_lost"] = round(work.context.clock() - point.taken_at, 3)


def _begin_failover(work: Work, kind: FailoverKind, *, failover_point: str | None, planned: bool) -> None:
    vault, protection = work.context.vault, work.protection
    allowed(protection.name, protection.state, Event.FAIL_OVER)
    work.context.plugins.before_failover(protection, kind)
    protection = vault.transition(
        protection.id,
        Event.FAIL_OVER,
        epoch=protection.epoch + 1,
        failover_point=failover_point,
        planned=planned,
        fence_due=not planned,
    )
    reach("failover.begun")
    work.facts["started_at"] = work.context.clock()
    work.note("failover", f"{kind.value} failover to {protection.target_site} started, epoch {protection.epoch}")


def _take_replica(work: Work) -> None:
    protection = work.protection
    target = work.context.site(protection.target_site)
    target.target.replica(protection.replica_id).raise_epoch(protection.epoch)
    reach("failover.epoch-raised")


def _stop_source(work: Work) -> None:
    protection = work.protection
    _check_not_aborted(protection)
    inventory = commanded(work, protection.source_site)
    try:
        inventory.power_off(
            protection.source_machine, graceful=not work.arguments.force_off, timeout=work.arguments.timeout
        )
    except AsrError:
        _abort(work)
        raise
    reach("failover.source-stopped")


def _last_delta(work: Work) -> None:
    protection = work.protection
    _check_not_aborted(protection)
    if protection.target_machine is not None:
        return
    try:
        try:
            result = run_cycle(work.context, protection.id, work.watch, keep=True)
        except TrackingLost:
            # Nothing may be lost, so what is not known to be equal is compared, however long it takes.
            result = run_cycle(work.context, protection.id, work.watch, keep=True, compare=True)
    except AsrError:
        _abort(work)
        raise
    work.context.vault.update(protection.id, failover_point=result.point.id)
    work.facts.update(point=result.point.id, last_delta_bytes=result.counts.sent)
    reach("failover.last-delta")


def _abort(work: Work) -> None:
    """Abort a planned failover before anything was moved: the source continues to run."""
    protection = work.protection
    # Started first: killed before the record, the step is run again and stops it again.
    try:
        commanded(work, protection.source_site).power_on(protection.source_machine)
    except AsrError as problem:
        _log.error("%s could not be started again at its source: %s", protection.name, problem)
    work.context.vault.transition(work.protection_id, Event.ABORT_FAILOVER, failover_point=None)
    reach("failover.aborted")
    work.note("failover", "aborted; the machine stays at its source")


def _check_not_aborted(protection: Protection) -> None:
    """A step that was killed right after it aborted the failover is run again: the failover stays aborted."""
    allowed(protection.name, protection.state, Event.FAILED_OVER)


def _fence_planned(work: Work) -> None:
    fence_source(work)


def _fence_unplanned(work: Work) -> None:
    """Fence a source that can still be reached; do not wait for one that cannot."""
    done = threading.Event()
    problems: list[AsrError] = []

    def attempt() -> None:
        try:
            fence_source(work)
        except AsrError as problem:
            problems.append(problem)
        finally:
            done.set()

    threading.Thread(target=attempt, name="fence", daemon=True).start()
    if not done.wait(FENCE_PATIENCE) or problems:
        detail = str(problems[0]) if problems else f"no answer within {FENCE_PATIENCE:g} seconds"
        work.facts["fence"] = f"owed: {detail}"
        work.note("quarantine", f"pending until the site answers: {detail}")


def _promote(work: Work) -> None:
    protection = work.protection
    if protection.failover_point is None:
        raise AssertionError("a failover has a point")
    spec = driver.PromoteSpec(
        replica_id=protection.replica_id,
        point_id=protection.failover_point,
        epoch=protection.epoch,
        networks=protection.networks,
    )
    instance = work.context.site(protection.target_site).failover.promote(spec, work.watch)
    reach("failover.promoted")
    work.context.vault.update(protection.id, target_machine=instance.machine_id)
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
    if isinstance(started, float):
        work.facts["rto_seconds"] = round(work.context.clock() - started, 3)
    kind = FailoverKind.PLANNED if protection.planned else FailoverKind.UNPLANNED
    work.context.plugins.after_failover(protection, kind)
    work.note("failover", f"runs at {protection.target_site} from point {protection.failover_point}; commit pending")


PLANNED = Procedure(
    "failover-planned",
    (
        Step("begin", _planned_begin),
        Step("take-replica", _take_replica),
        Step("stop-source", _stop_source),
        Step("last-delta", _last_delta),
        Step("fence-source", _fence_planned),
        Step("promote", _promote),
        Step("start", _start),
        Step("finish", _finish),
    ),
)
UNPLANNED = Procedure(
    "failover-unplanned",
    (
        Step("begin", _unplanned_begin),
        Step("take-replica", _take_replica),
        Step("fence-source", _fence_unplanned),
        Step("promote", _promote),
        Step("start", _start),
        Step("finish", _finish),
    ),
    preempts=True,
)
