"""Discovery, power and quarantine in a memory world."""

from __future__ import annotations

from asrcore.crashpoint import reach
from asrcore.driver import Capability, Fence, Inventory
from asrcore.errors import DriverFailed, ShutdownFailed, WrongState
from asrcore.model.machine import Description, Machine, PowerState
from asrcore.testing.memory._session import Session

__all__ = ["MemoryInventory"]


class MemoryInventory(Inventory):
    """See `Inventory`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def machines(self) -> list[Machine]:
        with self._session.look() as state:
            return [machine.value for machine in state.machines.values()]

    def machine(self, machine_id: str) -> Machine:
        with self._session.look() as state:
            return state.machine(machine_id).value

    def description(self, machine_id: str) -> Description:
        with self._session.look() as state:
            return state.machine(machine_id).description

    def power_on(self, machine_id: str) -> None:
        self._session.need(Capability.POWER, "start machines")
        with self._session.change() as state:
            machine = state.machine(machine_id)
            if machine.fence is not None:
                raise WrongState(
                    machine=machine.base.name,
                    event="be started",
                    state="fenced",
                    reason=f"It was quarantined: {machine.fence.reason}.",
                    possible="remove the fence first",
                )
            if state.refuses_start and machine.power is not PowerState.RUNNING:
                raise DriverFailed(operation="starting a machine", site=self._session.site, detail=state.refuses_start)
            machine.power = PowerState.RUNNING
        reach("inventory.powered-on")

    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        self._session.need(Capability.POWER, "stop machines")
        with self._session.change() as state:
            machine = state.machine(machine_id)
            if machine.power is PowerState.OFF:
                return
            if graceful and machine.ignores_shutdown:  # no time passes here: the limit is reached at once
                raise ShutdownFailed(machine=machine.base.name, seconds=timeout)
            machine.power = PowerState.OFF
        reach("inventory.powered-off")

    def fence(self, machine_id: str, fence: Fence) -> None:
        self._session.need(Capability.FENCE, "fence machines")
        with self._session.change() as state:
            machine = state.machine(machine_id)
            if machine.fence is not None and fence.epoch < machine.fence.epoch:
                return
            machine.fence = fence
            machine.power = PowerState.OFF
            machine.autostart = False
        reach("inventory.fenced")

    def unfence(self, machine_id: str, epoch: int) -> None:
        self._session.need(Capability.FENCE, "fence machines")
        with self._session.change() as state:
            machine = state.machine(machine_id)
            if machine.fence is not None and machine.fence.epoch <= epoch:
                machine.fence = None
        reach("inventory.unfenced")

    def fenced(self, machine_id: str) -> Fence | None:
        self._session.need(Capability.FENCE, "fence machines")
        with self._session.look() as state:
            return state.machine(machine_id).fence
