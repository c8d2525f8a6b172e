"""The inventory role: enrolled servers, their power as far as an agent shows it, and quarantine."""

from __future__ import annotations

import contextlib
import time

import attrs

from asr_driver_physical.errors import OddReport
from asr_driver_physical.servers import reports
from asr_driver_physical.servers.identity import FenceRecord, ServerRecord
from asr_driver_physical.servers.machine import check_same, machine_of
from asr_driver_physical.servers.servers import Servers
from asr_driver_physical.settings import DRIVER
from asrcore.driver import Fence, Inventory
from asrcore.errors import AsrError, ShutdownFailed, SiteUnreachable, UnsupportedOperation
from asrcore.model.machine import Description, Machine, PowerState

__all__ = ["PhysicalInventory"]


class PhysicalInventory(Inventory):
    """Of one site. A server whose agent is connected is running; the state of any other is unknown."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    def machines(self) -> list[Machine]:
        """All enrolled servers, as they last reported."""
        connected = self._servers.gateway.connected()
        records = [record for record in self._servers.identity.servers() if record.facts]
        return [self._machine(record, record.name in connected) for record in records]

    def machine(self, machine_id: str) -> Machine:
        """One server; asked now if it is connected. Raises MachineNotFound."""
        record = self._servers.server(machine_id)
        connected = record.name in self._servers.gateway.connected()
        if connected:
            with contextlib.suppress(AsrError):
                answer, _ = self._servers.gateway.call(record.name, "machine", {})
                reported = reports.machine(record.name, answer)
                check_same(record, reported)
                return machine_of(record, reported, PowerState.RUNNING)
        return self._machine(record, connected)

    @staticmethod
    def _machine(record: ServerRecord, connected: bool) -> Machine:
        if not record.facts:
            raise OddReport(server=record.name, detail="its record has no facts that can be used")
        return machine_of(record, record.facts["machine"], PowerState.RUNNING if connected else PowerState.UNKNOWN)

    def description(self, machine_id: str) -> Description:
        """Neutral values: a replica becomes a machine of the target's platform."""
        return Description(self.machine(machine_id), DRIVER)

    def power_on(self, machine_id: str) -> None:
        """Not offered: no agent runs on a server that is off."""
        self._servers.server(machine_id)
        raise UnsupportedOperation(driver=DRIVER, operation="switch on a physical server: do it manually")

    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        """Through the agent. A server whose agent is not connected looks the same as one that is off."""
        record = self._servers.server(machine_id)
        gateway = self._servers.gateway
        gateway.call(record.name, "power-off", {"graceful": graceful}, timeout=timeout)
        end = time.monotonic() + timeout
        while record.name in gateway.connected():
            if time.monotonic() > end:
                raise ShutdownFailed(machine=record.name, seconds=timeout)
            time.sleep(0.2)

    def fence(self, machine_id: str, fence: Fence) -> None:
        """Recorded first: a server that connects later is shut down then. Raises SiteUnreachable while it is not
        connected, since it may still run."""
        record = self._servers.server(machine_id)

        def fenced(record: ServerRecord) -> ServerRecord:
            if record.fence is not None and fence.epoch < record.fence.epoch:
                return record
            return attrs.evolve(record, fence=FenceRecord(fence.epoch, fence.reason))

        self._servers.identity.change(record.name, fenced)
        if record.name in self._servers.gateway.connected():
            self.power_off(machine_id, graceful=True, timeout=120.0)
            return
        detail = f"server {record.name} is not connected; it is shut down as soon as it connects"
        raise SiteUnreachable(site=self._servers.name, detail=detail)

    def unfence(self, machine_id: str, epoch: int) -> None:
        """See Inventory."""

        def unfenced(record: ServerRecord) -> ServerRecord:
            if record.fence is None or record.fence.epoch > epoch:
                return record
            return attrs.evolve(record, fence=None)

        self._servers.identity.change(self._servers.server(machine_id).name, unfenced)

    def fenced(self, machine_id: str) -> Fence | None:
        """See Inventory."""
        fence = self._servers.server(machine_id).fence
        return None if fence is None else Fence(fence.epoch, fence.reason)
