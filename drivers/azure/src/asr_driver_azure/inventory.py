"""Machines of the resource group, their power, and quarantine."""

from __future__ import annotations

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.machines.builder import Builder
from asr_driver_azure.machines.machines import Machines
from asrcore.crashpoint import reach
from asrcore.driver import Fence, Inventory
from asrcore.errors import ShutdownFailed, TimedOut, WrongState
from asrcore.model.machine import Description, Machine, PowerState

__all__ = ["AzureInventory"]


class AzureInventory(Inventory):
    """See `Inventory`."""

    def __init__(self, account: AzureAccount, machines: Machines) -> None:
        self._account = account
        self._machines = machines
        self._arm = account.arm

    def machines(self) -> list[Machine]:
        return [item.machine for item in self._machines.all()]

    def machine(self, machine_id: str) -> Machine:
        return self._machines.describe(machine_id).machine

    def description(self, machine_id: str) -> Description:
        return self._machines.describe(machine_id)

    def power_on(self, machine_id: str) -> None:
        name = self._machines.name(machine_id)
        fence = self._machines.fenced(machine_id)
        if fence is not None:
            raise WrongState(
                machine=machine_id,
                event="be started",
                state="quarantined",
                reason=f"It was quarantined at epoch {fence.epoch}: {fence.reason}.",
                possible="re-protect it, or undo the failover",
            )
        if self._machines.power(name) is PowerState.RUNNING:
            return
        known = self._machines.defined(name)
        if known is None:
            self._arm.start(name)
        else:
            Builder(self._account).start(known)

    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        name = self._machines.name(machine_id)
        if graceful and self._machines.runs(name):
            try:
                self._arm.shut_down(name, timeout)
            except TimedOut as problem:
                if self._machines.runs(name):
                    raise ShutdownFailed(machine=machine_id, seconds=timeout) from problem
        self._stop(name)

    def _stop(self, name: str) -> None:
        # A machine that is only stopped is billed as if it were running.
        if self._arm.power(name) not in ("", "deallocated"):
            self._arm.deallocate(name)
        reach("azure.machine.stopped")

    def fence(self, machine_id: str, fence: Fence) -> None:
        name = self._machines.name(machine_id)
        known = self._machines.fenced(machine_id)
        if known is not None and known.epoch > fence.epoch:
            return
        self._machines.fence(machine_id, fence)
        reach("azure.fence.recorded")
        self._stop(name)

    def unfence(self, machine_id: str, epoch: int) -> None:
        self._machines.name(machine_id)
        self._machines.unfence(machine_id, epoch)

    def fenced(self, machine_id: str) -> Fence | None:
        return self._machines.fenced(machine_id)
