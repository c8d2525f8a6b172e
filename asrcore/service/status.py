"""Every protected machine as people and programs see it. Asks no site: it also works when the primary site is lost."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import attrs

from asrcore.model.health import Clock, Health, assess, rpo
from asrcore.model.plain import plain
from asrcore.model.point import RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection
from asrcore.model.server import ENGINE, Server
from asrcore.service import due
from asrcore.units import format_duration, format_time
from asrcore.vault import CycleStats, JobState

if TYPE_CHECKING:
    from asrcore.vault import StatusReader, Vault

__all__ = ["EngineStatus", "MachineStatus", "document", "engine", "machines"]

# As `Engine` describes itself to others; the vault cuts it off on PostgreSQL, and adds pid and host on a file.
_PROCESS = re.compile(r"process (?P<pid>\d+) on (?P<host>[^:]+): (?P<command>.*?)( \(pid .*)?$", re.DOTALL)

_WHERE = re.compile(r"(?P<host>[^,]+), pid (?P<pid>\d+)$")  # of the record of a server
_COMMAND = 60  # characters of a command in the first line; the options of `asr serve` fill three lines


@attrs.frozen
class EngineStatus:
    """What works on a vault now: one engine, or process servers that share it. Without either nothing is replicated,
    and no job continues.

    `holder`: the one engine as it describes itself, or None. `servers_up` of `servers` process servers have been heard
    of within their lease. `alone`: the session of the one engine, on a database server.
    """

    holder: str | None = None
    servers_up: int = 0
    servers: int = 0
    alone: Server | None = None

    @property
    def up(self) -> bool:
        """Whether anything works on the vault."""
        if self.servers:
            return self.servers_up > 0
        return self.holder is not None if self.alone is None else self.alone.alive

    def document(self) -> dict[str, Any]:
        """For `asr status --json` and the configuration server."""
        found = _PROCESS.match(self.holder or "")
        where = found or _WHERE.match(self.alone.host if self.alone else "")
        return {
            "up": self.up,
            "host": where["host"] if where else None,
            "pid": int(where["pid"]) if where else None,
            "command": found["command"] if found else self.holder,
            "servers_up": self.servers_up,
            "servers": self.servers,
        }

    def __str__(self) -> str:
        if self.servers:
            lacking = "" if self.up else "NOT RUNNING - start asr-process-server.service or `asr process-server`; "
            return f"engine: {lacking}{self.servers_up} of {self.servers} process servers are up"
        if not self.up:
            seen = "" if self.alone is None else f"; last seen {format_duration(self.alone.silent)} ago"
            seen += "" if self.alone is None else f" on {self.alone.host}"
            return f"engine: NOT RUNNING - start asr-run.service or `asr run`{seen}"
        found = _PROCESS.match(self.holder or "")
        if found is None and self.alone is not None:
            return f"engine: up on {self.alone.host}"
        if found is None:
            return f"engine: up, {self.holder}"
        return f"engine: up on {found['host']}, pid {found['pid']} ({_short(found['command'])})"


@attrs.frozen
class MachineStatus:
    """A protected machine as `asr status` shows it. `rpo_seconds`: now minus the instant of the newest point;
    None without a point, and where its age is unknown (`clock-went-back`).
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
    engine: EngineStatus = EngineStatus()
    damaged_points: int = 0


def _short(command: str) -> str:
    return command if len(command) <= _COMMAND else command[:_COMMAND].rstrip() + "..."


def engine(vault: Vault | StatusReader) -> EngineStatus:
    """What works on the vault now."""
    servers = vault.servers()
    alone = next((server for server in servers if server.name == ENGINE), None)
    shared = [server for server in servers if server.name != ENGINE]
    return EngineStatus(vault.engine_holder(), sum(server.alive for server in shared), len(shared), alone)


def machines(vault: Vault | StatusReader, now: float, at_work: EngineStatus | None = None) -> list[MachineStatus]:
    """All of them, by name, at `now` in seconds since the epoch. `at_work`: what `engine` returned just now."""
    # Jobs are read before and after: else a job that ends or begins in between makes a machine look stuck.
    before = vault.jobs(limit=1000, active=True)
    protections = vault.protections()
    policies = {policy.name: policy for policy in vault.policies()}
    active = {job.machine: job.kind for job in vault.jobs(limit=1000, active=True)}
    working = active.keys() | {job.machine for job in before}
    heads, counts, cycles = vault.heads(), vault.point_counts(), vault.last_cycles()
    damaged = vault.damaged_counts()
    verified = vault.last_ended("verify")
    at_work = at_work or engine(vault)
    clock = vault.clock_state()
    stale = vault.heads_until(clock.before)
    load = due.load(protections, policies, now, engines=max(1, at_work.servers_up)) if at_work.up else None
    return [
        MachineStatus(
            protection=protection,
            policy=(policy := policies[protection.policy]),
            health=assess(
                protection,
                policy,
                (head := heads.get(protection.id)),
                now,
                load=load,
                engine=at_work.up,
                working=protection.name in working,
                clock=Clock(clock.held, clock.text, protection.id in stale),
                points=counts.get(protection.id, 0),
                damaged=damaged.get(protection.id, 0),
            ),
            points=counts.get(protection.id, 0),
            damaged_points=damaged.get(protection.id, 0),
            last_point=head,
            last_cycle=cycles.get(protection.id),
            rpo_seconds=None if protection.id in stale else rpo(head, now),
            verified_at=_since(protection.created_at, verified.get(protection.name, {}).get(JobState.DONE)),
            working_on=active.get(protection.name, ""),
            engine=at_work,
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
        "damaged_points": item.damaged_points,
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
        "scrubbed_at": protection.last_scrub_at,
        "quarantine_owed": protection.fence_due and not protection.undo_due,
        "undo_owed": protection.undo_due,
        "working_on": item.working_on,
        "engine": item.engine.document(),
        "error": plain(protection.error),
        "retry_at": protection.retry_at,
        "restored": protection.restored,
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
