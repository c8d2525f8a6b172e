"""Machines that are off: their files are read in place, or over the link while the machine is held paused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.lab import Lab

pytestmark = pytest.mark.system

LOCAL = {"where": "a", "uri": "qemu:///system"}
REMOTE = {"where": "b", "uri": "qemu+tcp://10.77.0.1/system"}
Engines = Callable[..., Any]
Start = Callable[[str], None]


@pytest.fixture(scope="module")
def machine(lab: Lab, start: Start) -> str:
    lab.define_guest("a", "bios-direct", "off", rate=20)
    return lab.sites["a"].virsh("domuuid", "off").stdout.strip()


def tracking(answer: Any) -> str:
    return str(answer["disks"]["vda"]["tracking"])


def state(lab: Lab) -> str:
    return lab.state("a", "off")


@pytest.mark.parametrize("how", [LOCAL, pytest.param(REMOTE, marks=pytest.mark.long)], ids=["local", "remote"])
def test_from_running_to_off_to_running_nothing_is_lost(
    lab: Lab, start: Start, machine: str, engines: Engines, how: dict[str, str]
) -> None:
    engine = engines(**how)
    start("off")
    running = engine.open(machine=machine, view="r1")
    assert running["consistency"] == "crash"
    engine.close(view="r1")
    lab.shutdown("a", "off")

    # The last delta of a planned failover: what was written between the last point and the shutdown.
    off = engine.open(machine=machine, view="o1", since=running["mark"])
    assert (tracking(off), off["consistency"], off["power"]) == ("changed", "offline", "off")
    assert off["disks"]["vda"]["changed"]
    content = engine.hash(view="o1", disk="vda")
    engine.confirm(view="o1")
    engine.close(view="o1")
    assert state(lab) == "shut off"

    # It stays off: nothing is read again or started.
    still = engine.open(machine=machine, view="o2", since=off["mark"])
    assert (tracking(still), still["disks"]["vda"]["changed"], still["consistency"]) == ("changed", [], "offline")
    assert state(lab) == "shut off"
    engine.confirm(view="o2")
    # A read is needed after all (as in a comparison).
    assert engine.hash(view="o2", disk="vda") == content
    engine.confirm(view="o2")
    engine.close(view="o2")
    assert state(lab) == "shut off"
    engine.keep(machine=machine, marks=[still["mark"]])

    start("off")
    back = engine.open(machine=machine, view="r2", since=still["mark"])
    assert tracking(back) == "changed", "deltas continue after the start"
    assert back["disks"]["vda"]["changed"]
    engine.close(view="r2")
    engine.keep(machine=machine, marks=[])
    lab.shutdown("a", "off")


@pytest.mark.parametrize("how", [LOCAL, REMOTE], ids=["local", "remote"])
def test_a_machine_protected_while_it_is_off_is_tracked_from_its_start(
    lab: Lab, start: Start, machine: str, engines: Engines, how: dict[str, str]
) -> None:
    engine = engines(**how)
    first = engine.open(machine=machine, view="f1")
    assert tracking(first) == "none"
    engine.hash(view="f1", disk="vda")
    engine.confirm(view="f1")
    engine.close(view="f1")
    assert state(lab) == "shut off"
    start("off")
    second = engine.open(machine=machine, view="f2", since=first["mark"])
    assert tracking(second) == "changed"
    engine.close(view="f2")
    engine.keep(machine=machine, marks=[])
    lab.shutdown("a", "off")


def test_a_machine_that_is_read_locally_can_be_started_at_any_moment(
    lab: Lab, start: Start, machine: str, engines: Engines
) -> None:
    engine = engines(**LOCAL)
    first = engine.open(machine=machine, view="s1")
    engine.hash(view="s1", disk="vda")
    start("off")
    with pytest.raises(Exception, match="view-lost"):
        engine.confirm(view="s1")
    engine.close(view="s1")
    again = engine.open(machine=machine, view="s2", since=first["mark"])
    assert tracking(again) == "changed"
    engine.close(view="s2")
    engine.keep(machine=machine, marks=[])
    lab.shutdown("a", "off")


def test_a_killed_machine_is_neither_offline_consistent_nor_tracked(
    lab: Lab, start: Start, machine: str, engines: Engines
) -> None:
    engine = engines(**LOCAL)
    start("off")
    running = engine.open(machine=machine, view="k1")
    engine.close(view="k1")
    lab.kill_qemu("a", "off")
    off = engine.open(machine=machine, view="k2", since=running["mark"])
    assert (tracking(off), off["consistency"]) == ("lost", "crash")
    engine.close(view="k2")
    assert off["mark"] != running["mark"]
    after = engine.open(machine=machine, view="k3", since=off["mark"])
    assert (tracking(after), after["disks"]["vda"]["changed"]) == ("changed", []), "tracked again immediately"
    engine.close(view="k3")
    start("off")
    engine.keep(machine=machine, marks=[])
    lab.shutdown("a", "off")


def test_an_image_that_was_written_while_off_is_not_taken_for_unchanged(
    lab: Lab, machine: str, engines: Engines
) -> None:
    engine = engines(**LOCAL)
    first = engine.open(machine=machine, view="w1")
    engine.close(view="w1")
    lab.run_in("a", ["qemu-io", "-f", "qcow2", "-c", "write -P 7 200M 128k", "/srv/images/off-vda.qcow2"])
    second = engine.open(machine=machine, view="w2", since=first["mark"])
    assert tracking(second) == "changed"
    assert [200 << 20, 128 << 10, False] in second["disks"]["vda"]["changed"]
    engine.close(view="w2")


def test_a_held_machine_counts_as_off_and_its_owner_may_have_it(lab: Lab, machine: str, engines: Engines) -> None:
    engine = engines(**REMOTE)
    engine.open(machine=machine, view="h1")
    assert state(lab) == "paused"
    assert engine.power(machine=machine) == "off"
    # Its user resumes it: from then on it belongs to the user, and ending the view does not stop it.
    lab.sites["a"].virsh("resume", "off")
    assert engine.power(machine=machine) == "running"
    engine.close(view="h1")
    assert state(lab) == "running"
    assert lab.sites["a"].virsh("backup-dumpxml", "off", check=False).returncode, "a job that is left fills its files"
    lab.sites["a"].virsh("destroy", "off")


def test_a_machine_suspended_to_disk_keeps_its_memory(lab: Lab, start: Start, machine: str, engines: Engines) -> None:
    start("off")
    lab.sites["a"].virsh("managedsave", "off")
    for how in (REMOTE, LOCAL):
        engine = engines(**how)
        codes = {code for _, code, *_ in engine.findings(machine=machine)}
        assert "managed-save-present" in codes
        if how is REMOTE:
            with pytest.raises(Exception, match=r"driver-failed.*suspended to disk"):
                engine.open(machine=machine, view="m1")
        else:
            assert engine.open(machine=machine, view="m1")["consistency"] == "crash"
            engine.close(view="m1")
        assert "yes" in lab.sites["a"].virsh("dominfo", "off").stdout.split("Managed save:")[1].split("\n")[0]
    lab.sites["a"].virsh("managedsave-remove", "off")


def test_what_a_killed_engine_held_is_attached_to_or_released(lab: Lab, machine: str, engines: Engines) -> None:
    engine = engines(**REMOTE)
    first = engine.open(machine=machine, view="e1")
    engine.kill()
    assert state(lab) == "paused"
    second = engines(**REMOTE)
    again = second.open(machine=machine, view="e1")
    assert (again["taken_at"], again["mark"]) == (first["taken_at"], first["mark"])
    second.kill()
    third = engines(**REMOTE)
    third.keep(machine=machine, marks=[])
    assert state(lab) == "shut off"
    third.open(machine=machine, view="e2")
    third.kill()
    fourth = engines(**REMOTE)
    fourth.power_on(machine=machine)
    assert state(lab) == "running"
    fourth.power_off(machine=machine, graceful=False, timeout=10)
    fourth.power_off(machine=machine, graceful=False, timeout=10)
    assert state(lab) == "shut off"


def test_a_machine_that_cannot_be_held_is_an_error_that_says_why(lab: Lab, machine: str, engines: Engines) -> None:
    engine = engines(**REMOTE)
    lab.sites["a"].virsh("net-destroy", "lab")
    try:
        with pytest.raises(Exception, match=r"driver-failed.*network"):
            engine.open(machine=machine, view="n1")
        assert state(lab) == "shut off"
        assert "asrcore" not in lab.sites["a"].virsh("dumpxml", "off").stdout
    finally:
        with contextlib.suppress(Exception):
            lab.sites["a"].virsh("net-start", "lab")


def test_the_uefi_variables_are_kept_byte_by_byte_from_here_and_over_the_link(
    lab: Lab, start: Start, engines: Engines
) -> None:
    lab.define_guest("a", "uefi", "efi", rate=5)
    start("efi")
    machine = lab.sites["a"].virsh("domuuid", "efi").stdout.strip()
    path = "/var/lib/libvirt/qemu/nvram/efi_VARS.fd"
    for how in (LOCAL, REMOTE):
        engine = engines(**how)
        reported = engine.open(machine=machine, view="nvram")["artifacts"]
        digest = lab.run_in("a", ["sha256sum", path]).stdout.split()[0]
        assert (reported["nvram"]["size"], reported["nvram"]["sha256"]) == (540672, digest)
        codes = {code for _, code, *_ in engine.findings(machine=machine)}
        assert "nvram-unreadable" not in codes
        engine.close(view="nvram")
    assert "asr-" not in lab.sites["a"].virsh("pool-list", "--all", "--name").stdout, "no pool is left behind"
    lab.run_in("a", ["mv", path, f"{path}.away"])
    for how in (LOCAL, REMOTE):
        engine = engines(**how)
        assert "nvram" not in engine.open(machine=machine, view="gone")["artifacts"]
        assert ["warning", "nvram-unreadable"] in [item[:2] for item in engine.findings(machine=machine)]
        engine.close(view="gone")
    lab.sites["a"].virsh("destroy", "efi")
