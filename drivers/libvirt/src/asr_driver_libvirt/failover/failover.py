"""The failover role: machines created from recovery points."""

from __future__ import annotations

import time
from collections.abc import Callable

from asr_driver_libvirt.failover import drill, promotion
from asr_driver_libvirt.failover.instances import Platform
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.settings import DRIVER
from asr_storage.replica.replica import FileReplica
from asr_storage.replica.store import Layout, checked_id
from asrcore.driver import Failover, Instance, PromoteSpec, TestSpec
from asrcore.errors import UnsupportedOperation
from asrcore.model.watch import Watch

__all__ = ["LibvirtFailover"]


class LibvirtFailover(Failover):
    """Domains whose disks are clones of a point, or overlays on it."""

    def __init__(self, host: LibvirtHost, clock: Callable[[], float] = time.time) -> None:
        """Raises UnsupportedOperation where the site has no replica directory."""
        if host.settings.replica_dir is None:
            raise UnsupportedOperation(driver=DRIVER, operation="run replicas: its setting replica_dir is not set")
        self._host = host
        self._platform = Platform(host)
        self._clock = clock
        self._layout = Layout(host.settings.replica_dir, DRIVER, host.name, host.settings.replica_mark)

    def _replica(self, replica_id: str) -> FileReplica:
        return FileReplica(self._host.name, self._layout.existing(self._host.name, replica_id), self._clock)

    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        """See Failover. Raises AlreadyExists for a name that is taken, InvalidValue for an unknown network."""
        return drill.start(self._platform, self._replica(spec.replica_id), spec, watch)

    def stop_test(self, replica_id: str, test_id: str) -> None:
        """See Failover."""
        if not self._layout.home(replica_id).path.is_dir():
            return
        drill.stop(self._platform, self._replica(replica_id), checked_id("test id", test_id))

    def tests(self, replica_id: str) -> list[str]:
        """See Failover."""
        return drill.test_ids(self._layout.home(replica_id))

    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        """See Failover. Raises AlreadyExists when a machine that is not fenced has its identity, WrongState when
        it is to be replaced but runs, PointNotFound, StaleEpoch."""
        return promotion.promote(self._platform, self._layout, self._replica(spec.replica_id), spec, watch)

    def undo(self, replica_id: str, epoch: int) -> None:
        """See Failover. A replica that is not promoted is left alone."""
        promotion.undo(self._platform, self._replica(replica_id), epoch)

    def commit(self, replica_id: str, epoch: int, watch: Watch) -> None:
        """See Failover. A missing replica was committed already. Its tests are ended."""
        if not self._layout.home(replica_id).path.is_dir():
            return
        replica = self._replica(replica_id)
        for test_id in drill.test_ids(replica.home):
            drill.stop(self._platform, replica, test_id)
        promotion.commit(self._platform, self._layout, replica, epoch, watch)
