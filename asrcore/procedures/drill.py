"""Test failover and its clean-up."""

from __future__ import annotations

import hashlib
import logging

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import AsrError, PointNotFound
from asrcore.model.event import FailoverKind
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import Protection, TestRun
from asrcore.model.state import Event, allowed
from asrcore.procedures.examine import check_point
from asrcore.procedures.give_back import NO_FAILURE_OF_A_SITE
from asrcore.procedures.points import choose_point
from asrcore.procedures.procedure import Holds, Procedure, Step, Work
from asrcore.procedures.steps import note_repairs
from asrcore.replication.agreement import ask_target

__all__ = ["CLEANUP", "TEST", "cleanup_tests"]

_log = logging.getLogger(__name__)

LONGEST_NAME = 200
"""Bytes of a test's name: libvirt makes file names of it, which have 255 at most."""


def _test_begin(work: Work) -> None:
    protection = work.protection
    allowed(protection.name, protection.state, Event.TEST)
    if protection.test is not None and protection.test.id == work.job_id:
        return
    ask_target(work.context, protection.id)
    cleanup_tests(work)  # one test at a time: a new one takes the place of the former
    point = _choose(work, protection)
    try:
        check_point(work, point.id)
    except PointNotFound:
        if work.arguments.point != "latest":
            raise
        # A cycle was sealed just now and took the place of the latest state: then that is the latest.
        ask_target(work.context, protection.id)
        point = _choose(work, protection)
        check_point(work, point.id)
    work.context.plugins.before_failover(protection, FailoverKind.TEST)
    run = TestRun(id=work.job_id, point_id=point.id, machine_id="", started_at=work.context.clock())
    work.context.vault.update(protection.id, test=run)


def _choose(work: Work, protection: Protection) -> RecoveryPoint:
    points, wanted = work.context.vault.points(protection.id), work.arguments
    return choose_point(points, wanted.point, protection.name, allow_damaged=wanted.allow_damaged)


def _test_start(work: Work) -> None:
    protection = work.protection
    run = protection.test
    if run is None:
        raise AssertionError("a test was begun")
    try:
        work.watch.check()
        run, instance = _run_latest(work, run)
    except NO_FAILURE_OF_A_SITE:
        raise
    except Exception:
        _forget(work, run)
        raise
    reach("test.started")
    now = work.context.clock()
    run = TestRun(id=run.id, point_id=run.point_id, machine_id=instance.machine_id, started_at=run.started_at)
    work.context.vault.update(protection.id, test=run, last_test_at=now)
    work.context.plugins.after_failover(work.protection, FailoverKind.TEST)
    work.facts.update(machine=instance.name, machine_id=instance.machine_id, point=run.point_id)
    work.facts["seconds"] = round(now - run.started_at, 3)
    note_repairs(work, instance)
    work.note("test", f"point {run.point_id} runs as {instance.name}")


def _run_latest(work: Work, run: TestRun) -> tuple[TestRun, driver.Instance]:
    protection = work.protection
    try:
        return run, _run_test(work, run)
    except PointNotFound:
        if work.arguments.point != "latest":
            raise
        # A cycle was sealed just now and took the place of the latest state: then that is the latest.
        point = _choose(work, protection)
        run = TestRun(id=run.id, point_id=point.id, machine_id="", started_at=run.started_at)
        work.context.vault.update(protection.id, test=run)
        return run, _run_test(work, run)


def _forget(work: Work, run: TestRun) -> None:
    """A test that failed leaves nothing. What a target cannot delete now is deleted by the next test or clean-up, which
    ask the target what is left; it holds its point there until then."""
    protection = work.protection
    try:
        work.context.site(protection.target_site).failover.stop_test(protection.replica_id, run.id)
        reach("test.taken-back")
    except NO_FAILURE_OF_A_SITE:
        raise
    except AsrError as problem:
        _log.warning("%s: its failed test may have left something: %s", protection.name, problem)
        work.facts["left"] = f"parts of the test may be left at {protection.target_site}: {problem}"
    work.context.vault.update(protection.id, test=None)


def _name_of_test(machine: str) -> str:
    """That of the machine with `-test`; of a long name the beginning and a digest of all of it."""
    name = f"{machine}-test"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    end = f"-{hashlib.sha256(machine.encode()).hexdigest()[:8]}-test"
    return machine.encode()[: LONGEST_NAME - len(end)].decode(errors="ignore") + end


def _run_test(work: Work, run: TestRun) -> driver.Instance:
    protection = work.protection
    spec = driver.TestSpec(
        test_id=run.id,
        replica_id=protection.replica_id,
        point_id=run.point_id,
        name=_name_of_test(protection.name),
        network=work.arguments.network,
    )
    return work.context.site(protection.target_site).failover.start_test(spec, work.watch)


def cleanup_tests(work: Work) -> None:
    """Delete everything of every test, also what a killed test left."""
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
        work.note("test", "test machine deleted")


TEST = Procedure(
    "failover-test",
    (Step("begin", _test_begin), Step("start", _test_start, checks_itself=True)),
    holds=Holds.TEST,
)
CLEANUP = Procedure("failover-cleanup", (Step("stop", cleanup_tests),), holds=Holds.TEST)
