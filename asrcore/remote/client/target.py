"""Target and failover of a site that is served elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from asrcore.driver import (
    DIGEST_BLOCK,
    DIGEST_SIZE,
    Capacity,
    CycleSpec,
    CycleWriter,
    Digest,
    DiskReader,
    Examination,
    Failover,
    Instance,
    PromoteSpec,
    Replica,
    ReplicaInfo,
    ReplicaSpec,
    Target,
    TestSpec,
    different_blocks,
    digest_of,
)
from asrcore.errors import UnsupportedOperation
from asrcore.model.extent import Extent, normalise, split
from asrcore.model.finding import Finding
from asrcore.model.machine import Description
from asrcore.model.policy import Policy
from asrcore.model.watch import Watch
from asrcore.remote import calls
from asrcore.remote.client.peer import Peer
from asrcore.remote.client.source import RemoteReader, digests
from asrcore.remote.client.writer import RemoteWriter
from asrcore.units import MiB

__all__ = ["RemoteFailover", "RemoteTarget"]

_COMPARE = 64 * MiB


class RemoteTarget(Target):
    """See `Target`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def findings(self, description: Description, policy: Policy) -> list[Finding]:
        result: list[Finding] = self._peer.plain("target.findings", description=description, policy=policy)
        return result

    def failover_findings(self, spec: PromoteSpec) -> list[Finding]:
        try:
            result: list[Finding] = self._peer.plain("target.failover_findings", spec=spec)
        except UnsupportedOperation:  # a master target of an older version, which does not know the call
            return super().failover_findings(spec)
        return result

    def capacity(self) -> Capacity:
        result: Capacity = self._peer.plain("target.capacity")
        return result

    def create_replica(self, spec: ReplicaSpec, watch: Watch) -> Replica:
        self._peer.ask("target.create_replica", {"spec": calls.plain(spec)}, watch=watch)
        return RemoteReplica(self._peer, spec.replica_id)

    def replica(self, replica_id: str) -> Replica:
        self._peer.ask("target.replica", {"replica": replica_id})
        return RemoteReplica(self._peer, replica_id)

    def replicas(self) -> list[str]:
        result: list[str] = self._peer.plain("target.replicas")
        return result

    def delete_replica(self, replica_id: str, epoch: int) -> None:
        self._peer.plain("target.delete_replica", replica_id=replica_id, epoch=epoch)


class RemoteReplica(Replica):
    """See `Replica`."""

    hashes_at_target = True

    def __init__(self, peer: Peer, replica_id: str, *, from_records: bool = False) -> None:
        self._peer = peer
        self._id = replica_id
        self._records = {"records": "yes"} if from_records else {}

    def info(self) -> ReplicaInfo:
        result: ReplicaInfo = self._peer.plain("replica.info", replica=self._id)
        return result

    def raise_epoch(self, epoch: int) -> None:
        self._peer.plain("replica.raise_epoch", replica=self._id, epoch=epoch)

    def open_cycle(self, spec: CycleSpec) -> CycleWriter:
        answer = self._peer.ask("replica.open_cycle", {"replica": self._id, "spec": calls.plain(spec)})
        return RemoteWriter(self._peer, str(answer.head.get("handle")))

    def drop_points(self, point_ids: Iterable[str], epoch: int, watch: Watch | None = None) -> None:
        self._peer.plain("replica.drop_points", watch, replica=self._id, point_ids=list(point_ids), epoch=epoch)

    def pin(self, point_id: str, pinned: bool) -> None:
        self._peer.plain("replica.pin", replica=self._id, point_id=point_id, pinned=pinned)

    def description(self, point_id: str) -> Description:
        result: Description = self._peer.plain("replica.description", replica=self._id, point_id=point_id)
        return result

    def examine(
        self, point_id: str, *, start: int | None = None, limit: int | None = None, watch: Watch | None = None
    ) -> Examination:
        try:
            result: Examination = self._peer.plain(
                "replica.examine", watch, replica=self._id, point_id=point_id, start=start, limit=limit
            )
        except UnsupportedOperation:  # a master target of an older version
            return super().examine(point_id, start=start, limit=limit, watch=watch)
        return result

    def mark_damaged(self, point_id: str, damaged: str, epoch: int | None = None) -> None:
        with suppress(UnsupportedOperation):
            self._peer.plain("replica.mark_damaged", replica=self._id, point_id=point_id, damaged=damaged, epoch=epoch)

    def from_records(self) -> Replica:
        """See Replica. A master target of an older version reads, and answers the same."""
        return RemoteReplica(self._peer, self._id, from_records=True)

    def allocated(self, disk_id: str) -> list[Extent]:
        return self._peer.extents("replica.allocated", {"replica": self._id, "disk": disk_id})

    def reader(self, disk_id: str, point_id: str | None = None) -> DiskReader:
        return RemoteReader(self._peer, "replica.reader", {"replica": self._id, "disk": disk_id, "point": point_id})

    def digests(self, disk_id: str, extent: Extent, digest: Digest = Digest.BLAKE3) -> bytes:
        names = {"replica": self._id, "disk": disk_id, "digest": digest.value, **self._records}
        return digests(self._peer, "replica.digests", names, extent)

    def compare(self, disk_id: str, extent: Extent, ours: bytes, digest: Digest = Digest.BLAKE3) -> list[Extent]:
        """See Replica. One digest of the digests is sent; the other side's digests come back only if it differs."""
        found: list[Extent] = []
        for part in split([extent], _COMPARE):
            first = (part.offset - extent.offset) // DIGEST_BLOCK * DIGEST_SIZE
            count = -(-part.length // DIGEST_BLOCK) * DIGEST_SIZE
            found += self._compare(disk_id, part, ours[first : first + count], digest)
        return normalise(found)

    def _compare(self, disk_id: str, part: Extent, ours: bytes, digest: Digest) -> list[Extent]:
        asked = {
            "replica": self._id,
            "disk": disk_id,
            "offset": part.offset,
            "length": part.length,
            "digest": digest.value,
            **self._records,
        }
        channel = self._peer.links.channel(self._peer.next_index())
        answer = channel.ask("replica.compare", asked, digest_of(ours, digest))
        return [] if answer.head.get("same") else different_blocks(part, ours, bytes(answer.body))


class RemoteFailover(Failover):
    """See `Failover`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        result: Instance = self._peer.plain("failover.start_test", watch, spec=spec)
        return result

    def stop_test(self, replica_id: str, test_id: str) -> None:
        self._peer.plain("failover.stop_test", replica_id=replica_id, test_id=test_id)

    def tests(self, replica_id: str) -> list[str]:
        result: list[str] = self._peer.plain("failover.tests", replica_id=replica_id)
        return result

    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        result: Instance = self._peer.plain("failover.promote", watch, spec=spec)
        return result

    def undo(self, replica_id: str, epoch: int) -> None:
        self._peer.plain("failover.undo", replica_id=replica_id, epoch=epoch)

    def commit(self, replica_id: str, epoch: int, watch: Watch) -> None:
        self._peer.plain("failover.commit", watch, replica_id=replica_id, epoch=epoch)
