"""Recording what the target holds where the vault is behind it: a person's decision."""

from __future__ import annotations

from asrcore.model.epoch import shown
from asrcore.model.state import State
from asrcore.procedures.impact import Impact
from asrcore.procedures.procedure import Procedure, Step, Work
from asrcore.replication.agreement import adopt, adoption
from asrcore.replication.context import Context
from asrcore.units import format_time

__all__ = ["ADOPT", "adopt_impact"]


def _adopt(work: Work) -> None:
    work.facts.update(adopt(work.context, work.protection_id))


ADOPT = Procedure("adopt", (Step("adopt", _adopt),), preempts=True)


def adopt_impact(context: Context, machine: str) -> Impact:
    """What the target holds, and what recording it would do; nothing is changed. Raises what the target raises."""
    protection = context.vault.protection(machine)
    found = adoption(context, protection.id)
    info, name, target = found.info, protection.name, protection.target_site
    points = [item for item in info.points if item.id in found.unknown]
    effects = [
        f"The replica at {target} is owned at epoch {shown(info.epoch)}; the vault is at {shown(protection.epoch)}.",
        f"Recovery points that only {target} knows: {len(points) or 'none'}"
        + (f", the newest {points[-1].id} of {format_time(points[-1].taken_at)}." if points else "."),
    ]
    if info.promoted is not None:
        effects.append(f"{name} was failed over to {target}, from point {info.promoted.point_id}.")
    if not found.needed:
        effects.append("Vault and target agree: nothing is recorded.")
    elif found.state in (State.FAILED_OVER, State.FAILING_OVER):
        effects.append(
            f"It is recorded as {found.state.value}: the machine at {protection.source_site} stays quarantined, and is "
            f"stopped if it runs. Then commit or undo the failover."
        )
    else:
        effects.append(f"They are recorded; {name} replicates from {protection.source_site}, after a comparison.")
    if found.needed:
        effects.append("Another engine that has a copy of this vault is refused from then on.")
    return Impact("machine adopt", name, tuple(effects), harmful=found.needed, severe=False)
