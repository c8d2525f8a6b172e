"""The target role: replicas as page blobs of one container."""

from __future__ import annotations

import attrs

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs.record import FORMAT, REPLICAS, DiskAt, Record, checked_id, disk_blob, lease_of
from asr_driver_azure.target import readiness
from asr_driver_azure.target.replica import AzureReplica, checked_size
from asrcore.crashpoint import reach
from asrcore.driver import Capacity, Failover, PromoteSpec, Replica, ReplicaSpec, Target
from asrcore.errors import ReplicaNotFound, StaleEpoch, UnsupportedOperation, WrongState
from asrcore.model.extent import total
from asrcore.model.finding import Finding
from asrcore.model.machine import Description
from asrcore.model.policy import Policy
from asrcore.model.watch import Watch
from asrcore.units import format_size

__all__ = ["AzureTarget"]


class AzureTarget(Target):
    """See `Target`."""

    def __init__(self, account: AzureAccount, failover: Failover) -> None:
        self._account = account
        self._failover = failover
        self._container = account.container

    def findings(self, description: Description, policy: Policy) -> list[Finding]:
        return readiness.findings(self._account, description, policy)

    def failover_findings(self, spec: PromoteSpec) -> list[Finding]:
        super().failover_findings(spec)
        description = self.replica(spec.replica_id).description(spec.point_id)
        return readiness.failover_findings(self._account, description, spec.networks)

    def capacity(self) -> Capacity:
        return Capacity(None, None)

    def stored(self) -> str:
        """What is stored, for people: that is what is billed."""
        replicas, points, held = 0, 0, 0
        for replica_id in self._container.folders(REPLICAS):
            loaded = self._container.load(replica_id)
            if loaded is None:
                continue
            record = loaded.record
            replicas += 1
            points += len(record.points)
            for disk in record.head.disks.values() if record.head else ():
                held += total(self._container.page_blob(disk.blob, disk.snapshot).stored(disk.size))
        return f"{replicas} replicas, {points} points; {format_size(held)} in the newest, and changes in older ones"

    def create_replica(self, spec: ReplicaSpec, watch: Watch) -> Replica:
        if spec.seed_machine is not None:
            raise UnsupportedOperation(driver=self._account.driver, operation="start a replica from a machine's disks")
        record = Record(
            format=FORMAT,
            replica_id=checked_id("replica id", spec.replica_id),
            name=spec.name,
            epoch=spec.epoch,
            disks={
                disk.id: DiskAt(disk_blob(spec.replica_id, disk.id, "first"), checked_size(disk.id, disk.size))
                for disk in spec.description.machine.disks
            },
            leases=(spec.epoch,),
        )
        self._account.make_container()
        self._container.create(record)
        reach("azure.replica.recorded")
        replica = AzureReplica(self._account, spec.replica_id)
        found = replica.record()
        if spec.epoch < found.epoch:
            raise StaleEpoch(replica=spec.replica_id, epoch=spec.epoch, owner=found.epoch)
        if not found.points and found.pending is None:
            replica.create_blobs(found)
        reach("azure.replica.created")
        return replica

    def replica(self, replica_id: str) -> Replica:
        replica = AzureReplica(self._account, replica_id)
        replica.record()
        return replica

    def replicas(self) -> list[str]:
        found = []
        for replica_id in self._container.folders(REPLICAS):
            loaded = self._container.load(replica_id)
            if loaded is not None and not loaded.record.deleting:
                found.append(replica_id)
        return sorted(found)

    def delete_replica(self, replica_id: str, epoch: int) -> None:
        def leave(record: Record) -> Record:
            record.own(epoch)
            if record.promotion is not None and not record.promotion.committing:
                raise WrongState(
                    machine=record.name,
                    event="have its replica deleted",
                    state="failed over, not committed",
                    reason="The failover could no longer be undone.",
                    possible="commit or undo the failover first",
                )
            return attrs.evolve(record, deleting=True)

        try:
            record = self._container.change(replica_id, self._account.name, leave).record
        except ReplicaNotFound:
            loaded = self._container.load(replica_id)
            if loaded is None:
                return
            record = loaded.record
            record.own(epoch)
        reach("azure.replica.leaving")
        for test_id in record.tests:
            self._failover.stop_test(replica_id, test_id)
        self._container.erase(record, [lease_of(replica_id, item) for item in record.leases])
        reach("azure.replica.deleted")
