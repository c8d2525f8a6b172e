"""After a failover: take it back, or make it final."""

from __future__ import annotations

import logging

from asrcore.crashpoint import reach
from asrcore.errors import AsrError, VaultUnavailable
from asrcore.model.machine import PowerState
from asrcore.model.state import Event, State
from asrcore.procedures.drill import cleanup_tests
from asrcore.procedures.procedure import Procedure, Step, Work
from asrcore.procedures.steps import commanded

__all__ = ["COMMIT", "UNDO"]

_log = logging.getLogger(__name__)


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
            # Recorded before the fence is removed: after a kill, nothing else shows that this failover stopped it.
            work.context.vault.update(protection.id, fence_due=False)
            stopped = True
        inventory.unfence(protection.source_machine, protection.epoch)
        reach("undo.released")
        if stopped and inventory.machine(protection.source_machine).power is PowerState.OFF:
            commanded(work, protection.source_site).power_on(protection.source_machine)
    except VaultUnavailable:
        raise  # nothing is known of the source: the step is run again
    except AsrError as problem:
        # Undo is also how another point is chosen while the source is lost: it must not depend on it.
        _log.warning("%s: its source could not be released: %s", protection.name, problem)
        work.facts["source"] = f"not released: {problem}"


def _undo_finish(work: Work) -> None:
    if work.protection.state is State.UNDOING:  # killed right after it, the step is run again
        work.context.vault.transition(work.protection_id, Event.UNDONE, failover_point=None, fence_due=False)
    reach("undo.finished")
    work.note("failover", "undone; the machine at the target is deleted")


def _commit_begin(work: Work) -> None:
    work.context.vault.transition(work.protection_id, Event.COMMIT)
    reach("commit.begun")


def _commit_do(work: Work) -> None:
    protection = work.protection
    cleanup_tests(work)
    work.context.site(protection.target_site).failover.commit(protection.replica_id, protection.epoch, work.watch)
    reach("commit.done")


def _commit_finish(work: Work) -> None:
    vault = work.context.vault
    vault.forget_points(work.protection_id, [point.id for point in vault.points(work.protection_id)])
    if work.protection.state is State.COMMITTING:  # killed right after it, the step is run again
        vault.transition(work.protection_id, Event.COMMITTED)
    reach("commit.finished")
    work.note("failover", "committed; the replica and all its recovery points are deleted")


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
