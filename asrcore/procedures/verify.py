"""Verifying that a replica equals its source, and repairing what differs.

Invariant 6 in docs/explanation/architecture.md.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import cast

import attrs

from asrcore import driver
from asrcore.crashpoint import reach
from asrcore.errors import UnsupportedOperation, VerifyFailed
from asrcore.model.extent import total
from asrcore.model.protection import PendingCycle
from asrcore.model.state import Event, allowed
from asrcore.procedures.procedure import Holds, Procedure, Step, Work
from asrcore.replication.cycle import run_cycle
from asrcore.replication.proof import DiskProof, prove, sha256_of_both

__all__ = ["VERIFY"]

SLICE = 1.0  # share of the policy's interval that one view is compared for: the next point is late by no more than that
SAVE_SECONDS = 10.0  # what an interruption costs at most, beside the regions that were being read
_LOOK_BACK = 50  # newest jobs of the machine, among which the previous verification is looked for
_PROVED = "proved"  # in the facts of a verification that was interrupted: at which points what was proved of each disk


def _verify(work: Work) -> None:
    """Compares within the frozen views of separate cycles, one slice after another: a comparison that takes hours must
    not delay recovery points. The result of a slice still holds in the next, except for what the cycle in between
    changed.

    A verification that was interrupted (killed, cancelled, its link cut) resumes in the same way, in the same job or
    the next one, if no other cycle has changed the replica in between.
    """
    protection = work.protection
    allowed(protection.name, protection.state, Event.VERIFY)
    seconds = work.context.vault.policy(protection.policy).interval * SLICE
    slices: list[_Slice] = []
    while not slices or not slices[-1].complete:
        limit = seconds if _worth_slicing(slices) else math.inf
        slices.append(_Slice(work, _interrupted(work), limit))
        slices[-1].run()
    last = slices[-1]
    work.facts.pop(_PROVED, None)
    different = sum(total(proof.different) for proof in last.proofs.values())
    work.facts.update(point=last.points[-1], points=last.points, different_bytes=different, equal=different == 0)
    work.facts["disks"] = {disk_id: _facts(proof, last.sums.get(disk_id)) for disk_id, proof in last.proofs.items()}
    if not different:
        work.note("verify", f"equal at point {last.points[-1]}")
        return
    work.note("verify", f"{different} bytes differ at point {last.points[-1]}")
    if not work.arguments.repair:
        raise VerifyFailed(machine=protection.name, different=different)
    resend = {disk_id: proof.different for disk_id, proof in last.proofs.items()}
    repaired = run_cycle(work.context, protection.id, work.watch, keep=True, resend=resend)
    work.facts.update(repaired_point=repaired.point.id, repaired_bytes=repaired.counts.sent + repaired.counts.zeroed)
    work.note("verify", f"repaired with point {repaired.point.id}")


@attrs.define
class _Slice:
    """One cycle, and in its view as much of the comparison as can begin within the limit (seconds)."""

    work: Work
    former: Mapping[str, object] | None
    limit: float
    proofs: dict[str, DiskProof] = attrs.field(factory=dict)
    sums: dict[str, tuple[str, str]] = attrs.field(factory=dict)
    points: list[str] = attrs.field(factory=list)
    complete: bool = False
    missing: int = 0
    """Regions that were to be compared at its beginning."""
    compared: int = 0
    """How many of these it compared."""
    _begun: float = 0.0
    _saved: float = 0.0

    def run(self) -> None:
        work = self.work
        # A point that may be found damaged is not kept beyond the next cycle unless the policy asks for it.
        run_cycle(work.context, work.protection_id, work.watch, after_seal=self._compare)

    def _compare(self, machine: driver.MachineView, replica: driver.Replica, cycle: PendingCycle) -> None:
        for disk_id, view in machine.disks.items():
            if not view.whole:
                operation = f"verify a replica: disk {disk_id} cannot be frozen as a whole"
                raise UnsupportedOperation(driver=machine.description.platform, operation=operation)
        known = _still_proved(self.former, cycle, machine)
        self.points = [*(_points_of(self.former) if known else ()), cycle.point_id]
        for disk_id, view in machine.disks.items():
            self.proofs[disk_id] = known.get(disk_id) or DiskProof(view.disk.size, view.digest)
        self.missing = sum(len(proof.missing) for proof in self.proofs.values())
        self._note_proved()
        self.work.save()
        self._begun = self._saved = time.monotonic()
        self.work.watch.start("verifying", sum(proof.size for proof in self.proofs.values()))
        try:
            self.complete = all(
                prove(view, replica, self.proofs[disk_id], self.work.watch, self._save_at_times, self._is_over)
                for disk_id, view in machine.disks.items()
            )
        finally:
            self._note_proved()
        self.work.save()
        self.compared = self.missing - sum(len(proof.missing) for proof in self.proofs.values())
        if self.complete and self.work.arguments.sha256:
            self.work.watch.start("hashing", 2 * sum(proof.size for proof in self.proofs.values()))
            for disk_id, view in machine.disks.items():
                self.sums[disk_id] = sha256_of_both(view, replica, self.work.watch)

    def _is_over(self) -> bool:
        return time.monotonic() - self._begun >= self.limit

    def _note_proved(self) -> None:
        disks = {disk_id: proof.to_facts() for disk_id, proof in self.proofs.items()}
        self.work.facts[_PROVED] = {"points": self.points, "disks": disks}

    def _save_at_times(self) -> None:
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self._note_proved()
            self.work.save()
            self._saved = time.monotonic()
            reach("verify.saved")


def _worth_slicing(slices: Sequence[_Slice]) -> bool:
    """Whether slices will finish. They do not if the guest changes data as fast as it is compared; then the rest is
    compared in one view, however long it takes."""
    if len(slices) < 2:
        return True
    before, last = slices[-2], slices[-1]
    return before.missing - last.missing >= before.compared / 2 > 0


def _facts(proof: DiskProof, sums: tuple[str, str] | None) -> dict[str, object]:
    reported: dict[str, object] = {
        "size": proof.size,
        "equal": not proof.different,
        "different_bytes": total(proof.different),
        "digest": proof.algorithm,
        "source_digest": proof.source_digest,
        "replica_digest": proof.replica_digest,
    }
    if sums is not None:
        reported["source_sha256"], reported["replica_sha256"] = sums
    return reported


def _interrupted(work: Work) -> Mapping[str, object] | None:
    """What this job had compared when it was killed, or the previous job when it failed."""
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
