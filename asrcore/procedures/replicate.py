"""Everyday procedures: one cycle now, resync (W4 and W5 in docs/reference/site-recovery-map.md)."""

from __future__ import annotations

from asrcore.crashpoint import reach
from asrcore.errors import SourcePaused
from asrcore.model.state import Event, State, allowed
from asrcore.procedures.failure import recorded
from asrcore.procedures.give_back import finish_undo, withdraw_late_fence
from asrcore.procedures.procedure import Holds, Procedure, Step, Work
from asrcore.replication.agreement import ask_target
from asrcore.replication.cycle import CycleResult, run_cycle

__all__ = ["REPLICATE", "RESYNC"]


def _facts(result: CycleResult) -> dict[str, object]:
    return {
        "point": result.point.id,
        "mode": result.mode.value,
        "consistency": result.point.consistency.value,
        **result.counts.facts(),
        "resumed": result.resumed,
    }


def _replicate(work: Work) -> None:
    """A machine in another state is no failure: the service must not wait because of it."""
    protection = work.protection
    if protection.state is not State.INITIAL_COPY:  # an initial copy that failed is resumed
        allowed(protection.name, protection.state, Event.REPLICATE)
    _cycle(work)


@recorded
def _cycle(work: Work) -> None:
    protection = work.protection
    finish_undo(work.context, protection.id)
    result = run_cycle(work.context, protection.id, work.watch, keep=work.arguments.keep)
    work.facts.update(_facts(result))
    withdraw_late_fence(work.context, protection, result)
    if result.halted:
        raise SourcePaused(machine=protection.name, site=protection.source_site, detail=result.halted)


def _resync_begin(work: Work) -> None:
    finish_undo(work.context, work.protection_id)
    ask_target(work.context, work.protection_id)
    work.context.vault.transition(work.protection_id, Event.START_RESYNC)
    reach("resync.begun")


def _resync_compare(work: Work) -> None:
    protection = work.protection
    if protection.state is not State.RESYNCING:
        return
    result = run_cycle(work.context, protection.id, work.watch, keep=True)
    work.facts.update(_facts(result))
    reach("resync.compared")
    work.note("resync", f"equal again after {work.facts['bytes_sent']} bytes sent")


REPLICATE = Procedure("replicate", (Step("cycle", _replicate),), holds=Holds.REPLICATION)
RESYNC = Procedure(
    "resync",
    (Step("begin", _resync_begin), Step("compare", recorded(_resync_compare))),
    holds=Holds.REPLICATION,
)
