"""Snapshots that others make of a machine after it was protected: reported in each cycle, and no revert goes unseen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asr_driver_libvirt.site import LibvirtSite
from asrcore.driver import FrozenView, MachineView, Tracking, ViewRequest
from asrcore.model.finding import Severity
from asrcore.model.point import Consistency, Mark
from tests.lab import BareMachine, Lab

pytestmark = pytest.mark.system


@pytest.fixture
def machine(lab: Lab) -> Iterator[BareMachine]:
    made = BareMachine(lab, "a", "reverted")
    yield made
    made.remove()


def opened(
    site: LibvirtSite, machine: BareMachine, view_id: str, since: Mark | None = None
) -> tuple[FrozenView, MachineView]:
    view = site.source.open_view(
        [ViewRequest(machine.id, view_id, since)], consistency=Consistency.CRASH, freeze_limit=5.0
    )
    return view, view.machines[machine.id]


def codes(found: MachineView) -> dict[str, Severity]:
    return {item.code: item.severity for item in found.notices}


@pytest.mark.parametrize("off", [False, True], ids=["running", "off"])
def test_a_cycle_reports_snapshots_that_were_made_since(site: LibvirtSite, machine: BareMachine, off: bool) -> None:
    view, found = opened(site, machine, "v1")
    mark = found.mark
    assert codes(found) == {}
    view.close()
    machine.virsh("snapshot-create-as", machine.name, "s1")
    if off:
        machine.virsh("destroy", machine.name)
    view, found = opened(site, machine, "v2", mark)
    assert codes(found) == {"machine-has-snapshots": Severity.WARNING}
    again, same = opened(site, machine, "v2", mark)
    assert codes(same) == codes(found)
    again.close()
    view.close()
    machine.virsh("snapshot-delete", machine.name, "s1")
    view, found = opened(site, machine, "v3", found.mark)
    assert codes(found) == {}
    view.close()


def test_the_commands_of_the_notice_allow_a_revert_and_the_disk_is_compared(
    site: LibvirtSite, machine: BareMachine
) -> None:
    view, found = opened(site, machine, "v1")
    view.close()
    machine.virsh("snapshot-create-as", machine.name, "s1")
    machine.write("1M")
    view, found = opened(site, machine, "v2", found.mark)
    view.close()
    site.source.keep_marks(machine.id, [found.mark] if found.mark else [])
    (notice,) = found.notices
    assert "virsh checkpoint-delete MACHINE CHECKPOINT" in notice.action
    for name in machine.checkpoints():
        machine.virsh("checkpoint-delete", machine.name, name)
    machine.virsh("snapshot-revert", machine.name, "s1")
    assert machine.lab.state("a", machine.name) == "running"
    view, found = opened(site, machine, "v3", found.mark)
    assert found.disks["vda"].tracking is Tracking.LOST
    view.close()
