"""After a failover: take it back, or make it final."""

from __future__ import annotations

from asrcore.crashpoint import reach
from asrcore.errors import AsrError
from asrcore.model.epoch import next_generation
from asrcore.model.state import Event, State, allowed
from asrcore.procedures.drill import cleanup_tests
from asrcore.procedures.failure import retried_if_passing, tried_again
from asrcore.procedures.give_back import (
    NO_FAILURE_OF_A_SITE,
    clean_target,
    give_source_back,
    runs_at_target,
    source_was_stopped,
)
from asrcore.procedures.procedure import Procedure, Step, Work
from asrcore.procedures.steps import commanded
from asrcore.replication.agreement import check_commit, check_undo
from asrcore.vault import Changes

__all__ = ["COMMIT", "UNDO"]


def _undo_begin(work: Work) -> None:
    protection = work.protection
    allowed(protection.name, protection.state, Event.UNDO)
    check_undo(work.context, protection, by_person=True)
    # Without a machine at the target nothing was taken from the source of an unplanned failover: it is left as it is.
    untouched = protection.state is State.FAILING_OVER and not protection.planned and protection.target_machine is None
    # From here on `fence_due` says that the source is not to be started. A planned failover that owes its fence has
    # stopped the source all the same.
    keep_off = untouched or (protection.fence_due and not protection.planned)
    if keep_off and protection.state is not State.UNDOING:
        keep_off = not source_was_stopped(work.context, protection, work.job_id)
    epoch = next_generation(protection.epoch)
    changes = Changes(epoch=epoch, fence_due=keep_off) | tried_again(protection, State.UNDOING)
    work.context.vault.transition(protection.id, Event.UNDO, **changes)
    reach("undo.begun")


def _undo_remove(work: Work) -> None:
    """Delete the machine at the target. A target that cannot do it now owes it: the source must not wait for it.
    But a machine that is known to run there is stopped first."""
    protection = work.protection
    check_undo(work.context, protection, by_person=True)
    left = clean_target(work.context, protection)
    reach("undo.removed")
    if left is None:
        work.context.vault.update(protection.id, target_machine=None)
        return
    runs = runs_at_target(work.context, protection)
    if protection.target_machine is not None and runs is not False:
        try:
            inventory = commanded(work, protection.target_site)
            inventory.power_off(protection.target_machine, graceful=False, timeout=0.0)
        except NO_FAILURE_OF_A_SITE:
            raise
        except AsrError:
            # Of a site that cannot be asked a person has decided; it is as with a source that is lost at a failover.
            if runs:
                raise
    _owe(work, "target", left)


def _undo_release(work: Work) -> None:
    """The source owns the machine again; it is started if this failover had stopped it."""
    unreleased = give_source_back(work.context, work.protection)
    if unreleased is not None:
        _owe(work, "source", unreleased)


def _owe(work: Work, place: str, problem: AsrError) -> None:
    """Record what a site could not do; the service does it as soon as it can."""
    work.facts[place] = f"not done yet: {problem}"
    work.facts["owed"] = sorted({*_owed(work), place})


def _owed(work: Work) -> list[str]:
    owed = work.facts.get("owed", [])
    return list(owed) if isinstance(owed, list) else []


def _undo_finish(work: Work) -> None:
    protection, owed = work.protection, _owed(work)
    if protection.state is State.UNDOING:  # killed right after it, the step is run again
        work.context.vault.transition(
            protection.id,
            Event.UNDONE,
            failover_point=protection.failover_point if owed else None,
            target_machine=(protection.target_machine or protection.source_machine) if owed else None,
            fence_due=bool(owed) and (protection.fence_due or "source" not in owed),
            attempt=0,
            retry_at=None,
            error=None,
        )
    reach("undo.finished")
    pending = "".join(f"; {place}: {work.facts[place]}" for place in owed)
    work.note("failover", "undone; the machine at the target is deleted" if not owed else f"undone{pending}")


def _commit_begin(work: Work) -> None:
    protection = work.protection
    allowed(protection.name, protection.state, Event.COMMIT)
    check_commit(work.context, protection)
    work.context.vault.transition(protection.id, Event.COMMIT, **tried_again(protection, State.COMMITTING))
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
        vault.transition(work.protection_id, Event.COMMITTED, attempt=0, retry_at=None, error=None)
    reach("commit.finished")
    work.note("failover", "committed; the replica and all its recovery points are deleted")


UNDO = Procedure(
    "failover-undo",
    (
        Step("begin", _undo_begin),
        Step("remove", retried_if_passing(_undo_remove)),
        Step("release-source", retried_if_passing(_undo_release)),
        Step("finish", retried_if_passing(_undo_finish), checks_itself=True),
    ),
)
COMMIT = Procedure(
    "failover-commit",
    (
        Step("begin", _commit_begin),
        Step("commit", retried_if_passing(_commit_do)),
        Step("finish", retried_if_passing(_commit_finish)),
    ),
)
