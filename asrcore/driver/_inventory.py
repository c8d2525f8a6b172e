"""The inventory role: machines, their power, and quarantine."""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs

from asrcore.model.machine import Description, Machine

__all__ = ["Fence", "Inventory"]


@attrs.frozen
class Fence:
    """A machine quarantined at a site: the epoch that took its ownership away, and why."""

    epoch: int
    reason: str


class Inventory(ABC):
    """Discovery, power and quarantine. A missing machine raises MachineNotFound."""

    @abstractmethod
    def machines(self) -> list[Machine]:
        """All machines of the site, replicas under test included."""

    @abstractmethod
    def machine(self, machine_id: str) -> Machine:
        """One machine as it is now."""

    def description(self, machine_id: str) -> Description:
        """The machine with the artifacts that its platform can give now, for readiness and a replica's creation.
        What a recovery point needs comes with the frozen view."""
        return Description(self.machine(machine_id), platform="")

    @abstractmethod
    def power_on(self, machine_id: str) -> None:
        """Start it; a running machine is left alone. Raises WrongState when it is fenced."""

    @abstractmethod
    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        """Stop it; a stopped machine is left alone. Graceful asks the guest and raises ShutdownFailed after
        `timeout` seconds with the machine still running; otherwise the power is cut."""

    @abstractmethod
    def fence(self, machine_id: str, fence: Fence) -> None:
        """Quarantine: stop it at once, keep it from starting with its host, and record the fence at the site.

        Repeating is a repair: a fenced machine that runs again is stopped again. A lower epoch changes nothing.
        """

    @abstractmethod
    def unfence(self, machine_id: str, epoch: int) -> None:
        """Remove a fence of at most `epoch`; the machine is not started."""

    @abstractmethod
    def fenced(self, machine_id: str) -> Fence | None:
        """The fence recorded at the site, or None."""
