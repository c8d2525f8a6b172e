"""The kit: the site itself, inventory, power, quarantine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.driver import API, Capability, Fence, Inventory, Site
from asrcore.errors import (
    InvalidSetting,
    MachineNotFound,
    ShutdownFailed,
    SiteUnreachable,
    UnsupportedOperation,
    WrongState,
)
from asrcore.model.machine import PowerState
from asrcore.testing.conformance._base import Base, needs, source_of, target_of, wait_for_power
from asrcore.testing.conformance.rig import ConformanceRig

__all__ = ["InventoryConformance", "SiteConformance"]

POWER, FENCE = Capability.POWER, Capability.FENCE
_ROLES = {Capability.SOURCE: "source", Capability.TARGET: "target", Capability.FAILOVER: "failover"}


class SiteConformance(Base):
    """Connecting, claiming, closing."""

    def _sites(self, rig: ConformanceRig) -> list[Site]:
        return [site for site in (rig.source_site, rig.target_site) if site and site.driver == rig.driver.info.name]

    def test_driver_speaks_this_contract(self, rig: ConformanceRig) -> None:
        assert rig.driver.info.api[0] == API[0]

    def test_sites_claim_only_what_the_driver_offers(self, rig: ConformanceRig) -> None:
        for site in self._sites(rig):
            assert site.status().capabilities <= rig.driver.info.capabilities

    def test_a_role_that_is_not_claimed_is_unsupported(self, rig: ConformanceRig) -> None:
        for site in self._sites(rig):
            for capability in _ROLES.keys() - site.status().capabilities:
                with pytest.raises(UnsupportedOperation):
                    getattr(site, _ROLES[capability])

    def test_a_missing_required_setting_is_told(self, rig: ConformanceRig) -> None:
        if not any(setting.required for setting in rig.driver.info.settings):
            pytest.skip("the driver has no required setting")
        with pytest.raises(InvalidSetting):
            rig.driver.connect("conformance", {})

    def test_a_site_may_be_closed_twice(self, rig: ConformanceRig) -> None:
        sites = self._sites(rig)
        for site in sites:
            site.close()
            site.close()
        rig.restart()

    def test_a_site_that_does_not_answer_is_unreachable(self, rig: ConformanceRig) -> None:
        site = target_of(rig)
        with rig.unreachable_target(), pytest.raises(SiteUnreachable):
            site.status()


class InventoryConformance(Base):
    """The source site's inventory, on the rig's machine."""

    @pytest.fixture
    def inventory(self, rig: ConformanceRig) -> Iterator[Inventory]:
        """Of the source site; the machine runs afterwards and has no fence."""
        yield source_of(rig).inventory
        site = source_of(rig)
        claimed = site.status().capabilities
        if FENCE in claimed:
            fence = site.inventory.fenced(rig.machine_id)
            if fence is not None:
                site.inventory.unfence(rig.machine_id, fence.epoch)
        if POWER in claimed:
            site.inventory.power_on(rig.machine_id)
            wait_for_power(site, rig.machine_id, PowerState.RUNNING, rig.boot_timeout)

    def test_the_machine_is_listed(self, rig: ConformanceRig, inventory: Inventory) -> None:
        listed = {machine.id: machine for machine in inventory.machines()}
        assert listed[rig.machine_id].disks == inventory.machine(rig.machine_id).disks
        assert listed[rig.machine_id].name == inventory.machine(rig.machine_id).name

    def test_disks_have_ids_and_sizes(self, rig: ConformanceRig, inventory: Inventory) -> None:
        disks = inventory.machine(rig.machine_id).disks
        assert disks
        assert len({disk.id for disk in disks}) == len(disks)
        assert all(disk.size > 0 for disk in disks)

    def test_the_description_is_of_the_machine(self, rig: ConformanceRig, inventory: Inventory) -> None:
        description = inventory.description(rig.machine_id)
        assert description.machine.id == rig.machine_id
        assert description.machine.disks == inventory.machine(rig.machine_id).disks

    def test_a_missing_machine_is_not_found(self, inventory: Inventory) -> None:
        with pytest.raises(MachineNotFound):
            inventory.machine("no-such-machine")
        with pytest.raises(MachineNotFound):
            inventory.description("no-such-machine")

    # -- power

    @needs(source=[POWER])
    def test_power_off_and_on_may_be_repeated(self, rig: ConformanceRig, inventory: Inventory) -> None:
        for _ in range(2):
            inventory.power_off(rig.machine_id, graceful=False, timeout=rig.boot_timeout)
            assert inventory.machine(rig.machine_id).power is PowerState.OFF
        for _ in range(2):
            inventory.power_on(rig.machine_id)
            wait_for_power(source_of(rig), rig.machine_id, PowerState.RUNNING, rig.boot_timeout)

    @needs(source=[POWER])
    def test_power_of_a_missing_machine(self, inventory: Inventory) -> None:
        with pytest.raises(MachineNotFound):
            inventory.power_on("no-such-machine")
        with pytest.raises(MachineNotFound):
            inventory.power_off("no-such-machine", graceful=False, timeout=1.0)

    @needs(source=[POWER])
    def test_an_ignored_shutdown_fails_and_leaves_it_running(self, rig: ConformanceRig, inventory: Inventory) -> None:
        with rig.ignore_shutdown(rig.machine_id):
            with pytest.raises(ShutdownFailed):
                inventory.power_off(rig.machine_id, graceful=True, timeout=2.0)
            assert inventory.machine(rig.machine_id).power is PowerState.RUNNING

    # -- quarantine

    @needs(source=[FENCE])
    def test_a_fence_stops_the_machine_and_is_recorded(self, rig: ConformanceRig, inventory: Inventory) -> None:
        assert inventory.fenced(rig.machine_id) is None
        fence = Fence(5, "conformance")
        for _ in range(2):
            inventory.fence(rig.machine_id, fence)
            assert inventory.machine(rig.machine_id).power is PowerState.OFF
            assert inventory.fenced(rig.machine_id) == fence

    @needs(source=[FENCE])
    def test_a_fence_is_recorded_at_the_site(self, rig: ConformanceRig, inventory: Inventory) -> None:
        inventory.fence(rig.machine_id, Fence(5, "conformance"))
        rig.restart()
        assert source_of(rig).inventory.fenced(rig.machine_id) == Fence(5, "conformance")

    @needs(source=[FENCE, POWER])
    def test_a_fenced_machine_is_not_started(self, rig: ConformanceRig, inventory: Inventory) -> None:
        inventory.fence(rig.machine_id, Fence(5, "conformance"))
        with pytest.raises(WrongState):
            inventory.power_on(rig.machine_id)
        assert inventory.machine(rig.machine_id).power is PowerState.OFF

    @needs(source=[FENCE])
    def test_fencing_again_stops_a_machine_that_was_started(self, rig: ConformanceRig, inventory: Inventory) -> None:
        inventory.fence(rig.machine_id, Fence(5, "conformance"))
        rig.start_past_driver(rig.machine_id)
        wait_for_power(source_of(rig), rig.machine_id, PowerState.RUNNING, rig.boot_timeout)
        inventory.fence(rig.machine_id, Fence(5, "conformance"))
        assert inventory.machine(rig.machine_id).power is PowerState.OFF

    @needs(source=[FENCE])
    def test_a_fence_of_a_lower_epoch_changes_nothing(self, rig: ConformanceRig, inventory: Inventory) -> None:
        inventory.fence(rig.machine_id, Fence(5, "conformance"))
        inventory.fence(rig.machine_id, Fence(4, "older"))
        assert inventory.fenced(rig.machine_id) == Fence(5, "conformance")

    @needs(source=[FENCE])
    def test_unfence_takes_fences_up_to_its_epoch(self, rig: ConformanceRig, inventory: Inventory) -> None:
        inventory.fence(rig.machine_id, Fence(5, "conformance"))
        inventory.unfence(rig.machine_id, 4)
        assert inventory.fenced(rig.machine_id) == Fence(5, "conformance")
        for _ in range(2):
            inventory.unfence(rig.machine_id, 5)
            assert inventory.fenced(rig.machine_id) is None
            assert inventory.machine(rig.machine_id).power is PowerState.OFF, "unfence does not start"

    @needs(source=[FENCE])
    def test_fence_of_a_missing_machine(self, inventory: Inventory) -> None:
        with pytest.raises(MachineNotFound):
            inventory.fence("no-such-machine", Fence(5, "conformance"))
        with pytest.raises(MachineNotFound):
            inventory.unfence("no-such-machine", 5)
