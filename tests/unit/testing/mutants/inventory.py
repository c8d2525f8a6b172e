"""Inventories that are broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from asrcore.driver import (
    Fence,
)
from asrcore.errors import DriverFailed
from asrcore.model.machine import Description, Machine, PowerState
from asrcore.testing.memory._inventory import MemoryInventory

from ._mutant import caught_by


@contextmanager
def _without_stopping(inventory: MemoryInventory, machine_id: str) -> Iterator[None]:
    power = inventory.machine(machine_id).power
    yield
    with inventory._session.change() as state:
        state.machine(machine_id).power = power


@caught_by(
    "test_a_fence_stops_the_machine_and_is_recorded",
    "test_a_fenced_machine_is_not_started",
    "test_fencing_again_stops_a_machine_that_was_started",
    "test_unfence_takes_fences_up_to_its_epoch",
)
class FenceDoesNotStop(MemoryInventory):
    def fence(self, machine_id: str, fence: Fence) -> None:
        with _without_stopping(self, machine_id):
            super().fence(machine_id, fence)


@caught_by("test_fencing_again_stops_a_machine_that_was_started")
class FencingAgainIsSkipped(MemoryInventory):
    def fence(self, machine_id: str, fence: Fence) -> None:
        if self.fenced(machine_id) != fence:
            super().fence(machine_id, fence)


@caught_by("test_a_fence_of_a_lower_epoch_changes_nothing")
class LowerFenceTakesOver(MemoryInventory):
    def fence(self, machine_id: str, fence: Fence) -> None:
        self.unfence(machine_id, 1000)
        super().fence(machine_id, fence)


@caught_by("test_a_fenced_machine_is_not_started")
class FencedMachineStarts(MemoryInventory):
    def power_on(self, machine_id: str) -> None:
        with self._session.change() as state:
            state.machine(machine_id).power = PowerState.RUNNING


@caught_by("test_unfence_takes_fences_up_to_its_epoch")
class UnfenceStarts(MemoryInventory):
    def unfence(self, machine_id: str, epoch: int) -> None:
        super().unfence(machine_id, epoch)
        if self.fenced(machine_id) is None:
            self.power_on(machine_id)


@caught_by("test_an_ignored_shutdown_fails_and_leaves_it_running")
class IgnoredShutdownIsForced(MemoryInventory):
    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        super().power_off(machine_id, graceful=False, timeout=timeout)


@caught_by("test_the_machine_is_listed")
class DisksAreNotListed(MemoryInventory):
    def machines(self) -> list[Machine]:
        return [attrs.evolve(machine, disks=()) for machine in super().machines()]


@caught_by(
    "test_disks_have_ids_and_sizes",
    "test_the_description_is_of_the_machine",
    "test_the_machine_is_listed",
)
class DisksHaveNoSize(MemoryInventory):
    def machine(self, machine_id: str) -> Machine:
        machine = super().machine(machine_id)
        return attrs.evolve(machine, disks=tuple(attrs.evolve(disk, size=0) for disk in machine.disks))


@caught_by("test_the_description_is_of_the_machine")
class DescriptionHasNoDisks(MemoryInventory):
    def description(self, machine_id: str) -> Description:
        described = super().description(machine_id)
        return attrs.evolve(described, machine=attrs.evolve(described.machine, disks=()))


@caught_by("test_a_missing_machine_is_not_found")
class MissingMachineIsAKeyError(MemoryInventory):
    def machine(self, machine_id: str) -> Machine:
        return {machine.id: machine for machine in self.machines()}[machine_id]


@caught_by("test_power_of_a_missing_machine")
class PowerOfAMissingMachineIsIgnored(MemoryInventory):
    def power_on(self, machine_id: str) -> None:
        if machine_id in {machine.id for machine in self.machines()}:
            super().power_on(machine_id)


@caught_by("test_fence_of_a_missing_machine")
class FenceOfAMissingMachineIsIgnored(MemoryInventory):
    def unfence(self, machine_id: str, epoch: int) -> None:
        if machine_id in {machine.id for machine in self.machines()}:
            super().unfence(machine_id, epoch)


@caught_by("test_power_off_and_on_may_be_repeated")
class SecondPowerOffFails(MemoryInventory):
    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        if self.machine(machine_id).power is PowerState.OFF:
            raise DriverFailed(operation="stop", site=self._session.site, detail="it is off")
        super().power_off(machine_id, graceful=graceful, timeout=timeout)


@caught_by("test_a_fence_is_recorded_at_the_site")
class FenceDiesWithTheEngine(MemoryInventory):
    def fenced(self, machine_id: str) -> Fence | None:
        fence = super().fenced(machine_id)
        known = self._session.__dict__.setdefault("fences", set())
        return fence if machine_id in known else None

    def fence(self, machine_id: str, fence: Fence) -> None:
        super().fence(machine_id, fence)
        self._session.__dict__.setdefault("fences", set()).add(machine_id)
