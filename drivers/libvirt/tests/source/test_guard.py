"""What a killed engine leaves at its source ends without another engine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from asr_driver_libvirt.site import LibvirtSite
from asr_driver_libvirt.source import left_over
from asr_driver_libvirt.source.source import LibvirtSource
from drivers.libvirt.tests.source.test_odd_machines import Bare, disk, image
from tests.lab import Lab

pytestmark = pytest.mark.system

PLACE = "/srv/scratch"
LOCAL = {"where": "a", "uri": "qemu:///system"}
REMOTE = {"where": "b", "uri": "qemu+tcp://10.77.0.1/system"}
SMALL = {"scratch_dir": PLACE, "scratch_reserve": "8MiB"}
Engines = Callable[..., Any]


@pytest.fixture
def place(lab: Lab) -> Iterator[str]:
    """A scratch place of 16 MiB."""
    lab.run_in("a", ["mkdir", "-p", PLACE])
    lab.run_in("a", ["mount", "-t", "tmpfs", "-o", "size=16m", "asr-scratch", PLACE])
    yield PLACE
    lab.run_in("a", ["umount", "-l", PLACE])


@pytest.fixture
def bare(lab: Lab, site: LibvirtSite, place: str) -> Iterator[Bare]:
    made = Bare(lab, site, "guarded", disk(image(lab, "guarded.qcow2", "64M")))
    made.write("vda", "write -P 1 0 64M")
    yield made
    made.remove()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASRCORE_GUARD_GRACE", "3")


def has_job(bare: Bare) -> bool:
    return "<domainbackup" in bare.virsh("backup-dumpxml", bare.name, check=False)


def until(true: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def scratch_files(lab: Lab) -> str:
    return lab.run_in("a", ["ls", PLACE]).stdout


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("how", [LOCAL, REMOTE], ids=["local", "remote"])
def test_the_job_of_a_killed_engine_ends(lab: Lab, bare: Bare, engines: Engines, how: dict[str, str]) -> None:
    engine = engines(**how, **SMALL)
    engine.open(machine=bare.id, view="v1")
    engine.hash(view="v1", disk="vda")
    engine.kill()
    assert has_job(bare), "another engine may take it over for a while"
    assert scratch_files(lab)
    until(lambda: not has_job(bare), "the job is still there")
    assert scratch_files(lab) == ""
    assert bare.virsh("domstate", bare.name).strip() == "running"


def test_the_job_of_a_killed_engine_ends_at_once_when_space_runs_short(bare: Bare, engines: Engines) -> None:
    engine = engines(**LOCAL, **SMALL)
    engine.open(machine=bare.id, view="v1")
    engine.kill()
    bare.write("vda", "write -P 2 0 9M")
    assert has_job(bare)
    bare.write("vda", "write -P 2 9M 4M")
    until(lambda: not has_job(bare), "the job is still there", 5)


def test_the_job_of_an_engine_that_does_nothing_ends_when_space_runs_short(bare: Bare, engines: Engines) -> None:
    engine = engines(**LOCAL, **SMALL)
    engine.open(machine=bare.id, view="v1")
    os.kill(engine._process.pid, signal.SIGSTOP)
    try:
        bare.write("vda", "write -P 2 0 15M")
        until(lambda: not has_job(bare), "the job is still there", 5)
    finally:
        os.kill(engine._process.pid, signal.SIGCONT)
    with pytest.raises(Exception, match="view-lost"):
        engine.confirm(view="v1")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("how", [LOCAL, REMOTE], ids=["local", "remote"])
def test_the_view_that_another_engine_reads_is_left_alone(bare: Bare, engines: Engines, how: dict[str, str]) -> None:
    engine = engines(**how, **SMALL)
    first = engine.open(machine=bare.id, view="v1")
    engine.kill()
    second = engines(**how, **SMALL)
    again = second.open(machine=bare.id, view="v1")
    assert again["mark"] == first["mark"]
    second.hash(view="v1", disk="vda")
    time.sleep(6)
    second.confirm(view="v1")
    second.kill()
    until(lambda: not has_job(bare), "the second engine's guard ends it")


@pytest.mark.usefixtures("short")
def test_a_machine_held_by_a_killed_engine_is_stopped(bare: Bare, engines: Engines) -> None:
    bare.virsh("destroy", bare.name)
    engine = engines(**REMOTE)
    engine.open(machine=bare.id, view="v1")
    assert bare.virsh("domstate", bare.name).strip() == "paused"
    engine.kill()
    assert bare.virsh("domstate", bare.name).strip() == "paused"
    until(lambda: bare.virsh("domstate", bare.name).strip() == "shut off", "it is still held")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("place_of_crash", ["libvirt.hold", "libvirt.held", "libvirt.begin", "libvirt.begun"])
def test_an_engine_killed_at_any_place_leaves_nothing(
    bare: Bare, engines: Engines, monkeypatch: pytest.MonkeyPatch, place_of_crash: str
) -> None:
    held = place_of_crash in ("libvirt.hold", "libvirt.held")
    if held:
        bare.virsh("destroy", bare.name)
    monkeypatch.setenv("ASRCORE_CRASH_AT", place_of_crash)
    engine = engines(**REMOTE)
    with pytest.raises(AssertionError, match="the engine died"):
        engine.open(machine=bare.id, view="v1")
    until(lambda: not has_job(bare), "the job is still there")
    state = "shut off" if held else "running"
    until(lambda: bare.virsh("domstate", bare.name).strip() == state, f"it is not {state}")


def test_a_machine_that_its_user_started_and_paused_is_not_stopped(bare: Bare, site: LibvirtSite) -> None:
    """An engine that was about to hold it was killed at the same time."""
    host = cast(LibvirtSource, site.source)._host
    domain = host.domain(bare.id)
    until(lambda: sum(row[2] for row in domain.vcpus()[0]) > left_over._START_TIME, "its firmware runs")
    bare.virsh("suspend", bare.name)
    assert left_over.end(host, domain, "", held=True, starting=True) == ""
    assert bare.virsh("domstate", bare.name).strip() == "paused"
    bare.virsh("destroy", bare.name)
    bare.virsh("start", "--paused", bare.name)
    assert left_over.end(host, domain, "", held=True, starting=True) == "stopped the machine"
    assert bare.virsh("domstate", bare.name).strip() == "shut off"
