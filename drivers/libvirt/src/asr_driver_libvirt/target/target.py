"""The target role: replicas in the site's replica directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from asr_driver_libvirt.failover import drill, promotion
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.settings import DRIVER
from asr_driver_libvirt.target import readiness, seed
from asr_storage.files.durable import fsync_directory, remove_tree
from asr_storage.files.errors import storage_errors
from asr_storage.replica.replica import FileReplica, checked_disks
from asr_storage.replica.store import FORMAT, Layout, Record, Shared, probe_kind
from asrcore.crashpoint import reach
from asrcore.driver import Capacity, Failover, PromoteSpec, Replica, ReplicaSpec, Target
from asrcore.errors import StaleEpoch, UnsupportedOperation, WrongState
from asrcore.model.finding import Finding
from asrcore.model.machine import Description
from asrcore.model.policy import Policy
from asrcore.model.watch import Watch

__all__ = ["LibvirtTarget"]


class LibvirtTarget(Target):
    """Replicas as files in `replica_dir`, a directory of this host."""

    def __init__(self, host: LibvirtHost, failover: Failover, clock: Callable[[], float] = time.time) -> None:
        """Raises UnsupportedOperation where the site has no replica directory."""
        if host.settings.replica_dir is None:
            raise UnsupportedOperation(driver=DRIVER, operation="be a target: its setting replica_dir is not set")
        self._host = host
        self._failover = failover
        self._clock = clock
        self.layout = Layout(host.settings.replica_dir, DRIVER, host.name, host.settings.replica_mark)

    def details(self) -> dict[str, str]:
        """Facts for people about the directory. Raises InvalidSetting, TargetReadOnly."""
        with storage_errors(self._host.name, self.layout.path, "probing the replica directory"):
            self.layout.check()
            return {"replica kind": probe_kind(self.layout.path).value}

    def findings(self, description: Description, policy: Policy) -> list[Finding]:
        """See Target."""
        return readiness.findings(self._host, self.layout, description, policy)

    def failover_findings(self, spec: PromoteSpec) -> list[Finding]:
        """See Target."""
        super().failover_findings(spec)
        description = self.replica(spec.replica_id).description(spec.point_id)
        return readiness.failover_findings(self._host, self.layout, description, spec)

    def capacity(self) -> Capacity:
        """See Target. Raises InvalidSetting when the directory is not there."""
        with storage_errors(self._host.name, self.layout.path, "asking for free space"):
            self.layout.check()
            status = os.statvfs(self.layout.path)
        return Capacity(total=status.f_blocks * status.f_frsize, free=status.f_bavail * status.f_frsize)

    def create_replica(self, spec: ReplicaSpec, watch: Watch) -> Replica:
        """See Target. Raises StaleEpoch, TargetFull, TargetReadOnly, WrongState when the seed is running."""
        home = self.layout.home(spec.replica_id)
        disks = checked_disks({disk.id: disk.size for disk in spec.description.machine.disks})
        with storage_errors(self._host.name, self.layout.path, "creating a replica"):
            self.layout.prepare()
            if not (home.path / "replica.json").exists():
                self._create(spec)
        reach("target.created")
        replica = FileReplica(self._host.name, home, self._clock)
        with replica.working("creating a replica") as found:
            record = found
            if spec.epoch < record.epoch:
                raise StaleEpoch(replica=spec.replica_id, epoch=spec.epoch, owner=record.epoch)
            if record.head is None and not record.heads:
                record = replica.images(record).open_heads(record, disks)
                home.save(record)
            if record.head is None and record.seed is not None:
                seed.seed(self._host, home, record, watch)
        reach("target.seeded")
        return replica

    def _create(self, spec: ReplicaSpec) -> None:
        home = self.layout.home(spec.replica_id)
        remove_tree(home.path)  # left by a crash: without a record it holds nothing
        building = self.layout.replicas / f".new-{spec.replica_id}"
        remove_tree(building)
        building.mkdir(0o711)
        for part in ("images", "points", "tests"):
            (building / part).mkdir(0o711)
        record = Record(
            format=FORMAT,
            replica_id=spec.replica_id,
            name=spec.name,
            epoch=spec.epoch,
            kind=probe_kind(building),
            disks={disk.id: disk.size for disk in spec.description.machine.disks},
            heads={},
            seed=spec.seed_machine,
        )
        type(home)(building).save(record)
        building.rename(home.path)
        fsync_directory(self.layout.replicas)

    def replica(self, replica_id: str) -> Replica:
        """See Target."""
        replica = FileReplica(self._host.name, self.layout.existing(self._host.name, replica_id), self._clock)
        with replica.errors("opening a replica"):
            replica.home.load()
        return replica

    def replicas(self) -> list[str]:
        """See Target. A missing directory has none. Raises ReplicaDirNotMounted."""
        if self._host.settings.replica_mark:
            self.layout.check()
        if not self.layout.replicas.is_dir():
            return []
        with storage_errors(self._host.name, self.layout.path, "listing replicas"):
            found = (path for path in self.layout.replicas.iterdir() if not path.name.startswith("."))
            return sorted(path.name for path in found if (path / "replica.json").exists())

    def delete_replica(self, replica_id: str, epoch: int) -> None:
        """See Target. Tests of it are stopped first. Raises WrongState while it has a machine that is not committed."""
        home = self.layout.home(replica_id)
        if not home.path.exists():
            return
        replica = FileReplica(self._host.name, home, self._clock)
        with replica.errors("deleting a replica"):
            if (home.path / "replica.json").exists():
                replica.check_epoch(home.load(), epoch)
            promoted = promotion.load(home)
            if promoted is not None:
                raise WrongState(
                    machine=promoted.name,
                    event="have its replica deleted",
                    state="failed over",
                    reason="The machine at the target still stands on the replica.",
                    possible="commit or undo the failover",
                )
        for test_id in drill.test_ids(home):
            self._failover.stop_test(replica_id, test_id)
        with replica.errors("deleting a replica"), Shared.of(home).working():
            reach("target.delete.begin")
            remove_tree(home.path)
        reach("target.delete.done")
