"""What a command would do, from the vault's records alone: shown before it is done, or instead of doing it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from asrcore.errors import WrongState
from asrcore.model.point import RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import NetworkMap, Protection
from asrcore.model.state import Event, State, allowed
from asrcore.procedures.points import check_planned, choose_point
from asrcore.replication import retention
from asrcore.units import format_duration, format_size, format_time
from asrcore.vault import Vault

__all__ = [
    "HARMFUL",
    "Impact",
    "of_clock",
    "of_commit",
    "of_machine_change",
    "of_planned",
    "of_policy_change",
    "of_removal",
    "of_revocation",
    "of_undo",
    "of_unplanned",
    "of_unprotect",
    "of_verb",
]

HARMFUL = {
    "failover-planned": Event.FAIL_OVER,
    "failover-unplanned": Event.FAIL_OVER,
    "failover-undo": Event.UNDO,
    "failover-commit": Event.COMMIT,
    "unprotect": Event.DISABLE,
}
"""Verbs that may lose data or interrupt a machine, and the event that must be possible."""

_DURATIONS = frozenset({"interval", "point_interval", "keep", "freeze_limit", "verify_every", "scrub_every"})
_LOOK_BACK = 20  # jobs of a machine among which its last failover is looked for
_SHOWN = 5  # names in a line; the rest is counted


@attrs.frozen
class Impact:
    """What `asr VERB` would do to its `subject`: a machine, policy, site or component.

    `source` and `target`: sites that a machine would move between. `point`: what it would run from, `age` seconds old
    (None: its time is in the future), with `newer` the recorded points after it. `deletes`: recovery points that would
    be deleted, by machine. `effects`: the rest, as sentences. `harmful`: data, time or service is lost, so a person is
    asked; `severe`: by the subject's name, not by yes.
    """

    verb: str
    subject: str
    effects: tuple[str, ...]
    source: str = ""
    target: str = ""
    point: RecoveryPoint | None = None
    age: float | None = None
    newer: tuple[RecoveryPoint, ...] = ()
    deletes: Mapping[str, tuple[RecoveryPoint, ...]] = attrs.field(factory=dict)
    harmful: bool = True
    severe: bool = True

    def document(self) -> dict[str, Any]:
        """For `--dry-run --json`."""
        point = self.point
        return {
            "verb": self.verb,
            "subject": self.subject,
            "from": self.source or None,
            "to": self.target or None,
            "point": None if point is None else {"id": point.id, "time": format_time(point.taken_at)},
            "age_seconds": self.age,
            "newer_points": len(self.newer),
            "newer_bytes": sum(item.bytes_sent for item in self.newer),
            "deleted_points": {name: [item.id for item in points] for name, points in self.deletes.items()},
            "effects": list(self.effects),
        }

    def __str__(self) -> str:
        lines = [f"asr {self.verb} {self.subject}:"]
        if self.source:
            lines.append(f"  from:     {self.source}")
            lines.append(f"  to:       {self.target}")
        if self.point is not None:
            lines.append(f"  point:    {_point(self.point)}, {_age(self.age)}")
            lines.append(f"  lost:     {_lost(self)}")
        lines += [f"  deletes:  {_points(name, points)}" for name, points in self.deletes.items() if points]
        lines += [f"  - {effect}" for effect in self.effects]
        return "\n".join(lines)


def _point(point: RecoveryPoint) -> str:
    return f"{point.id} of {format_time(point.taken_at)}, {point.consistency.value}-consistent"


def _age(age: float | None) -> str:
    return "age unknown: its time is in the future" if age is None else f"{format_duration(age)} old"


def _lost(plan: Impact) -> str:
    text = f"everything that {plan.subject} has written since then"
    if plan.newer:
        size = format_size(sum(item.bytes_sent for item in plan.newer))
        hold = (
            "1 newer recovery point holds" if len(plan.newer) == 1 else f"{len(plan.newer)} newer recovery points hold"
        )
        text += f"; {hold} {size} of it"
    return text


def _points(name: str, points: Sequence[RecoveryPoint]) -> str:
    first, last = format_time(points[0].taken_at), format_time(points[-1].taken_at)
    between = f"of {first}" if len(points) == 1 else f"from {first} to {last}"
    return f"{len(points)} recovery point{'s' * (len(points) > 1)} of {name}, {between}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def of_verb(vault: Vault, verb: str, name: str, point: str, now: float) -> Impact:
    """Of a verb of `HARMFUL` for a machine. Raises what the verb itself would raise for the vault's records."""
    protection = vault.protection(name)
    allowed(protection.name, protection.state, HARMFUL[verb])
    match verb:
        case "failover-planned":
            return of_planned(protection)
        case "failover-unplanned":
            return of_unplanned(protection, vault.points(protection.id), point, now)
        case "failover-undo":
            return of_undo(protection, _failed_over_at(vault, protection), now)
        case "failover-commit":
            return of_commit(protection, vault.points(protection.id))
        case _:
            return of_unprotect(protection, vault.points(protection.id))


def _failed_over_at(vault: Vault, protection: Protection) -> float | None:
    kinds = ("failover-planned", "failover-unplanned")
    jobs = vault.jobs(machine=protection.name, limit=_LOOK_BACK)
    return next((job.ended_at for job in jobs if job.kind in kinds), None)


def of_planned(protection: Protection) -> Impact:
    """Of a planned failover: the point it runs from does not exist yet. Raises WrongState (`check_planned`)."""
    check_planned(protection)
    name, source, target = protection.name, protection.source_site, protection.target_site
    return Impact(
        "failover planned",
        name,
        (
            f"{name} is shut down at {source}; it is down until it has started at {target}.",
            "Its last changes are sent after the shutdown: no data is lost.",
            f"{name} at {source} is quarantined: it must not be started there.",
            "No recovery point is deleted; `asr failover undo` takes it back until the commit.",
        ),
        source,
        target,
    )


def of_unplanned(protection: Protection, points: Sequence[RecoveryPoint], wanted: str, now: float) -> Impact:
    """Of an unplanned failover to the point that `wanted` names. Raises PointNotFound."""
    name, source, target = protection.name, protection.source_site, protection.target_site
    point = choose_point(points, wanted, name, allow_damaged=True)
    planned = f"If it still works there, `asr failover planned` loses nothing{_undone_first(protection)}."
    return Impact(
        "failover unplanned",
        name,
        (
            f"{name} at {source} is stopped and quarantined, now or as soon as {source} answers.",
            planned,
            *([f"This recovery point is damaged: {point.damaged}"] if point.damaged else ()),
            "No recovery point is deleted; `asr failover undo` takes it back until the commit.",
        ),
        source,
        target,
        point,
        now - point.taken_at if now >= point.taken_at else None,
        tuple(points[points.index(point) + 1 :]),
    )


def _undone_first(protection: Protection) -> str:
    try:
        check_planned(protection)
    except WrongState:
        return f", after `asr failover undo {protection.name}`"
    return ""


def of_undo(protection: Protection, since: float | None, now: float) -> Impact:
    """Of an undo; `since`: when the machine was started at the target, if that is known."""
    name, source, target = protection.name, protection.source_site, protection.target_site
    drops = protection.target_machine is not None
    written = f" ({format_duration(now - since)} ago)" if since is not None and now >= since else ""
    deleted = f"{name} at {target} is deleted with everything that it wrote since the failover{written}."
    return Impact(
        "failover undo",
        name,
        (
            deleted if drops else f"No machine has been started at {target}: nothing is deleted.",
            f"{name} at {source} is released, and started if the failover had stopped it.",
            "No recovery point is deleted.",
        ),
        target,
        source,
        harmful=drops,
    )


def of_commit(protection: Protection, points: Sequence[RecoveryPoint]) -> Impact:
    """Of a commit."""
    name, target = protection.name, protection.target_site
    return Impact(
        "failover commit",
        name,
        (
            f"{name} keeps its disks at {target}; the replica and all its recovery points are deleted.",
            "The failover cannot be undone, and no other recovery point can be chosen.",
            f"{name} is not protected until `asr reprotect`.",
        ),
        deletes={name: tuple(points)},
    )


def of_unprotect(protection: Protection, points: Sequence[RecoveryPoint]) -> Impact:
    """Of the end of protection."""
    name = protection.name
    unreleased = f"{name} at {protection.source_site} is released first: the undo of its failover is not complete."
    committed = protection.state is State.COMMITTED
    return Impact(
        "unprotect",
        name,
        (
            f"The replica at {protection.target_site} and all its recovery points are deleted."
            if not committed
            else f"{name} stays at {protection.target_site}; only the vault's records of it are deleted.",
            "To protect it again later, all of its data is copied again.",
            unreleased if protection.undo_due else f"{name} itself is not changed.",
        ),
        deletes={name: tuple(points)},
    )


def of_removal(kind: str, name: str) -> Impact:
    """Of removing a site or policy that no machine uses."""
    effects = {
        "site": (
            "Its record and its settings, secrets included, are deleted from the vault.",
            "The site is unchanged.",
        ),
        "policy": ("Its record is deleted from the vault; no machine uses it.",),
    }
    return Impact(f"{kind} remove", name, effects[kind], severe=False)


def of_clock(now: float, doubt: str, *, held: bool) -> Impact:
    """Of accepting the present time as right; `doubt`: why it is in doubt (`held`)."""
    effects = (
        f"The clock is in doubt: {doubt}",
        "Recovery points are deleted by age again, by this time. If it is ahead of the right time, points are deleted "
        "that should be kept.",
    )
    return Impact(
        "clock accept",
        format_time(now),
        effects if held else ("The clock is not in doubt.",),
        harmful=held,
        severe=False,
    )


def of_revocation(role: str, name: str, serials: Sequence[str]) -> Impact:
    """Of revoking certificates and tokens of a component."""
    return Impact(
        f"ca revoke {role}",
        name,
        (
            f"{len(serials)} certificates and tokens are revoked; that cannot be undone.",
            f"{role} {name} cannot connect until it has joined again with a new token.",
        ),
    )


def of_policy_change(
    old: Policy, new: Policy, machines: Iterable[tuple[Protection, Sequence[RecoveryPoint]]], now: float
) -> Impact:
    """Of another content of a policy, with the machines that use it and their recovery points."""
    machines = list(machines)
    names = [protection.name for protection, _ in machines]
    changed = [
        f"{field.name}: {_shown(field.name, old)} -> {_shown(field.name, new)}"
        for field in attrs.fields(Policy)
        if getattr(old, field.name) != getattr(new, field.name)
    ]
    affected = f"It applies to {_names(names)}." if names else "No machine uses it."
    deletes = {protection.name: _dropped(points, old, new, now) for protection, points in machines}
    return _change("policy set", new.name, (*(changed or ["Nothing changes."]), affected), deletes)


def of_machine_change(
    old: Protection,
    new: Protection,
    policies: tuple[Policy, Policy],
    points: Sequence[RecoveryPoint],
    findings: Sequence[str],
    now: float,
) -> Impact:
    """Of another policy (`policies`: the old and the new one), network mapping or test network of a machine.
    `findings`: what readiness says about it."""
    changed = []
    if old.policy != new.policy:
        changed.append(f"policy: {old.policy} -> {new.policy}")
    if old.networks != new.networks:
        changed.append(f"networks: {_mapped(old.networks)} -> {_mapped(new.networks)}")
    if old.test_network != new.test_network:
        changed.append(f"test network: {old.test_network or 'isolated'} -> {new.test_network or 'isolated'}")
    deletes = {new.name: _dropped(points, *policies, now)}
    return _change("machine set", new.name, (*(changed or ["Nothing changes."]), *findings), deletes)


def _change(
    verb: str, subject: str, effects: tuple[str, ...], deletes: Mapping[str, tuple[RecoveryPoint, ...]]
) -> Impact:
    deletes = {name: points for name, points in deletes.items() if points}
    if deletes:
        effects = (*effects, "The next cycles delete the recovery points that are no longer kept.")
    return Impact(verb, subject, effects, deletes=deletes, harmful=bool(deletes), severe=False)


def _dropped(points: Sequence[RecoveryPoint], old: Policy, new: Policy, now: float) -> tuple[RecoveryPoint, ...]:
    """What the new policy would delete at the next cycle and the old one would not."""
    before = {point.id for point in retention.to_drop(points, old, now)}
    return tuple(point for point in retention.to_drop(points, new, now) if point.id not in before)


def _mapped(networks: NetworkMap) -> str:
    return ", ".join(f"{source}={target}" for source, target in sorted(networks.networks.items())) or "by name"


def _shown(name: str, policy: Policy) -> str:
    value = getattr(policy, name)
    if name in _DURATIONS:
        return format_duration(value) if value else "never"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(getattr(value, "value", value))
