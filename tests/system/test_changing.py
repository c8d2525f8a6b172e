"""A protected machine changes: disks are added, grown and removed; it is shut down, renamed, started. Replication
continues."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import BlankDisk, Kind
from tests.lab._run import run
from tests.system.rig import MIB, EngineError, Rig, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

NAME = "changing"
NEW = f"/srv/images/{NAME}-vdd.qcow2"


@pytest.fixture(scope="module")
def changing(rig: Rig) -> Iterator[Rig]:
    rig.guest(NAME, extra_disks=[BlankDisk("vdc", 32 * MIB)])
    rig.protect(NAME)
    yield rig
    rig.forget(NAME)


def attach(rig: Rig, size: int = 48 * MIB) -> None:
    """Plug a new disk vdd into the running guest."""
    run(["qemu-img", "create", "-q", "-f", "qcow2", rig.lab.host_path("a", NEW), str(size)])
    words = ["--driver", "qemu", "--subdriver", "qcow2", "--targetbus", "virtio", "--live", "--config"]
    rig.lab.sites["a"].virsh("attach-disk", NAME, NEW, "vdd", *words)
    wait_for(lambda: "vdd" in rig.lab.command("a", NAME, "cat /proc/partitions"), "the guest sees vdd")


def detach(rig: Rig) -> None:
    """Unplug it again."""
    rig.lab.sites["a"].virsh("detach-disk", NAME, "vdd", "--live", "--config")
    wait_for(lambda: "vdd" not in rig.sources(NAME), "vdd is unplugged")
    rig.lab.host_path("a", NEW).unlink()


def equal_cycle(rig: Rig, name: str = NAME, mode: str = "delta") -> dict[str, str]:
    """A point that equals the frozen source; its content by disk."""
    cycle = rig.engine("frozen_cycle", name)
    assert cycle["mode"] == mode
    found = rig.content(name, cycle["point"])
    assert found == cycle["content"]
    return found


def test_disk_added_and_removed(changing: Rig) -> None:
    rig, lab = changing, changing.lab
    without = rig.replicate(NAME)["point"]
    attach(rig)
    lab.command("a", NAME, "fill /dev/vdd 1 8")
    first = rig.replicate(NAME)
    assert first["mode"] == "delta"
    assert first["bytes_sent"] > 8 * MIB
    lab.command("a", NAME, "fill /dev/vdd 20 1")
    found = equal_cycle(rig)
    assert "vdd" in found
    with_disk = rig.points(NAME)[-1]
    assert rig.engine("cycles", NAME)[-1]["bytes_sent"] < 8 * MIB  # tracked from its first cycle on
    with rig.tested(NAME) as console:
        assert console.hardware[-1].disks["vdd"] == 48 * MIB
        assert console.audits[-1].intact

    detach(rig)
    rig.rows(NAME, 2)
    assert "vdd" not in equal_cycle(rig)
    images = rig.point_images(NAME)
    assert "vdd" not in images[rig.points(NAME)[-1]]
    assert "vdd" not in images[without]
    assert rig.content(NAME, with_disk) == found


def test_disk_replaced_by_another_of_the_same_name(changing: Rig) -> None:
    """Its content must not be mixed with that of the former disk."""
    rig, lab = changing, changing.lab
    attach(rig)
    lab.command("a", NAME, "fill /dev/vdd 1 8")
    equal_cycle(rig)
    detach(rig)
    attach(rig)
    lab.command("a", NAME, "fill /dev/vdd 4 2")
    assert _replicated(rig, NAME) < rig.allocated(NAME)
    equal_cycle(rig)
    detach(rig)
    equal_cycle(rig)


def test_disk_grown(changing: Rig) -> None:
    rig, lab = changing, changing.lab
    old = rig.replicate(NAME)["point"]
    before = rig.content(NAME, old)
    lab.sites["a"].virsh("blockresize", NAME, "vdc", "40M")
    grown = equal_cycle(rig)
    assert grown["vdc"] != before["vdc"]  # its size
    lab.command("a", NAME, "fill /dev/vdc 34 2")  # behind the former end
    found = equal_cycle(rig)
    assert found["vdc"] != grown["vdc"]
    assert rig.content(NAME, old) == before


@pytest.mark.long
def test_shut_down_renamed_and_started(rig: Rig) -> None:
    lab, site, name = rig.lab, rig.lab.sites["a"], "called"
    rig.guest(name, Kind.BIOS_DISK)
    rig.protect(name)
    lab.shutdown("a", name)
    off = rig.replicate(name)
    assert (off["mode"], off["consistency"]) == ("delta", "offline")
    assert rig.content(name) == rig.source_content(name)
    assert rig.replicate(name)["bytes_sent"] == 0
    assert lab.state("a", name) == "shut off"

    rig.start(name)
    rig.rows(name, 3)
    equal_cycle(rig, name)

    lab.shutdown("a", name)  # with no cycle while it is off
    if site.virsh("domrename", name, "renamed", check=False).returncode:
        for checkpoint in site.virsh("checkpoint-list", name, "--name").stdout.split():
            site.virsh("checkpoint-delete", name, checkpoint, "--metadata")
        site.virsh("domrename", name, "renamed")
    site.virsh("start", "renamed")
    lab.wait_ready("a", name, boots=3)  # its console keeps its name
    rig.settled("renamed")
    sent = _replicated(rig, name)
    assert sent < rig.allocated("renamed") / 2
    assert rig.engine("machine", "a", rig.protection(name)["source_machine"])["name"] == "renamed"
    equal_cycle(rig, name)
    with rig.tested(name) as console:
        assert console.audits[-1].intact
        assert console.audits[-1].last >= lab.console("a", name).down[-1].last

    site.virsh("destroy", "renamed")
    rig.forget(name)
    lab.remove_guest("a", "renamed")


def _replicated(rig: Rig, name: str) -> int:
    """A cycle of any mode; returns the bytes sent."""
    try:
        facts = rig.replicate(name)
    except EngineError as error:
        assert error.code == "tracking-lost"  # noqa: PT017 - one of two good ends
        facts = rig.job("resync", name, now=True)
    return int(facts["bytes_sent"])
