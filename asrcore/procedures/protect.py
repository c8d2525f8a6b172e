"""Protecting a machine and ending protection: readiness, replica, initial copy, finalisation.

W1 to W3 in docs/reference/site-recovery-map.md.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import (
    AsrError,
    MarksLeft,
    NotReady,
    QuarantinedByAnother,
    ReplicaDamaged,
    ReplicaNotFound,
    SiteUnreachable,
    UnsupportedOperation,
    VaultUnavailable,
)
from asrcore.model.finding import Finding, Severity
from asrcore.model.protection import NetworkMap, Protection
from asrcore.model.state import Event, State, allowed
from asrcore.procedures.failure import recorded, retried_if_passing, tried_again
from asrcore.procedures.give_back import give_source_back
from asrcore.procedures.procedure import Holds, Procedure, Step, Work
from asrcore.procedures.steps import create_replica
from asrcore.replication.agreement import check_unprotect, unknown_points
from asrcore.replication.context import Context
from asrcore.replication.cycle import release_left, run_cycle

__all__ = ["PROTECT", "UNPROTECT", "Pairing", "changed_findings", "check_ready", "readiness", "refuse"]


@attrs.frozen
class Pairing:
    """A machine, where its replica goes, under which policy; `networks` maps the source's names to the target's."""

    name: str
    policy: str
    source_site: str
    machine_id: str
    target_site: str
    networks: NetworkMap

    @classmethod
    def of(cls, protection: Protection) -> Pairing:
        """That of a protected machine, as it replicates now."""
        return cls(
            name=protection.name,
            policy=protection.policy,
            source_site=protection.source_site,
            machine_id=protection.source_machine,
            target_site=protection.target_site,
            networks=protection.networks,
        )


def readiness(context: Context, pairing: Pairing) -> list[Finding]:
    """All findings for that pairing, the worst first."""
    policy = context.vault.policy(pairing.policy)
    source, target = context.site(pairing.source_site), context.site(pairing.target_site)
    description = source.inventory.description(pairing.machine_id)
    nics = tuple(attrs.evolve(nic, network=pairing.networks.target(nic.network)) for nic in description.machine.nics)
    mapped = attrs.evolve(description, machine=attrs.evolve(description.machine, nics=nics))
    found = [*source.source.findings(pairing.machine_id, policy), *target.target.findings(mapped, policy)]
    order = [Severity.ERROR, Severity.WARNING, Severity.INFO]
    return sorted(found, key=lambda item: order.index(item.severity))


def check_ready(context: Context, pairing: Pairing) -> list[Finding]:
    """The findings, if none of them prevents protection; else raises NotReady with those that do."""
    found = readiness(context, pairing)
    refuse(pairing.name, found)
    return found


def changed_findings(context: Context, old: Protection, new: Protection) -> list[Finding]:
    """The findings that the changed protection has and the present one has not, the worst first."""
    before = {(item.code, item.what) for item in readiness(context, Pairing.of(old))}
    return [item for item in readiness(context, Pairing.of(new)) if (item.code, item.what) not in before]


def refuse(machine: str, findings: Iterable[Finding]) -> None:
    """Raises NotReady if there is an ERROR among the findings."""
    errors = [item for item in findings if item.severity is Severity.ERROR]
    if errors:
        lines = "; ".join(f"[{item.code}] {item.what} ({item.action})" for item in errors)
        raise NotReady(machine=machine, findings=lines)


def _create(work: Work) -> None:
    protection = work.protection
    if protection.state is not State.ENABLING:
        return
    replica = create_replica(work)
    reach("protect.replica-created")
    work.context.vault.update(protection.id, replica_kind=replica.info().kind)
    work.context.vault.transition(protection.id, Event.REPLICA_CREATED)
    reach("protect.initial-copy")


def _initial_copy(work: Work) -> None:
    protection = work.protection
    if protection.state is not State.INITIAL_COPY:
        return
    result = run_cycle(work.context, protection.id, work.watch, keep=True)
    work.facts.update(point=result.point.id, bytes_sent=result.counts.sent, bytes_read=result.counts.read)
    reach("protect.copied")


def _finalize(work: Work) -> None:
    protection = work.protection
    if protection.state is not State.FINALIZING:
        return
    findings = readiness(work.context, Pairing.of(protection))
    work.facts["findings"] = [
        {"code": item.code, "severity": item.severity.value, "what": item.what, "action": item.action}
        for item in findings
    ]
    work.context.vault.transition(protection.id, Event.FINALIZED)
    reach("protect.finalized")
    work.note("protect", f"protected from {protection.source_site} to {protection.target_site}")


def _disable_begin(work: Work) -> None:
    protection = work.protection
    allowed(protection.name, protection.state, Event.DISABLE)
    check_unprotect(work.context, protection)
    protection = work.protection
    if protection.undo_due and protection.restored:  # it may have been failed over since, and run at the target
        left = (
            f"{protection.name} at {protection.source_site} is left as it is: the vault is an earlier copy, and "
            f"{protection.target_site} has not confirmed it"
        )
        work.facts["source"] = left
        work.note("protect", left)
        work.save()
    elif protection.undo_due:  # before the record of it is gone: the machine may be stopped and quarantined
        unreleased = give_source_back(work.context, protection)
        if unreleased is not None and not isinstance(unreleased, (SiteUnreachable, QuarantinedByAnother)):
            raise unreleased
        # A source that is lost for good, or that another vault has taken, does not block the end of protection.
        if unreleased is not None:
            left = f"{protection.name} at {protection.source_site} may be left stopped and quarantined: {unreleased}"
            work.facts["source"] = left
            work.note("protect", left)
            work.save()
    work.context.vault.transition(protection.id, Event.DISABLE, **tried_again(protection, State.DISABLING))
    reach("unprotect.begun")


def _disable_source(work: Work) -> None:
    """Stop tracking. A source that is lost does not block the end of protection: what it keeps is reported, since
    nothing records it any longer."""
    protection = work.protection
    try:
        source = work.context.site(protection.source_site).source
        # First with the recorded marks: a driver may know only by them what this vault left.
        release_left(source, protection)
        source.keep_marks(protection.source_machine, [])
    except VaultUnavailable:
        raise  # nothing is known of the source: the step is run again
    except AsrError as problem:
        left = f"marks may be left at {protection.source_site}: {problem}"
        if isinstance(problem, MarksLeft):
            left = f"{problem}. {problem.action_text}"
        work.facts["source"] = f"{former}; {left}" if (former := work.facts.get("source")) else left
        work.note("protect", left)
    reach("unprotect.source-released")


def _disable_target(work: Work) -> None:
    protection = work.protection
    try:
        site = work.context.site(protection.target_site)
        for test_id in site.failover.tests(protection.replica_id):
            site.failover.stop_test(protection.replica_id, test_id)
        if protection.failover_point is not None and protection.replica_id in site.target.replicas():
            site.failover.undo(protection.replica_id, protection.epoch)  # an undo still owed it
        _note_deleted(work, site.target)
        site.target.delete_replica(protection.replica_id, protection.epoch)
    except (SiteUnreachable, UnsupportedOperation) as problem:
        work.facts["target"] = f"the replica may be left at {protection.target_site}: {problem}"
    reach("unprotect.replica-deleted")
    work.note("protect", "protection ended")
    work.context.vault.remove_protection(protection.id)


def _note_deleted(work: Work, target: driver.Target) -> None:
    """What is deleted with the replica, and what of it only the target knows."""
    try:
        info = target.replica(work.protection.replica_id).info()
    except (ReplicaNotFound, ReplicaDamaged):
        return
    unknown = unknown_points(work.context, work.protection, info)
    work.facts.update(deleted_points=len(info.points), deleted_unknown_points=sorted(unknown))
    if unknown:
        work.note("protect", f"recovery points that only the target knew are deleted: {', '.join(sorted(unknown))}")


PROTECT = Procedure(
    "protect",
    (
        Step("create-replica", recorded(_create)),
        Step("initial-copy", recorded(_initial_copy)),
        Step("finalize", recorded(_finalize)),
    ),
    holds=Holds.REPLICATION,
)
UNPROTECT = Procedure(
    "unprotect",
    (
        Step("begin", _disable_begin),
        Step("release-source", retried_if_passing(_disable_source)),
        Step("delete-replica", retried_if_passing(_disable_target)),
    ),
    preempts=True,
)
