"""Every protected machine as people and programs see it. Asks no site: it also works when the primary site is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from asrcore.model.health import Health, assess, rpo
from asrcore.model.plain import plain
from asrcore.model.point import RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection
from asrcore.service import due
from asrcore.units import format_time
from asrcore.vault import CycleStats, JobState

if TYPE_CHECKING:
    from asrcore.vault import StatusReader, Vault

__all__ = ["MachineStatus", "document", "machines"]


@attrs.frozen
class MachineStatus:
    """A protected machine as `asr status` shows it. `rpo_seconds`: now minus the instant of the newest point.
    `verified_at`: when a comparison of the whole replica last ended with both sides equal, possibly after a repair.
    """

    protection: Protection
    policy: Policy
    health: Health
    points: int
    last_point: RecoveryPoint | None
    last_cycle: CycleStats | None
    rpo_seconds: float | None
    verified_at: float | None
    working_on: str


def machines(vault: Vault | StatusReader, now: float) -> list[MachineStatus]:
    """All of them, by name, at `now` in seconds since the epoch."""
    protections = vault.protections()
    policies = {policy.name: policy for policy in vault.policies()}
    active = {job.machine: job.kind for job in vault.jobs(limit=1000, active=True)}
    heads, counts, cycles = vault.heads(), vault.point_counts(), vault.last_cycles()
    verified = vault.last_ended("verify")
    living = sum(server.alive for server in vault.servers())
    load = due.load(protections, policies, now, engines=max(1, living)) if vault.engine_holder() else None
    return [
        MachineStatus(
            protection=protection,
            policy=(policy := policies[protection.policy]),
            health=assess(protection, policy, (head := heads.get(protection.id)), now, load=load),
            points=counts.get(protection.id, 0),
            last_point=head,
            last_cycle=cycles.get(protection.id),
            rpo_seconds=rpo(head, now),
            verified_at=_since(protection.created_at, verified.get(protection.name, {}).get(JobState.DONE)),
            working_on=active.get(protection.name, ""),
        )
        for protection in protections
    ]


def _since(created_at: float, at: float | None) -> float | None:
    """A time of this protection, not of a former protection of the machine."""
    return at if at is not None and at >= created_at else None


def document(item: MachineStatus) -> dict[str, Any]:
    """For `asr status --json` and the configuration server."""
    protection, last = item.protection, item.last_point
    return {
        "machine": protection.name,
        "id": protection.id,
        "state": protection.state.value,
        "health": {
            "level": item.health.level.value,
            "reasons": [plain(reason) for reason in item.health.reasons],
        },
        "rpo_seconds": item.rpo_seconds,
        "last_point": None if last is None else {**plain(last), "time": format_time(last.taken_at)},
        "points": item.points,
        "stored_bytes": None if last is None else last.held,
        "last_cycle": _cycle_document(item.last_cycle),
        "direction": protection.direction.value,
        "epoch": protection.epoch,
        "policy": protection.policy,
        "interval_seconds": item.policy.interval,
        "source_site": protection.source_site,
        "target_site": protection.target_site,
        "replica_kind": protection.replica_kind,
        "test": plain(protection.test),
        "last_test_at": protection.last_test_at,
        "verified_at": item.verified_at,
        "quarantine_owed": protection.fence_due,
        "working_on": item.working_on,
        "error": plain(protection.error),
        "retry_at": protection.retry_at,
    }


def _cycle_document(cycle: CycleStats | None) -> dict[str, Any] | None:
    """What the newest cycle cost."""
    if cycle is None:
        return None
    return {
        "mode": cycle.mode.value,
        "seconds": cycle.sealed_at - cycle.started_at,
        "bytes_read": cycle.bytes_read,
        "bytes_sent": cycle.bytes_sent,
    }
