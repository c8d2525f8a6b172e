"""Failover: the machine that boots equals the protected one; undo, older points, another point after an undo."""

from __future__ import annotations

import pytest

from asrcore.units import format_time
from tests.lab import Audit, Hardware, Kind
from tests.system.rig import EngineError, Rig

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


def came_up(rig: Rig, name: str, boots: int) -> tuple[Audit, Hardware]:
    """The console of the machine at site b at its latest boot there."""
    rig.lab.wait_ready("b", name, boots=boots)
    console = rig.lab.console("b", name)
    assert console.audits[-1].intact
    assert not console.errors
    return console.audits[-1], console.hardware[-1]


def test_uefi_guest_boots_from_its_replica_with_its_variables(rig: Rig) -> None:
    lab, name = rig.lab, rig.guest("efi", Kind.UEFI)
    rig.rows(name, 5)
    rig.protect(name)
    row = rig.paused(name)
    rig.replicate(name)
    at_home = lab.console("a", name).hardware[-1]
    assert at_home.nvram_boots == 0
    rig.job("failover_unplanned", name)
    audit, hardware = came_up(rig, name, 1)
    assert audit.last == row
    assert hardware.firmware == "uefi"
    assert hardware.nvram_boots == 1  # the boot at site a was counted in the replicated variables
    assert (hardware.macs, hardware.cpu, hardware.disks) == (at_home.macs, at_home.cpu, at_home.disks)
    assert lab.state("a", name) == "shut off"  # fenced, because it was reachable
    rig.forget(name)


def test_points_by_id_and_time_and_undo(rig: Rig) -> None:
    """A BIOS guest from the boot loader on its own disk: two older states, then back to the source."""
    lab, name = rig.lab, rig.guest("loader", Kind.BIOS_DISK)
    rig.protect(name)
    rows, points = [], []
    for _ in range(3):
        rig.rows(name, 4)
        rows.append(rig.paused(name))
        points.append(rig.replicate(name)["point"])
        lab.command("a", name, "resume")
    rig.rows(name, 3)
    at_home = lab.console("a", name).hardware[-1]
    taken = {point["id"]: point["taken_at"] for point in rig.engine("points", name)}

    with pytest.raises(EngineError) as failed:
        rig.job("failover_unplanned", name, point="2001-01-01T00:00:00Z")
    assert (failed.value.code, failed.value.exit_code) == ("point-not-found", 3)
    assert rig.state(name) == "protected"
    assert lab.state("a", name) == "running"

    facts = rig.job("failover_unplanned", name, point=points[0])
    assert facts["point"] == points[0]
    audit, hardware = came_up(rig, name, 1)
    assert audit.last == rows[0]
    assert (hardware.firmware, hardware.macs, hardware.cpu) == ("bios", at_home.macs, at_home.cpu)
    rig.job("failover_undo", name)
    assert not rig.defined("b", name)
    assert set(points) <= set(rig.points(name))

    facts = rig.job("failover_unplanned", name, point=format_time(taken[points[1]] + 0.01))
    assert facts["point"] == points[1]
    audit, _ = came_up(rig, name, 2)
    assert audit.last == rows[1]
    epoch = rig.protection(name)["epoch"]
    rig.job("failover_undo", name)
    assert rig.protection(name)["epoch"] > epoch
    assert not rig.defined("b", name)

    # The source owns the machine again: it runs, and replication continues.
    assert rig.state(name) == "protected"
    lab.wait_ready("a", name, boots=2)
    assert lab.console("a", name).audits[-1].intact
    assert lab.console("a", name).audits[-1].last >= rows[2]
    _goes_on(rig, name)
    rig.forget(name)


def test_planned_failover_loses_nothing_and_can_be_undone(rig: Rig) -> None:
    lab, name = rig.lab, rig.guest("planned", rate=20)
    rig.protect(name, "ext4")
    rig.rows(name, 10)
    rig.job("failover_planned", name)
    last = lab.console("a", name).down[-1].last
    audit, _ = came_up(rig, name, 1)
    assert audit.last == last
    assert lab.state("a", name) == "shut off"
    rig.job("failover_undo", name)
    assert not rig.defined("b", name)
    assert rig.state(name) == "protected"
    lab.wait_ready("a", name, boots=2)
    back = lab.console("a", name).audits[-1]
    assert back.intact
    assert back.last == last  # what the machine wrote at site b was discarded with it
    _goes_on(rig, name)
    rig.forget(name)


def _goes_on(rig: Rig, name: str) -> None:
    """Replication in the first direction again, by a delta or a comparison, and equal."""
    rig.settled(name)
    try:
        rig.replicate(name)
    except EngineError as error:
        assert error.code == "tracking-lost"  # noqa: PT017 - one of two good ends
        rig.job("resync", name, now=True)
    cycle = rig.engine("frozen_cycle", name)
    assert rig.content(name, cycle["point"]) == cycle["content"]
