"""The steps of failing over, as procedures.

What is true between the steps is written in the state table; what each step leaves behind is durable, so a killed
job goes on at the step it was in. The epoch is raised first: from then on nothing older can write to the replica.
"""

from __future__ import annotations

import logging
import threading

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import AsrError, NoPlannedFailover, PointNotFound, TrackingLost
from asrcore.failover.choose import choose_point
from asrcore.model.event import FailoverKind
from asrcore.model.machine import PowerState
from asrcore.model.protection import Protection, TestRun
from asrcore.model.state import Event, State, allowed
from asrcore.replication.cycle import run_cycle
from asrcore.replication.procedure import Holds, Procedure, Step, Work
from asrcore.replication.record import adopt_sealed

__all__ = ["CLEANUP", "COMMIT", "PLANNED", "TEST", "UNDO", "UNPLANNED", "fence_source"]

_log = logging.getLogger(__name__)

# An unplanned failover must not wait long for a site that is probably lost; fencing is then owed (`fence_due`).
FENCE_PATIENCE = 5.0


# -- test failover -------------------------------------------------------------------------------------------


def _test_begin(work: Work) -> None:
    protection = work.protection
    allowed(protection.name, protection.state, Event.TEST)
    if protection.test is not None and protection.test.id == work.job_id:
        return
    _cleanup_stop(work)  # one test at a time: a new one takes the place of the former
    adopt_sealed(work.context, protection)
    point = choose_point(work.context.vault.points(protection.id), work.arguments.point, protection.name)
    work.context.plugins.before_failover(protection, FailoverKind.TEST)
    run = TestRun(id=work.job_id, point_id=point.id, machine_id="", started_at=work.context.clock())
    work.context.vault.update(protection.id, test=run)


def _test_start(work: Work) -> None:
    protection = work.protection
    run = protection.test
    if run is None:
        raise AssertionError("a test was begun")
    try:
        instance = _run_test(work, run)
    except PointNotFound:
        if work.arguments.point != "latest":
            raise
        # A cycle was sealed just now and took the place of the latest state: then that is the latest.
        point = choose_point(work.context.vault.points(protection.id), "latest", protection.name)
        run = TestRun(id=run.id, point_id=point.id, machine_id="", started_at=run.started_at)
        work.context.vault.update(protection.id, test=run)
        instance = _run_test(work, run)
    reach("test.started")
    now = work.context.clock()
    run = TestRun(id=run.id, point_id=run.point_id, machine_id=instance.machine_id, started_at=run.started_at)
    work.context.vault.update(protection.id, test=run, last_test_at=now)
    work.context.plugins.after_failover(work.protection, FailoverKind.TEST)
    work.facts.update(machine=instance.name, machine_id=instance.machine_id, point=run.point_id)
    work.facts["seconds"] = round(now - run.started_at, 3)
    _note_repairs(work, instance)
    work.note("test", f"point {run.point_id} runs as {instance.name}")


def _note_repairs(work: Work, instance: driver.Instance) -> None:
    if instance.repairs:
        work.facts["repairs"] = list(instance.repairs)
    for repair in instance.repairs:
        work.note("repair", repair)


def _run_test(work: Work, run: TestRun) -> driver.Instance:
    protection = work.protection
    spec = driver.TestSpec(
        test_id=run.id,
        replica_id=protection.replica_id,
        point_id=run.point_id,
        name=f"{protection.name}-test",
        network=work.arguments.network,
    )
    return work.context.site(protection.target_site).failover.start_test(spec, work.watch)


def _cleanup_stop(work: Work) -> None:
    """Everything of every test goes, also what a killed one left."""
    protection = work.protection
    failover = work.context.site(protection.target_site).failover
    left = set(failover.tests(protection.replica_id))
    if protection.test is not None:
        left.add(protection.test.id)
    for test_id in sorted(left):
        failover.stop_test(protection.replica_id, test_id)
    reach("test.stopped")
    if protection.test is not None:
        work.context.vault.update(protection.id, test=None)
        work.note("test", "cleaned up")


# -- planned and unplanned failover --------------------------------------------------------------------------


def _planned_begin(work: Work) -> None:
    protection = work.protection
    source = work.context.site(protection.source_site)
    if driver.Capability.POWER not in source.status().capabilities:  # F3: refused before anything is changed
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
    work.note("failover", f"{kind.value} failover to {protection.target_site} began, epoch {protection.epoch}")


def _take_replica(work: Work) -> None:
    protection = work.protection
    target = work.context.site(protection.target_site)
    target.target.replica(protection.replica_id).raise_epoch(protection.epoch)
    reach("failover.epoch-raised")


def _commanded(work: Work, site: str) -> driver.Inventory:
    """To switch the machine on or off at a site. Such a command carries no epoch, so whose machine it is is looked up
    last, when the connection stands. Raises NotAssigned."""
    inventory = work.context.site(site).inventory
    work.context.vault.check_assigned(work.protection)
    return inventory


def _stop_source(work: Work) -> None:
    protection = work.protection
    _check_not_aborted(protection)
    inventory = _commanded(work, protection.source_site)
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
            # Nothing may be lost, so what cannot be told is compared, however long it takes.
            result = run_cycle(work.context, protection.id, work.watch, keep=True, compare=True)
    except AsrError:
        _abort(work)
        raise
    work.context.vault.update(protection.id, failover_point=result.point.id)
    work.facts.update(point=result.point.id, last_delta_bytes=result.counts.sent)
    reach("failover.last-delta")


def _abort(work: Work) -> None:
    """Take a planned failover back before anything was moved: the source goes on."""
    protection = work.protection
    # Started first: killed before the record, the step is run again and stops it again.
    try:
        _commanded(work, protection.source_site).power_on(protection.source_machine)
    except AsrError as problem:
        _log.error("%s could not be started again at its source: %s", protection.name, problem)
    work.context.vault.transition(work.protection_id, Event.ABORT_FAILOVER, failover_point=None)
    reach("failover.aborted")
    work.note("failover", "aborted; the machine stays where it was")


def _check_not_aborted(protection: Protection) -> None:
    """A step that was killed right after it had taken the failover back is run again: it stays taken back."""
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
        work.note("quarantine", f"owed until the site answers: {detail}")


def fence_source(work: Work) -> None:
    """Quarantine the machine at the site that it was taken from."""
    protection = work.protection
    reason = f"failed over to {protection.target_site}"
    inventory = work.context.site(protection.source_site).inventory
    if work.protection.epoch != protection.epoch:
        return  # connecting took so long that the machine was given back meanwhile
    inventory.fence(protection.source_machine, driver.Fence(protection.epoch, reason))
    reach("failover.fenced")
    work.context.vault.update(protection.id, fence_due=False)
    work.facts["fence"] = "done"
    work.note("quarantine", f"the machine at {protection.source_site} is quarantined")


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
    _note_repairs(work, instance)


def _start(work: Work) -> None:
    protection = work.protection
    if protection.target_machine is None:
        raise AssertionError("a machine was promoted")
    _commanded(work, protection.target_site).power_on(protection.target_machine)
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


# -- undo and commit -----------------------------------------------------------------------------------------


def _undo_begin(work: Work) -> None:
    protection = work.protection
    work.context.vault.transition(protection.id, Event.UNDO, epoch=protection.epoch + 1)
    reach("undo.begun")


def _undo_remove(work: Work) -> None:
    protection = work.protection
    work.context.site(protection.target_site).failover.undo(protection.replica_id, protection.epoch)
    reach("undo.removed")
    work.context.vault.update(protection.id, target_machine=None)


def _undo_release(work: Work) -> None:
    """The source owns the machine again; it is started if this failover had stopped it."""
    protection = work.protection
    try:
        inventory = work.context.site(protection.source_site).inventory
        stopped = not protection.fence_due
        if not stopped and inventory.fenced(protection.source_machine) is not None:
            # Recorded before the fence goes: killed after that, nothing else tells that this failover stopped it.
            work.context.vault.update(protection.id, fence_due=False)
            stopped = True
        inventory.unfence(protection.source_machine, protection.epoch)
        reach("undo.released")
        if stopped and inventory.machine(protection.source_machine).power is PowerState.OFF:
            _commanded(work, protection.source_site).power_on(protection.source_machine)
    except AsrError as problem:
        # Undo is also how another point is chosen while the source is lost: it must not depend on it.
        _log.warning("%s: its source could not be released: %s", protection.name, problem)
        work.facts["source"] = f"not released: {problem}"


def _undo_finish(work: Work) -> None:
    if work.protection.state is State.UNDOING:  # killed right after it, the step is run again
        work.context.vault.transition(work.protection_id, Event.UNDONE, failover_point=None, fence_due=False)
    reach("undo.finished")
    work.note("failover", "undone")


def _commit_begin(work: Work) -> None:
    work.context.vault.transition(work.protection_id, Event.COMMIT)
    reach("commit.begun")


def _commit_do(work: Work) -> None:
    protection = work.protection
    _cleanup_stop(work)
    work.context.site(protection.target_site).failover.commit(protection.replica_id, protection.epoch, work.watch)
    reach("commit.done")


def _commit_finish(work: Work) -> None:
    vault = work.context.vault
    vault.forget_points(work.protection_id, [point.id for point in vault.points(work.protection_id)])
    if work.protection.state is State.COMMITTING:  # killed right after it, the step is run again
        vault.transition(work.protection_id, Event.COMMITTED)
    reach("commit.finished")
    work.note("failover", "committed")


TEST = Procedure("failover-test", (Step("begin", _test_begin), Step("start", _test_start)), holds=Holds.TEST)
CLEANUP = Procedure("failover-cleanup", (Step("stop", _cleanup_stop),), holds=Holds.TEST)
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
UNDO = Procedure(
    "failover-undo",
    (
        Step("begin", _undo_begin),
        Step("remove", _undo_remove),
        Step("release-source", _undo_release),
        Step("finish", _undo_finish),
    ),
)
COMMIT = Procedure(
    "failover-commit",
    (Step("begin", _commit_begin), Step("commit", _commit_do), Step("finish", _commit_finish)),
)
