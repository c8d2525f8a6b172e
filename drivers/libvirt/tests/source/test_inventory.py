"""Inventory, power and quarantine on real machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from asr_driver_libvirt.site import LibvirtSite
from asrcore.driver import Fence
from asrcore.errors import MachineNotFound, ShutdownFailed, WrongState
from asrcore.model.machine import Firmware, PowerState
from asrcore.model.policy import Policy
from tests.lab import Lab

pytestmark = pytest.mark.system

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def defined(lab: Lab) -> str:
    lab.define_guest("a", "bios-direct", "power", rate=5)
    return lab.sites["a"].virsh("domuuid", "power").stdout.strip()


@pytest.fixture
def machine(lab: Lab, site: LibvirtSite, defined: str) -> Iterator[str]:
    yield defined
    site.inventory.unfence(defined, 2**62)
    site.inventory.power_off(defined, graceful=False, timeout=10)


def test_a_machine_is_described_in_neutral_words(site: LibvirtSite, machine: str) -> None:
    found = site.inventory.machine(machine)
    assert (found.name, found.cpus, found.firmware, found.power) == ("power", 1, Firmware.BIOS, PowerState.OFF)
    assert [(disk.id, disk.format, disk.bus) for disk in found.disks] == [
        ("vda", "qcow2", "virtio"),
        ("vdb", "raw", "virtio"),
        ("sda", "qcow2", "scsi"),
    ]
    assert all(disk.size >= 1 << 20 for disk in found.disks)
    assert found.nics[0].network == "lab"
    assert found in site.inventory.machines()


def test_an_unknown_machine_is_told_by_every_role(site: LibvirtSite) -> None:
    for call in (
        lambda: site.inventory.machine(NOBODY),
        lambda: site.inventory.power_on(NOBODY),
        lambda: site.inventory.fenced(NOBODY),
        lambda: site.source.findings(NOBODY, Policy("p")),
        lambda: site.source.keep_marks(NOBODY, []),
    ):
        with pytest.raises(MachineNotFound):
            call()


def test_power_on_and_off_may_be_repeated(
    lab: Lab, site: LibvirtSite, machine: str, start: Callable[[str], None]
) -> None:
    start("power")
    site.inventory.power_on(machine)
    assert site.inventory.machine(machine).power is PowerState.RUNNING
    site.inventory.power_off(machine, graceful=True, timeout=60)
    assert site.inventory.machine(machine).power is PowerState.OFF
    site.inventory.power_off(machine, graceful=True, timeout=60)


def test_a_guest_that_does_not_listen_is_not_cut_off(
    lab: Lab, site: LibvirtSite, machine: str, start: Callable[[str], None]
) -> None:
    start("power")
    lab.sites["a"].virsh("suspend", "power")
    site.inventory.power_on(machine)
    assert site.inventory.machine(machine).power is PowerState.RUNNING, "a paused one resumes"
    lab.sites["a"].virsh("destroy", "power")
    lab.sites["a"].virsh("start", "power")
    # The firmware has not started the system yet: the button has no effect.
    with pytest.raises(ShutdownFailed):
        site.inventory.power_off(machine, graceful=True, timeout=0.2)
    assert lab.state("a", "power") == "running"
    site.inventory.power_off(machine, graceful=False, timeout=1)
    assert lab.state("a", "power") == "shut off"


def test_a_fence_stops_it_and_keeps_it_off(lab: Lab, site: LibvirtSite, machine: str) -> None:
    lab.sites["a"].virsh("autostart", "power")
    lab.sites["a"].virsh("start", "power")
    site.inventory.fence(machine, Fence(3, "failed over to <b> & co"))
    assert lab.state("a", "power") == "shut off"
    assert "Autostart:      disable" in lab.sites["a"].virsh("dominfo", "power").stdout
    assert site.inventory.fenced(machine) == Fence(3, "failed over to <b> & co")
    with pytest.raises(WrongState, match="fenced"):
        site.inventory.power_on(machine)
    # Its user starts it anyway: a repeated fence stops it again.
    lab.sites["a"].virsh("start", "power")
    site.inventory.fence(machine, Fence(3, "failed over to <b> & co"))
    assert lab.state("a", "power") == "shut off"


def test_a_fence_is_only_replaced_and_released_by_its_epoch_or_a_later_one(site: LibvirtSite, machine: str) -> None:
    site.inventory.fence(machine, Fence(5, "five"))
    site.inventory.fence(machine, Fence(4, "four"))
    assert site.inventory.fenced(machine) == Fence(5, "five")
    site.inventory.unfence(machine, 4)
    assert site.inventory.fenced(machine) == Fence(5, "five")
    site.inventory.unfence(machine, 5)
    assert site.inventory.fenced(machine) is None
    site.inventory.unfence(machine, 5)
    site.inventory.power_on(machine)


def test_a_fence_outlives_renaming_and_never_travels_with_a_description(
    lab: Lab, site: LibvirtSite, machine: str
) -> None:
    site.inventory.fence(machine, Fence(7, "seven"))
    lab.sites["a"].virsh("domrename", "power", "power2")
    assert site.inventory.fenced(machine) == Fence(7, "seven")
    lab.sites["a"].virsh("domrename", "power2", "power")


def test_the_lab_guests_findings(site: LibvirtSite, machine: str) -> None:
    codes = [finding.code for finding in site.source.findings(machine, Policy("p"))]
    assert {"disk-raw", "direct-kernel"} <= set(codes)


def test_a_machine_with_a_snapshot_is_refused_by_a_finding(lab: Lab, site: LibvirtSite) -> None:
    lab.define_guest("a", "bios-disk", "snapped", rate=5)
    uuid = lab.sites["a"].virsh("domuuid", "snapped").stdout.strip()
    lab.sites["a"].virsh("snapshot-create-as", "snapped", "before")
    found = {finding.code: finding for finding in site.source.findings(uuid, Policy("p"))}
    assert found["machine-has-snapshots"].severity.value == "error"
    lab.sites["a"].virsh("snapshot-delete", "snapped", "before")
    assert "machine-has-snapshots" not in {f.code for f in site.source.findings(uuid, Policy("p"))}
