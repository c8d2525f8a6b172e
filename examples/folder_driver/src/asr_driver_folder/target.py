"""Replicas, as folders below `.asr/replicas`."""

from __future__ import annotations

import shutil
from pathlib import Path

import attrs

from asr_driver_folder import files
from asr_driver_folder.inventory import FolderInventory
from asr_driver_folder.replica import FolderReplica, Record
from asrcore.crashpoint import reach
from asrcore.driver import Capacity, ReplicaSpec, Target
from asrcore.errors import WrongState
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Description, PowerState
from asrcore.model.policy import Policy
from asrcore.model.watch import Watch

__all__ = ["FolderTarget"]


@attrs.frozen
class FolderTarget(Target):
    """See `Target`."""

    inventory: FolderInventory

    def findings(self, description: Description, policy: Policy) -> list[Finding]:
        machine_id = description.machine.id
        if not (self.inventory.place.path / machine_id).exists() or self.inventory.fenced(machine_id):
            return []
        what, cause = f"{machine_id!r} exists at the target too", "A failover would need its folder."
        return [Finding("machine-exists", Severity.ERROR, what, cause, "Remove or rename it there.")]

    def capacity(self) -> Capacity:
        usage = shutil.disk_usage(self.inventory.place.path)
        return Capacity(usage.total, usage.free)

    def create_replica(self, spec: ReplicaSpec, watch: Watch) -> FolderReplica:
        path = self.inventory.place.ours("replicas", spec.replica_id)
        if not (path / "replica.json").exists():
            with self.inventory.place.writing(path):
                self._create(path, spec, watch)
        return self.replica(spec.replica_id)

    def _create(self, path: Path, spec: ReplicaSpec, watch: Watch) -> None:
        shutil.rmtree(path, ignore_errors=True)  # of a creation that was killed
        for folder in ("created", "points", "cycles"):
            (path / folder).mkdir(parents=True)
        disks = {disk.id: disk.size for disk in spec.description.machine.disks}
        for disk_id, size in disks.items():
            seed = self._seed(spec.seed_machine) / f"{disk_id}.raw" if spec.seed_machine else None
            parts = [(seed, files.data(seed))] if seed and seed.exists() else []
            files.build(path / "created" / f"{disk_id}.raw", size, *parts)
            watch.advance(size)
        files.sync(path / "created")
        files.sync(path.parent)
        reach("folder.replica-built")
        files.save(path / "replica.json", Record(spec.name, spec.epoch, disks))

    def _seed(self, machine_id: str) -> Path:
        if self.inventory.machine(machine_id).power is not PowerState.OFF:
            why, event = "Its disks change while it runs.", "be the first content of a replica"
            raise WrongState(machine=machine_id, event=event, state="running", reason=why, possible="stop it")
        return self.inventory.place.machine(machine_id)

    def replica(self, replica_id: str) -> FolderReplica:
        return FolderReplica(self.inventory.place, replica_id)

    def replicas(self) -> list[str]:
        records = self.inventory.place.ours("replicas").glob("*/replica.json")
        return sorted(record.parent.name for record in records)

    def delete_replica(self, replica_id: str, epoch: int) -> None:
        if replica_id in self.replicas():
            replica = self.replica(replica_id)
            replica.raise_epoch(epoch)
            self.inventory.place.remove(replica.path)
