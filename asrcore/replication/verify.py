"""Verifying a replica, and mending what differs (invariant 6)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import cast

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import UnsupportedOperation, VerifyFailed
from asrcore.model.extent import total
from asrcore.model.protection import PendingCycle
from asrcore.model.state import Event, allowed
from asrcore.replication.cycle import run_cycle
from asrcore.replication.procedure import Holds, Procedure, Step, Work
from asrcore.replication.proof import DiskProof, prove, sha256_of_both

__all__ = ["VERIFY"]

SAVE_SECONDS = 10.0  # what an interruption costs at most, beside the regions that were being read
_LOOK_BACK = 50  # newest jobs of the machine, among which the verification before is looked for
_PROVED = "proved"  # in the facts of a verification that was interrupted: at which points what was proved of each disk


def _verify(work: Work) -> None:
    """Compares within the frozen view of a cycle of its own.

    A verification that was interrupted (killed, cancelled, its link cut) goes on, in the same job or the next one: what
    it proved still holds, but for what this cycle changed, if no other cycle has changed the replica in between.
    """
    protection = work.protection
    allowed(protection.name, protection.state, Event.VERIFY)
    former = _interrupted(work)
    proofs: dict[str, DiskProof] = {}
    sums: dict[str, tuple[str, str]] = {}
    points: list[str] = []

    def compare(machine: driver.MachineView, replica: driver.Replica, cycle: PendingCycle) -> None:
        for disk_id, view in machine.disks.items():
            if not view.whole:
                raise UnsupportedOperation(driver=machine.description.platform, operation=f"hold disk {disk_id} still")
        known = _still_proved(former, cycle, machine)
        points.extend([*_points_of(former), cycle.point_id] if known else [cycle.point_id])
        for disk_id, view in machine.disks.items():
            proofs[disk_id] = known.get(disk_id) or DiskProof(view.disk.size, view.digest)
        note_proved()
        work.save()
        work.watch.start("verifying", sum(proof.size for proof in proofs.values()))
        try:
            for disk_id, view in machine.disks.items():
                prove(view, replica, proofs[disk_id], work.watch, save_at_times)
        except BaseException:
            note_proved()
            raise
        if work.arguments.sha256:
            work.watch.start("hashing", 2 * sum(proof.size for proof in proofs.values()))
            for disk_id, view in machine.disks.items():
                sums[disk_id] = sha256_of_both(view, replica, work.watch)

    def note_proved() -> None:
        disks = {disk_id: proof.to_facts() for disk_id, proof in proofs.items()}
        work.facts[_PROVED] = {"points": points, "disks": disks}

    saved = time.monotonic()

    def save_at_times() -> None:
        nonlocal saved
        if time.monotonic() - saved >= SAVE_SECONDS:
            note_proved()
            work.save()
            saved = time.monotonic()
            reach("verify.saved")

    result = run_cycle(work.context, protection.id, work.watch, keep=work.arguments.repair, after_seal=compare)
    work.facts.pop(_PROVED, None)
    different = sum(total(proof.different) for proof in proofs.values())
    work.facts.update(point=result.point.id, points=points, different_bytes=different, equal=different == 0)
    work.facts["disks"] = {disk_id: _facts(proof, sums.get(disk_id)) for disk_id, proof in proofs.items()}
    if not different:
        work.note("verify", f"equal at point {result.point.id}")
        return
    work.note("verify", f"{different} bytes differ at point {result.point.id}")
    if not work.arguments.repair:
        raise VerifyFailed(machine=protection.name, different=different)
    again = {disk_id: proof.different for disk_id, proof in proofs.items()}
    repaired = run_cycle(work.context, protection.id, work.watch, keep=True, again=again)
    work.facts.update(repaired_point=repaired.point.id, repaired_bytes=repaired.counts.sent + repaired.counts.zeroed)
    work.note("verify", f"repaired with point {repaired.point.id}")


def _facts(proof: DiskProof, sums: tuple[str, str] | None) -> dict[str, object]:
    told: dict[str, object] = {
        "size": proof.size,
        "equal": not proof.different,
        "different_bytes": total(proof.different),
        "digest": proof.algorithm,
        "source_digest": proof.source_digest,
        "replica_digest": proof.replica_digest,
    }
    if sums is not None:
        told["source_sha256"], told["replica_sha256"] = sums
    return told


def _interrupted(work: Work) -> Mapping[str, object] | None:
    """What this job had proved when it was killed, or the one before it when it failed."""
    if _PROVED in work.facts:
        return _proved_in(work.facts)
    for job in work.context.vault.jobs(machine=work.protection.name, limit=_LOOK_BACK):
        if job.kind == VERIFY.kind and job.id != work.job_id:
            return _proved_in(json.loads(job.result) if job.result else {})
    return None


def _proved_in(facts: Mapping[str, object]) -> Mapping[str, object] | None:
    found = facts.get(_PROVED)
    return cast(Mapping[str, object], found) if isinstance(found, dict) else None


def _points_of(former: Mapping[str, object] | None) -> list[str]:
    return list(cast(list[str], former["points"])) if former else []


def _still_proved(
    former: Mapping[str, object] | None, cycle: PendingCycle, machine: driver.MachineView
) -> dict[str, DiskProof]:
    if former is None or cycle.base_point != _points_of(former)[-1]:
        return {}
    result = {}
    for disk_id, facts in cast(Mapping[str, Mapping[str, object]], former["disks"]).items():
        proof, view = DiskProof.from_facts(facts), machine.disks.get(disk_id)
        changed = cycle.plan.get(disk_id)
        if proof is not None and view is not None and changed is not None and proof.digest is view.digest:
            result[disk_id] = proof.without(changed, view.disk.size)
    return result


VERIFY = Procedure("verify", (Step("verify", _verify),), holds=Holds.REPLICATION)
